"""Names in containers, and the way to the host, with the real guest and engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from greeter import GREETING, greeter
from resolver import Resolver
from sandbox import Sandbox, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


@pytest.fixture
def host_port() -> Iterator[int]:
    """A service on this computer's 127.0.0.1 alone."""
    with greeter("127.0.0.1") as port:
        yield port


def kill_service(machine: Sandbox) -> None:
    """Have the next start take the guest over, with other settings perhaps."""
    pid = machine.status()["service_pid"]
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def fetched(machine: Sandbox, name: str, port: int, *options: str) -> str:
    done = machine.docker(
        "run", "--rm", *options, "busybox", "wget", "-T", "20", "-qO-", f"http://{name}:{port}/",
        check=False,
    )  # fmt: skip
    return (done.stdout + done.stderr).decode()


def test_the_host_by_its_names(machine: Sandbox, host_port: int) -> None:
    for name in ("host.docker.internal", "gateway.docker.internal"):
        assert fetched(machine, name, host_port) == GREETING


def test_the_host_from_a_network_of_the_user_s(machine: Sandbox, host_port: int) -> None:
    machine.docker("network", "create", "own")
    try:
        said = fetched(machine, "host.docker.internal", host_port, "--network", "own")
        assert said == GREETING
    finally:
        machine.docker("network", "rm", "own")


def test_the_host_by_host_gateway(machine: Sandbox, host_port: int) -> None:
    said = fetched(machine, "me", host_port, "--add-host", "me:host-gateway")
    assert said == GREETING


def test_the_host_in_a_build(machine: Sandbox, host_port: int, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM busybox\nRUN wget -T 20 -qO /said http://host.docker.internal:{host_port}/ &&"
        f" wget -T 20 -qO /again http://gateway.docker.internal:{host_port}/ &&"
        f" wget -T 20 -qO /third http://me:{host_port}/\n"
    )
    machine.docker(
        "build", "-q", "--no-cache", "--add-host", "me:host-gateway", "-t", "asked", str(tmp_path)
    )
    said = machine.docker("run", "--rm", "asked", "cat", "/said", "/again", "/third").stdout
    assert said.decode() == 3 * GREETING
    machine.docker("rmi", "asked")


def test_names_lead_to_the_host_as_long_as_it_answers(
    machine: Sandbox, host_port: int, tmp_path: Path
) -> None:
    """When the service dies, QEMU's own resolver answers; the next one is asked again."""

    config = tmp_path / "config"
    config.write_bytes(machine.wherry("ssh-config").stdout)

    def leads() -> bool:
        rules = ["ssh", "-F", str(config), "wherry-default", "iptables", "-t", "nat", "-S"]
        return b"DNAT --to-destination 10.0.2.2:" in subprocess.check_output(rules)

    assert leads()
    kill_service(machine)
    wait_until(lambda: not leads(), 60, "nothing leads to a server that is gone")
    machine.wherry("start")
    assert leads()
    assert fetched(machine, "host.docker.internal", host_port) == GREETING


@pytest.fixture
def resolvers() -> Iterator[tuple[Resolver, Resolver]]:
    """Name servers of two networks, at the port that every system's settings mean."""
    try:
        made = Resolver("127.0.0.77", 53), Resolver("127.0.0.78", 53)
    except PermissionError:
        pytest.skip("only root may listen on port 53")
    yield made
    for each in made:
        each.close()


