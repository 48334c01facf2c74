"""The engine's settings through starts of the machine; what a running one takes is tested
with registries, in ``tests/clients``."""

from __future__ import annotations

import pytest
from sandbox import Sandbox

pytestmark = [pytest.mark.vm, pytest.mark.endurance, pytest.mark.timeout(1800)]

LOOKS_AFTER_ITSELF = 'trap "echo asked >/v/said; exit" TERM; while :; do sleep 1; done'


def bridge(machine: Sandbox) -> str:
    return machine.docker("network", "inspect", "bridge").stdout.decode()


def test_settings_through_starts_of_the_machine(machine: Sandbox) -> None:
    """What waits for a start is there after it, and what the engine then refuses is not."""
    machine.docker(
        "run", "-d", "--name", "steady", "-v", "said:/v", "busybox", "sh", "-c", LOOKS_AFTER_ITSELF
    )
    try:
        set_ = machine.wherry(
            "config", "set", "engine.bip", "172.30.0.1/24", "engine.mtu", "1400",
            "engine.debug", "true",
        )  # fmt: skip
        assert b"the engine has started anew with it; containers went on" in set_.stderr.lower()
        assert b"would have to be stopped for: bip, mtu" in set_.stderr
        assert b"true" in machine.docker("info", "--format", "{{.Debug}}").stdout
        assert "172.30.0.1" not in bridge(machine)
        by_hand = """echo '{"mtu": 1234}' >/etc/docker/daemon.json"""
        machine.wherry("shell", "--", "sh", "-c", by_hand)

        machine.wherry("stop")
        started = machine.wherry("start")
        assert b"was written by hand" in started.stderr
        kept = machine.wherry("shell", "--", "cat", "/etc/docker/daemon.json.by-hand").stdout
        assert kept.strip() == b'{"mtu": 1234}'
        assert "172.30.0.1" in bridge(machine)
        width = ("run", "--rm", "busybox", "cat", "/sys/class/net/eth0/mtu")
        assert machine.docker(*width).stdout == b"1400\n"
        # The engine left its containers alone when it started anew, but not at the end.
        said = machine.docker("run", "--rm", "-v", "said:/v", "busybox", "cat", "/v/said").stdout
        assert said == b"asked\n"

        machine.wherry("stop")
        stopped = machine.wherry("config", "set", "engine.seccomp-profile", "/no/such")
        assert b"checks it at the machine's next start" in stopped.stderr
        started = machine.wherry("start")
        assert b"the engine refuses its settings" in started.stderr
        assert b"opening seccomp profile" in started.stderr
        assert "opening seccomp profile" in machine.status()["warning"]
        assert "172.30.0.1" in bridge(machine)
        machine.wherry("config", "unset", "engine.seccomp-profile")
        assert "opening seccomp profile" not in machine.status()["warning"]
    finally:
        machine.wherry("config", "unset", "engine")
        # Where it is told none, dockerd has its bridge as it was last, also after a boot.
        machine.wherry("config", "set", "engine.bip", "172.17.0.1/16")
        machine.docker("rm", "-fv", "steady")
        machine.docker("volume", "rm", "-f", "said")
    machine.wherry("restart")
    assert "172.17.0.1" in bridge(machine)
    machine.wherry("config", "unset", "engine.bip")
    assert "172.17.0.1" in bridge(machine)
