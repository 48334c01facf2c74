"""Published ports, with the real QEMU, guest, engine and docker CLI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from loopback import free_port, one_more_ipv6
from sandbox import Sandbox, wait_until

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.ports.conflicts import try_bind
from wherry.ports.desired import Forward
from wherry.vm.image import Image

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SERVE = "mkdir -p /www; echo {} >/www/index.html; exec httpd -f -p {} -h /www"

FROM_INSIDE = """
import socket, sys
engine = socket.socket(socket.AF_UNIX)
engine.connect("/run/docker.sock")
path, body = sys.argv[1:]
head = f"Content-Type: application/json\\r\\nContent-Length: {len(body)}"
engine.sendall(f"POST {path} HTTP/1.0\\r\\n{head}\\r\\n\\r\\n{body}".encode())
print(engine.recv(100).split()[1].decode())
"""

ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 7))
while True:
    server.sendto(*server.recvfrom(65536))
"""


def own_address() -> str:
    """An address of this computer's that is not the loopback's."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return each.address
    pytest.skip("this computer has the loopback's addresses alone")


def answers(address: str, port: int) -> bool:
    """Whether a TCP port accepts."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.settimeout(5)
        return probe.connect_ex((address, port)) == 0


def fetch(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as answer:
        return str(answer.read().decode().strip())


def echo(address: str, port: int, data: bytes) -> bytes:
    """Send a datagram and return the answer; the first ones may come before the server."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        client.connect((address, port))
        for _ in range(40):
            with contextlib.suppress(OSError):
                client.send(data)
                return client.recv(65536)
    pytest.fail(f"no answer from {address}:{port}")


def silent(address: str, port: int) -> bool:
    """Whether nobody takes datagrams there: this computer itself says so at once."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((address, port))
        client.send(b"x")
        try:
            client.recv(65536)
        except ConnectionRefusedError:
            return True
        return False


def ports(machine: Sandbox) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(machine.wherry("ports", "--json").stdout)
    return found


def settled(machine: Sandbox, count: int, timeout_s: float = 30) -> list[dict[str, Any]]:
    """Return the ports when there are so many, and none is only about to be opened."""
    found: list[dict[str, Any]] = []

    def done() -> bool:
        found[:] = ports(machine)
        return len(found) == count and all(each["state"] != "pending" for each in found)

    wait_until(done, timeout_s, f"{count} ports have settled")
    return found


def inside(machine: Sandbox, path: str, body: str = "") -> str:
    """Have the engine do something that wherry does not see; return the answer's status."""
    argv = ["python3", "-c", FROM_INSIDE, path, body]
    return machine.wherry("shell", "--", *argv).stdout.decode().strip()


def state(machine: Sandbox, name: str) -> str:
    return machine.docker("inspect", "-f", "{{.State.Status}}", name).stdout.decode().strip()


def web(
    machine: Sandbox, name: str, *publish: str, port: int = 80, options: tuple[str, ...] = ()
) -> None:
    """Run a web server that answers with its name; return when it serves."""
    wanted = [word for each in publish for word in ("-p", each)]
    machine.docker(
        "run", "-d", "--name", name, *wanted, *options,
        "busybox", "sh", "-c", SERVE.format(name, port),
    )  # fmt: skip
    serving = f"until wget -qO- 127.0.0.1:{port} >/dev/null; do sleep 0.05; done"
    machine.docker("exec", name, "sh", "-c", serving)


def run_inside(machine: Sandbox, name: str, program: str) -> None:
    """Run a Python program in a container's network: the guest has one, busybox has not."""
    process = machine.docker("inspect", "-f", "{{.State.Pid}}", name).stdout.decode().strip()
    enter = ("setsid", "nsenter", "-t", process, "-n", "timeout", "200", "python3", "-c", program)
    start = '"$@" </dev/null >/dev/null 2>&1 &'
    machine.wherry("shell", "--", "sh", "-c", start, "sh", *enter)


@pytest.fixture(autouse=True)
def nothing_left(machine: Sandbox) -> Iterator[None]:
    yield
    if left := machine.docker("ps", "-aq").stdout.decode().split():
        machine.docker("rm", "-f", *left)
    assert ports(machine) == []


def test_a_port_of_all_addresses_answers_on_both_loopbacks(machine: Sandbox) -> None:
    port = free_port()
    web(machine, "web", f"{port}:80")
    assert fetch("127.0.0.1", port) == "web"
    assert fetch("::1", port) == "web"
    assert fetch(own_address(), port) == "web"
    assert [(each["address"], each["kind"], each["state"]) for each in ports(machine)] == [
        ("0.0.0.0", "hostfwd", "open"),
        ("::", "relay", "open"),
    ]
    table = machine.wherry("ports").stdout.decode()
    assert f"0.0.0.0:{port}/tcp" in table
    assert "web:80" in table


def test_the_listener_is_there_when_run_returns_and_gone_when_rm_does(machine: Sandbox) -> None:
    port = free_port()
    for _ in range(5):
        machine.docker("run", "-d", "--name", "web", "-p", f"{port}:80", "busybox", "sleep", "999")
        assert answers("127.0.0.1", port)
        assert answers("::1", port)
        machine.docker("rm", "-f", "web")
        assert not answers("127.0.0.1", port)
        assert not answers("::1", port)


def test_it_is_gone_when_stop_returns(machine: Sandbox) -> None:
    port = free_port()
    web(machine, "web", f"{port}:80")
    machine.docker("stop", "-t", "0", "web")
    assert not answers("127.0.0.1", port)
    machine.docker("start", "web")
    assert answers("127.0.0.1", port)
    machine.docker("restart", "-t", "0", "web")
    assert answers("127.0.0.1", port)


def test_a_port_of_127_0_0_1_answers_there_alone(machine: Sandbox) -> None:
    port = free_port()
    web(machine, "web", f"127.0.0.1:{port}:80")
    assert fetch("127.0.0.1", port) == "web"
    assert not answers("::1", port)
    assert not answers(own_address(), port)
    assert [each["kind"] for each in ports(machine)] == ["hostfwd"]


def test_a_port_of_an_address_of_this_computer(machine: Sandbox) -> None:
    """The engine can bind it, and containers still reach this computer there."""
    address = own_address()
    port, other = free_port(), free_port()
    web(machine, "web", f"{address}:{port}:80")
    assert fetch(address, port) == "web"
    assert not answers("127.0.0.1", port)
    with socket.create_server((address, other)) as server:
        server.settimeout(20)
        machine.docker("run", "-d", "--name", "asks", "busybox", "nc", address, str(other))
        server.accept()[0].close()


def test_a_port_of_all_ipv4_addresses_alone(machine: Sandbox) -> None:
    port = free_port()
    web(machine, "web", f"0.0.0.0:{port}:80")
    assert fetch("127.0.0.1", port) == "web"
    assert not answers("::1", port)


def test_ports_of_ipv6_addresses_alone(machine: Sandbox) -> None:
    one, all_ = free_port(), free_port()
    web(machine, "web", f"[::1]:{one}:80", f"[::]:{all_}:80")
    assert fetch("::1", one) == "web"
    assert fetch("::1", all_) == "web"
    assert not answers("127.0.0.1", one)
    assert not answers("127.0.0.1", all_)
    assert {each["kind"] for each in ports(machine)} == {"tunnel"}


def test_udp_of_ipv6_addresses_alone(machine: Sandbox) -> None:
    one, all_ = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_DGRAM)
    machine.docker(
        "run", "-d", "--name", "udp", "-p", f"[::1]:{one}:7/udp", "-p", f"[::]:{all_}:7/udp",
        "busybox", "sleep", "999",
    )  # fmt: skip
    run_inside(machine, "udp", ECHO)
    assert echo("::1", one, b"one") == b"one"
    assert echo("::1", all_, b"x" * 1400) == b"x" * 1400
    assert {each["kind"] for each in ports(machine)} == {"tunnel"}
    # A new agent: what the port's connection led to is gone.
    agents = machine.wherry("logs").stdout.count(b"agent ready")
    machine.cut_connection()
    wait_until(
        lambda: machine.wherry("logs").stdout.count(b"agent ready") > agents, 60, "another agent"
    )
    assert echo("::1", one, b"again") == b"again"
    machine.docker("rm", "-f", "udp")
    for port in (one, all_):
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as free:
            free.bind(("::1", port))


