"""IPv6 in containers, with the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from greeter import GREETING, greeter
from sandbox import Sandbox

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture
def network(machine: Sandbox) -> Iterator[str]:
    machine.docker("network", "create", "--ipv6", "six")
    yield "six"
    machine.docker("rm", "-f", "server", check=False)
    machine.docker("network", "rm", "six")


def test_containers_reach_each_other(machine: Sandbox, network: str) -> None:
    """By address and by name, on a network that was made with ``--ipv6`` alone."""
    machine.docker(
        "run", "-d", "--network", network, "--name", "server", "busybox",
        "sh", "-c", "echo well >/index.html; httpd -f -p [::]:8080",
    )  # fmt: skip
    found = json.loads(machine.docker("inspect", "server").stdout)
    address = found[0]["NetworkSettings"]["Networks"][network]["GlobalIPv6Address"]
    said = machine.docker(
        "run", "--rm", "--network", network, "busybox", "sh", "-c",
        # It may not listen yet.
        "for i in $(seq 60); do"
        f" wget -T 20 -qO- http://[{address}]:8080/ && break; sleep 0.5; done;"
        " nslookup -type=aaaa server",
    ).stdout.decode()  # fmt: skip
    assert "well" in said
    assert f"Address: {address}" in said


def test_the_way_out(machine: Sandbox, network: str) -> None:
    """QEMU's network has IPv6 as well; its address of the host is the host's ::1."""
    with greeter("::1") as port:
        done = machine.docker(
            "run", "--rm", "--network", network, "busybox",
            "wget", "-T", "20", "-qO-", f"http://[fec0::2]:{port}/",
            check=False,
        )  # fmt: skip
    assert (done.stdout, done.stderr) == (GREETING.encode(), b"")
