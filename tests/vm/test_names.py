"""Names in containers, and the way to the host, with the real guest and engine."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox import Sandbox, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"from the host")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host_port() -> Iterator[int]:
    """A service on this computer's 127.0.0.1 alone."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hello) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def fetched(machine: Sandbox, name: str, port: int, *options: str) -> str:
    done = machine.docker(
        "run", "--rm", *options, "busybox", "wget", "-T", "20", "-qO-", f"http://{name}:{port}/",
        check=False,
    )  # fmt: skip
    return (done.stdout + done.stderr).decode()


def test_the_host_by_its_names(machine: Sandbox, host_port: int) -> None:
    for name in ("host.docker.internal", "gateway.docker.internal"):
        assert fetched(machine, name, host_port) == "from the host"


def test_the_host_from_a_network_of_the_user_s(machine: Sandbox, host_port: int) -> None:
    machine.docker("network", "create", "own")
    try:
        said = fetched(machine, "host.docker.internal", host_port, "--network", "own")
        assert said == "from the host"
    finally:
        machine.docker("network", "rm", "own")


def test_the_host_by_host_gateway(machine: Sandbox, host_port: int) -> None:
    said = fetched(machine, "me", host_port, "--add-host", "me:host-gateway")
    assert said == "from the host"


def test_the_host_in_a_build(machine: Sandbox, host_port: int, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM busybox\nRUN wget -T 20 -qO /said http://host.docker.internal:{host_port}/\n"
    )
    machine.docker("build", "-q", "--no-cache", "-t", "asked", str(tmp_path))
    assert machine.docker("run", "--rm", "asked", "cat", "/said").stdout == b"from the host"
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
    wait_until(leads, 60, "the new service's server is asked")
    assert fetched(machine, "host.docker.internal", host_port) == "from the host"


def test_the_way_to_the_host_can_be_closed(machine: Sandbox, host_port: int) -> None:
    machine.wherry("config", "set", "network.host_access", "false")
    try:
        os.kill(machine.status()["service_pid"], signal.SIGKILL)
        machine.wherry("start")
        wait_until(
            lambda: "refused" in fetched(machine, "host.docker.internal", host_port),
            60, "the host refuses",
        )  # fmt: skip
        assert "refused" in fetched(machine, "10.0.2.2", host_port, "--network", "host")
        # Where it stays when the engine starts anew and puts its own rules before all others.
        rules = machine.wherry("shell", "--", "iptables", "-S", "DOCKER-USER").stdout
        assert b"-A DOCKER-USER -j WHERRY" in rules
    finally:
        machine.wherry("config", "unset", "network.host_access")
        os.kill(machine.status()["service_pid"], signal.SIGKILL)
        machine.wherry("start")
    wait_until(
        lambda: fetched(machine, "host.docker.internal", host_port) == "from the host",
        60, "the host answers again",
    )  # fmt: skip