def test_udp_both_ways_on_both_loopbacks(machine: Sandbox) -> None:
    everywhere, here = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_DGRAM)
    machine.docker(
        "run", "-d", "--name", "udp", "-p", f"{everywhere}:7/udp", "-p", f"127.0.0.1:{here}:7/udp",
        "busybox", "sleep", "999",
    )  # fmt: skip
    run_inside(machine, "udp", ECHO)
    assert echo("127.0.0.1", everywhere, b"four") == b"four"
    assert echo("::1", everywhere, b"six") == b"six"
    assert echo("127.0.0.1", here, b"x" * 1400) == b"x" * 1400
    assert silent(own_address(), here)
    assert silent("::1", here)


@pytest.fixture
def other_ipv6() -> Iterator[str]:
    with one_more_ipv6() as address:
        yield address


def test_a_port_of_an_ipv6_address_of_this_computer(machine: Sandbox, other_ipv6: str) -> None:
    """There and nowhere else, and one of ::1 not there."""
    port, here = free_port(), free_port()
    datagrams = free_port(socket.SOCK_DGRAM)
    web(
        machine, "web", f"[{other_ipv6}]:{port}:80", f"[::1]:{here}:80",
        f"[{other_ipv6}]:{datagrams}:7/udp",
    )  # fmt: skip
    run_inside(machine, "web", ECHO)
    assert fetch(other_ipv6, port) == "web"
    assert not answers("::1", port)
    assert not answers("127.0.0.1", port)
    assert fetch("::1", here) == "web"
    assert not answers(other_ipv6, here)
    assert echo(other_ipv6, datagrams, b"x") == b"x"
    assert silent("::1", datagrams)