def test_names_are_those_of_the_host_s_network(
    machine: Sandbox, host_port: int, resolvers: tuple[Resolver, Resolver], tmp_path: Path
) -> None:
    """Every kind, by UDP and TCP, from a container; the host then changes to another network.

    The service sees files of the test's own where the system has its settings.
    """
    office, home = resolvers
    office.records = {
        ("nas.office.test.", "A"): ["10.9.8.7"],
        ("nas.office.test.", "AAAA"): ["2001:db8::7"],
        ("7.8.9.10.in-addr.arpa.", "PTR"): ["nas.office.test."],
        ("_ldap._tcp.office.test.", "SRV"): ["1 2 389 nas.office.test."],
        ("text.office.test.", "TXT"): ['"some text"'],
        ("many.office.test.", "A"): [f"10.9.{high}.{low}" for high in (1, 2) for low in range(40)],
    }
    home.records = {("nas.office.test.", "A"): ["192.168.7.7"], ("nas.office.test.", "AAAA"): []}
    settings, hosts = tmp_path / "resolv.conf", tmp_path / "hosts"
    settings.write_text("search office.test\nnameserver 127.0.0.77\n")
    hosts.write_text("127.0.0.1 localhost\n127.0.0.1 dev.test\n")
    script = 'mount --bind "$1" /etc/resolv.conf && mount --bind "$2" /etc/hosts && shift 2 && "$@"'
    begin = [sys.executable, "-m", "wherry", "start"]
    kill_service(machine)
    try:
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "-", settings, hosts, *begin],
            env=machine.env, check=True, timeout=400,
        )  # fmt: skip
        # DNS over TCP (RFC 1035, 4.2.2): what does not fit into a datagram comes whole.
        query = "\\0\\042\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4many\\6office\\4test\\0\\0\\1\\0\\1"
        asked = machine.docker(
            "run", "--rm", "busybox", "sh", "-c",
            "nslookup -type=a nas.office.test; nslookup -type=aaaa nas.office.test;"
            "nslookup 10.9.8.7; nslookup -type=srv _ldap._tcp.office.test;"
            "nslookup -type=txt text.office.test; echo short; nslookup nas;"
            f"printf '{query}' | nc -w 5 10.0.2.3 53 | wc -c;"
            f"wget -T 20 -qO- http://dev.test:{host_port}/",
            check=False,
        ).stdout.decode()  # fmt: skip
        whole, short = asked.split("short")
        assert "Address: 10.9.8.7" in whole
        assert "Address: 2001:db8::7" in whole
        assert "name = nas.office.test" in whole
        assert "1 2 389 nas.office.test" in whole
        assert '"some text"' in whole
        assert "Address: 10.9.8.7" in short
        assert short.endswith(GREETING)
        size = int(short.removesuffix(GREETING).split()[-1])
        assert size > 16 * len(office.records["many.office.test.", "A"])
        settings.write_text("nameserver 127.0.0.78\n")
        changed = machine.docker("run", "--rm", "busybox", "nslookup", "nas.office.test")
        assert b"Address: 192.168.7.7" in changed.stdout
        # In a network of the user's the engine's own server, which asks ours, is between.
        settings.write_text("search office.test\nnameserver 127.0.0.77\n")
        machine.docker("network", "create", "own")
        asked = machine.docker(
            "run", "--rm", "--network", "own", "busybox", "sh", "-c",
            "cat /etc/resolv.conf; nslookup -type=a nas; nslookup 10.9.8.7;"
            f"printf '{query}' | nc -w 5 127.0.0.11 53 | wc -c",
            check=False,
        ).stdout.decode()  # fmt: skip
        assert "nameserver 127.0.0.11" in asked
        assert "Address: 10.9.8.7" in asked
        assert "name = nas.office.test" in asked
        assert int(asked.split()[-1]) > 16 * len(office.records["many.office.test.", "A"])
    finally:
        machine.docker("network", "rm", "own", check=False)
        kill_service(machine)
        machine.wherry("start")


TO_ALL = """
import socket, sys
made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
made.bind(("10.0.2.15", 0))
made.sendto(b"x", ("255.255.255.255", int(sys.argv[1])))
"""


def reached_by_all(machine: Sandbox) -> bool:
    """Whether a datagram to everybody on the guest's network comes to this computer's loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(5)
        port = str(listener.getsockname()[1])
        machine.wherry("shell", "--", "python3", "-c", TO_ALL, port, check=False)
        try:
            return listener.recv(1) == b"x"
        except TimeoutError:
            return False


def reached_by_ipv6(machine: Sandbox) -> bool:
    """Whether the guest's address of the host leads to this computer's ::1."""
    with greeter("::1") as port:
        url = f"http://[fec0::2]:{port}/"
        done = machine.wherry(
            "shell", "--", "busybox", "wget", "-T", "20", "-qO-", url, check=False
        )
    assert done.stdout == GREETING.encode() or b"refused" in done.stderr
    return done.stdout == GREETING.encode()


def test_the_way_to_the_host_can_be_closed(machine: Sandbox, host_port: int) -> None:
    machine.wherry("config", "set", "network.host_access", "false")
    try:
        kill_service(machine)
        machine.wherry("start")
        assert "refused" in fetched(machine, "host.docker.internal", host_port)
        assert "refused" in fetched(machine, "10.0.2.2", host_port, "--network", "host")
        assert not reached_by_all(machine)
        assert not reached_by_ipv6(machine)
        # Where it stays when the engine starts anew and puts its own rules before all others.
        rules = machine.wherry("shell", "--", "iptables", "-S", "DOCKER-USER").stdout
        assert b"-A DOCKER-USER -j WHERRY" in rules
    finally:
        machine.wherry("config", "unset", "network.host_access")
        kill_service(machine)
        machine.wherry("start")
    assert fetched(machine, "host.docker.internal", host_port) == GREETING
    assert reached_by_all(machine)
    assert reached_by_ipv6(machine)
