"""Names in containers, and the way to the host, with the real guest and engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from greeter import GREETING, greeter
from sandbox import Sandbox, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


@pytest.fixture
def host_port() -> Iterator[int]:
    """A service on this computer's 127.0.0.1 alone."""
    with greeter("127.0.0.1") as port:
        yield port


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
        f"FROM busybox\nRUN wget -T 20 -qO /said http://host.docker.internal:{host_port}/\n"
    )
    machine.docker("build", "-q", "--no-cache", "-t", "asked", str(tmp_path))
    assert machine.docker("run", "--rm", "asked", "cat", "/said").stdout == GREETING.encode()
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
    os.kill(machine.status()["service_pid"], signal.SIGKILL)
    wait_until(lambda: not leads(), 60, "nothing leads to a server that is gone")
    machine.wherry("start")
    assert leads()
    assert fetched(machine, "host.docker.internal", host_port) == GREETING


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


def test_the_way_to_the_host_can_be_closed(machine: Sandbox, host_port: int) -> None:
    machine.wherry("config", "set", "network.host_access", "false")
    try:
        os.kill(machine.status()["service_pid"], signal.SIGKILL)
        machine.wherry("start")
        assert "refused" in fetched(machine, "host.docker.internal", host_port)
        assert "refused" in fetched(machine, "10.0.2.2", host_port, "--network", "host")
        assert not reached_by_all(machine)
        # Where it stays when the engine starts anew and puts its own rules before all others.
        rules = machine.wherry("shell", "--", "iptables", "-S", "DOCKER-USER").stdout
        assert b"-A DOCKER-USER -j WHERRY" in rules
    finally:
        machine.wherry("config", "unset", "network.host_access")
        os.kill(machine.status()["service_pid"], signal.SIGKILL)
        machine.wherry("start")
    assert fetched(machine, "host.docker.internal", host_port) == GREETING
    assert reached_by_all(machine)