def test_a_client_that_never_reads_stalls_nobody_else(machine: Sandbox) -> None:
    """Neither through QEMU nor through the tunnel nor through our relay."""
    port, six = free_port(), free_port()
    web(machine, "web", f"{port}:80", f"[::1]:{six}:80")
    machine.docker("exec", "web", "sh", "-c", "head -c 50000000 /dev/zero >/www/large")
    with contextlib.ExitStack() as stack:
        for address, number in (("127.0.0.1", port), ("::1", port), ("::1", six)):
            deaf = stack.enter_context(socket.create_connection((address, number), 20))
            deaf.sendall(b"GET /large HTTP/1.0\r\n\r\n")
        for _ in range(3):
            assert fetch("127.0.0.1", port) == "web"
            assert fetch("::1", port) == "web"
            assert fetch("::1", six) == "web"


def test_ports_that_the_engine_chooses(machine: Sandbox) -> None:
    low = 21000
    machine.docker(
        "run", "-d", "--name", "web", "-p", "80", "-p", f"127.0.0.1:{low}-{low + 9}:80",
        "-p", f"{low + 20}-{low + 22}:90-92", "-p", "7/udp", "-P", "--expose", "85",
        "busybox", "sh", "-c", SERVE.format("web", 80),
    )  # fmt: skip
    said = machine.docker("port", "web").stdout.decode().split("\n")
    chosen = {line.split(" -> ")[1].rpartition(":")[2] for line in said if line.startswith("80/")}
    assert len(chosen) == 2
    for port in chosen:
        assert answers("127.0.0.1", int(port))
    for port_number in range(low + 20, low + 23):
        assert answers("127.0.0.1", port_number)
    assert f"127.0.0.1:{low}" in "".join(said)
    (exposed,) = {line.rpartition(":")[2] for line in said if line.startswith("85/")}
    assert answers("127.0.0.1", int(exposed))
    (datagrams,) = {line.rpartition(":")[2] for line in said if line.startswith("7/udp")}
    run_inside(machine, "web", ECHO)
    assert echo("127.0.0.1", int(datagrams), b"x") == b"x"


def test_the_engine_chooses_around_what_this_computer_has(machine: Sandbox) -> None:
    """As it does where it runs on this computer itself: a test's containers must not fail."""

    def chosen(name: str, port: str) -> int:
        said = machine.docker("port", name, port).stdout.decode().split("\n")[0]
        return int(said.rpartition(":")[2])

    sleep = ("busybox", "sleep", "999")
    machine.docker("run", "-d", "--name", "first", "-p", "80", *sleep)
    first, low = chosen("first", "80"), free_port()
    with (
        socket.create_server(("127.0.0.1", first + 1)),
        socket.create_server(("", first + 2)),
        socket.create_server(("127.0.0.1", low)),
    ):
        machine.docker(
            "run", "-d", "--name", "second", "-p", "80", "-p", f"{low}-{low + 9}:81", *sleep
        )
        assert chosen("second", "80") > first + 2
        assert low < chosen("second", "81") <= low + 9
        assert answers("127.0.0.1", chosen("second", "80"))


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::"])
def test_a_port_in_use_fails_the_start_and_says_who_has_it(machine: Sandbox, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as taken:
        port = taken.getsockname()[1]
        asked = "" if ":" in address else f"{address}:"
        done = machine.docker(
            "run", "-d", "--name", "web", "-p", f"{asked}{port}:80", "busybox", "sleep", "999",
            check=False,
        )  # fmt: skip
        said = done.stderr.decode()
        assert done.returncode == 125
        assert "Error response from daemon" in said
        assert "driver failed programming external connectivity on endpoint web (" in said
        assert f"{port}/tcp: address already in use" in said
        assert f"process {psutil.Process().pid})" in said
        assert state(machine, "web") == "created"
        assert ports(machine) == []
    machine.docker("start", "web")
    assert state(machine, "web") == "running"
    assert answers("127.0.0.1", port)


def test_of_two_ports_the_free_one_is_let_go_again(machine: Sandbox) -> None:
    free = free_port()
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        done = machine.docker(
            "run", "-d", "--name", "web", "-p", f"{free}:80", "-p", f"{port}:81",
            "busybox", "sleep", "999", check=False,
        )  # fmt: skip
        assert done.returncode == 125
        assert not answers("127.0.0.1", free)


def test_a_port_of_another_container_is_refused_by_the_engine(machine: Sandbox) -> None:
    port = free_port()
    web(machine, "web", f"{port}:80")
    done = machine.docker(
        "run", "-d", "--name", "two", "-p", f"{port}:80", "busybox", "sleep", "999", check=False
    )
    assert b"port is already allocated" in done.stderr
    assert fetch("127.0.0.1", port) == "web"


def test_an_address_that_this_computer_does_not_have(machine: Sandbox) -> None:
    done = machine.docker(
        "run", "-d", "--name", "web", "-p", "192.0.2.7:8080:80", "busybox", "sleep", "999",
        check=False,
    )  # fmt: skip
    assert b"cannot assign requested address" in done.stderr
    assert state(machine, "web") == "created"


def test_a_container_that_is_started_from_inside_the_guest(machine: Sandbox) -> None:
    port = free_port()
    machine.docker("create", "--name", "web", "-p", f"{port}:80", "busybox", "sleep", "999")
    assert inside(machine, "/containers/web/start") == "204"
    wait_until(lambda: answers("127.0.0.1", port), 20, "its port is open")
    inside(machine, "/containers/web/stop?t=0")
    wait_until(lambda: not answers("127.0.0.1", port), 20, "its port is closed")


def test_a_container_that_ends_or_leaves_its_network_has_no_port(machine: Sandbox) -> None:
    """Nothing that is asked of wherry waits for it."""
    ends, leaves = free_port(), free_port()
    machine.docker("run", "-d", "--name", "ends", "-p", f"{ends}:80", "busybox", "sleep", "999")
    assert answers("127.0.0.1", ends)
    process = machine.docker("inspect", "-f", "{{.State.Pid}}", "ends").stdout.decode().strip()
    machine.docker("run", "-d", "--name", "web", "-p", f"{leaves}:80", "busybox", "sleep", "999")
    assert answers("127.0.0.1", leaves)
    body = '{"Container":"web"}'
    assert inside(machine, "/networks/bridge/disconnect", body) == "200"
    wait_until(lambda: not answers("127.0.0.1", leaves), 20, "it has left its network")
    machine.wherry("shell", "--", "kill", "-9", process)
    wait_until(lambda: not answers("127.0.0.1", ends), 30, "the other one has ended")


def test_a_port_comes_and_goes_with_the_network(machine: Sandbox) -> None:
    """Before the command returns."""
    port = free_port()
    machine.docker("run", "-d", "--name", "web", "-p", f"{port}:80", "busybox", "sleep", "999")
    for _ in range(2):
        machine.docker("network", "disconnect", "bridge", "web")
        assert not answers("127.0.0.1", port)
        machine.docker("network", "connect", "bridge", "web")
        assert answers("127.0.0.1", port)


def ask_qemu(machine: Sandbox, line: str) -> str:
    """Have QEMU's human monitor do something (QMP, human-monitor-command)."""
    path = Layout(machine.home, current()).machine("default").qmp_socket
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(20)
        monitor.connect(str(path))
        stream = monitor.makefile("rwb", buffering=0)
        stream.readline()
        for command in (
            {"execute": "qmp_capabilities"},
            {"execute": "human-monitor-command", "arguments": {"command-line": line}},
        ):
            stream.write(json.dumps(command).encode() + b"\n")
            while "return" not in (answer := json.loads(stream.readline())):
                assert "error" not in answer, answer
        return str(answer["return"])


def test_what_happened_while_nobody_looked_is_found(machine: Sandbox, tmp_path: Path) -> None:
    stopped, lost = free_port(), free_port()
    web(machine, "one", f"{stopped}:80")
    web(machine, "two", f"127.0.0.1:{lost}:80")
    config = tmp_path / "config"
    config.write_bytes(machine.wherry("ssh-config").stdout)
    os.kill(machine.status()["service_pid"], signal.SIGKILL)
    stop = shlex.join(["python3", "-c", FROM_INSIDE, "/containers/one/stop?t=0", ""])
    subprocess.run(["ssh", "-F", str(config), "wherry-default", stop], check=True, timeout=60)
    assert "removed" in ask_qemu(machine, f"hostfwd_remove net0 tcp:127.0.0.1:{lost}")
    assert answers("127.0.0.1", stopped)
    assert not answers("127.0.0.1", lost)
    machine.wherry("start")
    wait_until(lambda: not answers("127.0.0.1", stopped), 30, "what was stopped is closed")
    wait_until(lambda: answers("127.0.0.1", lost), 30, "what was lost is there again")
    assert fetch("127.0.0.1", lost) == "two"


def test_a_port_that_becomes_free_is_taken_later(machine: Sandbox) -> None:
    """A start from inside cannot be refused; the port is tried again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        machine.docker(
            "create", "--name", "web", "-p", f"127.0.0.1:{port}:80", "busybox", "sleep", "999"
        )
        inside(machine, "/containers/web/start")
        (found,) = settled(machine, 1, 20)
        assert found["state"] == "failed"
        assert "address already in use" in found["reason"]
    wait_until(lambda: ports(machine)[0]["state"] == "open", 30, "it is open")


def test_what_a_container_on_the_host_s_network_listens_on(machine: Sandbox) -> None:
    everywhere, here = free_port(), free_port()
    script = f"httpd -p {everywhere}; httpd -p 127.0.0.1:{here}; sleep 999"
    machine.docker(
        "run", "-d", "--name", "host", "--network", "host", "busybox", "sh", "-c", script
    )
    found = settled(machine, 3)
    assert answers("127.0.0.1", everywhere)
    assert answers("::1", everywhere)
    assert answers("127.0.0.1", here)
    assert not answers("::1", here)
    assert {each["host_network"] for each in found} == {True}
    # Datagrams and IPv6 alone, by a program that is the container's by its cgroup.
    # Not one that the system would choose: those are of programs that ask.
    six, low = free_port(), (Forward("udp", "0.0.0.0", each) for each in range(20000, 30000))
    datagrams = next(each.port for each in low if try_bind(each) is None)
    id = machine.docker("inspect", "-f", "{{.Id}}", "host").stdout.decode().strip()
    join = f"echo 0 >/sys/fs/cgroup/docker/{id}/cgroup.procs"
    serve = f"{join}; exec timeout 100 python3 -c {shlex.quote(ECHO.replace('7', str(datagrams)))}"
    start = f"setsid sh -c {shlex.quote(serve)} </dev/null >/dev/null 2>&1 &"
    machine.wherry("shell", "--", "sh", "-c", start)
    machine.docker("exec", "host", "httpd", "-p", f"[::1]:{six}")
    settled(machine, 5)
    assert echo("127.0.0.1", datagrams, b"x") == b"x"
    assert answers("::1", six)
    assert not answers("127.0.0.1", six)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        # One that this computer has cannot be reached there, and that is all.
        port = taken.getsockname()[1]
        machine.docker("exec", "host", "httpd", "-p", str(port))
        found = settled(machine, 7)
        assert {each["state"] for each in found if each["port"] == port} == {"failed"}
        machine.docker("start", "host")
        assert state(machine, "host") == "running"
    machine.docker("rm", "-f", "host")
    assert not answers("127.0.0.1", here)


def test_compose_up_returns_when_its_ports_are_there(
    machine: Sandbox, guest_image: Image, tmp_path: Path
) -> None:
    exported = guest_image.clients / "cli-plugins" / "docker-compose"
    if exported.exists():
        plugins = machine.docker_config / "cli-plugins"
        plugins.mkdir(exist_ok=True)
        (plugins / exported.name).symlink_to(exported)
    first, second = free_port(), free_port()
    (tmp_path / "compose.yaml").write_text(
        "services:\n"
        f"  one: {{image: busybox, command: sleep 999, ports: ['{first}:80']}}\n"
        f"  two: {{image: busybox, command: sleep 999, ports: ['127.0.0.1:{second}:80']}}\n"
    )
    compose = ("compose", "-f", str(tmp_path / "compose.yaml"))
    machine.docker(*compose, "up", "-d")
    assert answers("127.0.0.1", first)
    assert answers("127.0.0.1", second)
    machine.docker(*compose, "down", "-t", "0")
    assert not answers("127.0.0.1", first)


CROWD = 1000

ECHO_TO_A_CROWD = """
import asyncio
async def serve(reader, writer):
    writer.write(await reader.read(1))
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 80, backlog=2000)
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere QEMU's queue stays at one")
def test_a_thousand_connections_at_once(machine: Sandbox) -> None:
    port = free_port()
    machine.docker("run", "-d", "--name", "crowd", "-p", f"{port}:80", "busybox", "sleep", "999")
    run_inside(machine, "crowd", ECHO_TO_A_CROWD)
    assert current().raise_descriptor_limit(2 * CROWD) > CROWD + 100

    async def one(address: str) -> bytes:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(b"x")
                return await reader.read(1)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def crowd(size: int, address: str) -> int:
        answers = await asyncio.gather(*(one(address) for _ in range(size)), return_exceptions=True)
        return answers.count(b"x")

    wait_until(lambda: asyncio.run(crowd(1, "127.0.0.1")), 60, "the server answers")
    assert asyncio.run(crowd(CROWD, "127.0.0.1")) == CROWD
    assert asyncio.run(crowd(CROWD, "::1")) == CROWD


def test_a_cut_connection_changes_no_port(machine: Sandbox) -> None:
    port = free_port()
    web(machine, "web", f"{port}:80")
    machine.cut_connection()
    assert fetch("127.0.0.1", port) == "web"
    machine.docker("rm", "-f", "web", timeout=60)
    assert not answers("127.0.0.1", port)


@pytest.mark.endurance
@pytest.mark.timeout(900)
def test_a_hundred_stops_and_starts(machine: Sandbox) -> None:
    port = free_port()
    machine.docker("create", "--name", "web", "-p", f"{port}:80", "busybox", "sleep", "999")

    def holds() -> list[int]:
        """Descriptors and threads of the service, descriptors of QEMU, the engine's proxies."""
        status = machine.status()
        service, qemu = (psutil.Process(status[name]) for name in ("service_pid", "qemu_pid"))
        proxies = machine.wherry("shell", "--", "pgrep", "-c", "docker-proxy", check=False).stdout
        return [service.num_fds(), service.num_threads(), qemu.num_fds(), int(proxies)]

    before: list[int] = []
    for number in range(100):
        if number == 10:
            before = holds()
        machine.docker("start", "web")
        assert answers("127.0.0.1", port)
        assert answers("::1", port)
        machine.docker("stop", "-t", "0", "web")
        assert not answers("127.0.0.1", port)
        assert not answers("::1", port)
    assert ports(machine) == []
    # The service's workers come and go by a few.
    assert all(now <= then + 5 for now, then in zip(holds(), before, strict=True))


def have_many_ports(machine: Sandbox, count: int, name: str) -> None:
    """Publish them, reach each by IPv4 and IPv6, and none when the container is gone.

    The engine itself takes long: it starts two proxies and some ten iptables for each port.
    """
    low, high = 22000, 22000 + count
    machine.docker(
        "run", "-d", "--name", "many", "-p", f"{low}-{high - 1}:{low}-{high - 1}",
        "busybox", "sleep", "9999", name=name, timeout=1200,
    )  # fmt: skip
    assert all(answers("127.0.0.1", port) for port in range(low, high))
    assert all(answers("::1", port) for port in range(low, high))
    machine.docker("rm", "-f", "many", name=name, timeout=600)
    assert not any(answers("127.0.0.1", port) for port in range(low, high))


@pytest.mark.timeout(900)
def test_many_ports_of_one_container(machine: Sandbox) -> None:
    have_many_ports(machine, 30, "wherry")


@pytest.mark.endurance
@pytest.mark.timeout(2400)
def test_three_hundred_ports_of_one_container(machine: Sandbox) -> None:
    """With the memory that a machine has by default: the engine's proxies need more than 2 GiB."""
    machine.wherry("start", "roomy", "--cpus", "2", "--memory", "4GiB")
    try:
        image = machine.docker("save", "busybox").stdout
        machine.docker("load", name="wherry-roomy", input=image)
        have_many_ports(machine, 300, "wherry-roomy")
    finally:
        machine.wherry("delete", "--yes", "roomy")
