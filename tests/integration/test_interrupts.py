"""Ctrl-C while a machine starts: nothing half-made stays, whenever it comes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from fake_host import Done, FakeHost, wait_until


def interrupt(host: FakeHost, command: subprocess.Popen[bytes]) -> Done:
    """Do what a terminal does at Ctrl-C: signal the whole foreground process group."""
    os.killpg(command.pid, signal.SIGINT)
    return host.finish(command)


def assert_interrupted(done: Done) -> None:
    # A new line comes first: the terminal has just shown ^C.
    assert (done.status, done.stdout, done.stderr) == (130, "", "\nwherry: interrupted\n")


def slow_qemu_img(host: FakeHost) -> None:
    program = host.bin / "qemu-img"
    program.write_text(f'#!/bin/sh\necho >"{host.bin}/making"\nexec sleep 30\n')
    program.chmod(0o755)


Moment = tuple[dict[str, Any], Callable[[FakeHost], object]]

MOMENTS: dict[str, Moment] = {
    "trial": ({"trial": {"kvm": "hangs", "tcg": "hangs"}}, lambda host: len(host.calls()) >= 3),
    "machine": ({"monitor": "absent"}, lambda host: host.launches()),
    "boot": ({"last_line": "wherry: init"}, lambda host: host.paths.qmp_socket.exists()),
    "engine": (
        {"engine": "absent"},
        lambda host: host.paths.docker_socket.exists(),
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_first_start_leaves_no_machine(moment: str, host: FakeHost) -> None:
    behaviour, arrived = MOMENTS[moment]
    host.behave(**behaviour)
    command = host.spawn("start")
    wait_until(lambda: arrived(host), 20, moment)
    assert_interrupted(interrupt(host, command))
    host.at_rest()
    assert not host.paths.directory.exists()


@pytest.mark.parametrize("moment", ["boot", "engine"])
def test_an_interrupted_later_start_leaves_the_machine_as_it_was(
    moment: str, host: FakeHost
) -> None:
    host.make(disk="2GiB")
    before = hashlib.sha256(host.paths.data_disk.read_bytes()).digest()
    behaviour, arrived = MOMENTS[moment]
    host.behave(**behaviour)
    command = host.spawn("start")
    wait_until(lambda: arrived(host), 20, moment)
    assert_interrupted(interrupt(host, command))
    host.at_rest()
    assert host.status()["state"] == "stopped"
    assert hashlib.sha256(host.paths.data_disk.read_bytes()).digest() == before
    host.behave()
    host.good("start")


def test_an_interrupt_while_the_disk_is_made(host: FakeHost) -> None:
    slow_qemu_img(host)
    command = host.spawn("start")
    wait_until((host.bin / "making").exists, 20, "qemu-img")
    assert_interrupted(interrupt(host, command))
    host.at_rest()
    assert not host.paths.directory.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_start_that_is_asked_to_end(number: int, host: FakeHost) -> None:
    """As by timeout(1), or by a terminal that is closed; only the command hears of it."""
    slow_qemu_img(host)
    command = host.spawn("start")
    wait_until((host.bin / "making").exists, 20, "qemu-img")
    command.send_signal(number)
    assert_interrupted(host.finish(command))
    host.at_rest()
    assert not host.paths.directory.exists()
    (host.bin / "qemu-img").unlink()
    host.behave(engine="absent")
    command = host.spawn("start")
    wait_until(host.paths.docker_socket.exists, 20, "the endpoint")
    command.send_signal(number)
    assert_interrupted(host.finish(command))
    host.at_rest()
    assert not host.paths.directory.exists()


def test_a_start_that_ignores_the_end_of_its_terminal(host: FakeHost) -> None:
    host.behave(delay_s=1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = host.spawn("start")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(host.launches, 20, "QEMU")
    command.send_signal(signal.SIGHUP)
    assert host.finish(command).status == 0
    assert host.status()["state"] == "running"


def test_a_command_killed_while_the_disk_is_made(host: FakeHost) -> None:
    """What it leaves is no machine, and is gone with the next start."""
    slow_qemu_img(host)
    command = host.spawn("start")
    wait_until((host.bin / "making").exists, 20, "qemu-img")
    os.killpg(command.pid, signal.SIGKILL)
    host.finish(command)
    assert host.good("list", "--json").strip() == "[]"
    assert host.run("status").status == 3
    (host.bin / "qemu-img").unlink()
    host.good("start")
    host.good("delete", "--yes")
    host.at_rest()


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupt_at_any_moment(exists: bool, host: FakeHost) -> None:
    """From the first moment of Python to the end; each leaves all of a machine or none."""
    outcomes = set()
    for step in range(8):
        if exists and not host.paths.directory.exists():
            host.make()
        command = host.spawn("start")
        # A signal before the interpreter is up is Python's own affair.
        time.sleep(0.12 + 0.12 * step)
        done = interrupt(host, command)
        outcomes.add(done.status)
        if done.status == 0:
            assert host.status()["state"] == "running"
            host.good("stop")
        elif done.status == 1:
            # On a busy computer Python has not come to our first line yet.
            assert "KeyboardInterrupt" in done.stderr
            assert "wherry/cli" not in done.stderr
        else:
            assert done.status in (130, -signal.SIGINT), done
        host.at_rest()
        assert not exists or host.paths.directory.exists()
        if not exists and done.status == 0:
            host.good("delete", "--yes")
        elif not exists:
            assert not host.paths.directory.exists()
    assert 130 in outcomes


def test_an_interrupt_while_it_is_booted_again(host: FakeHost) -> None:
    """What the boot before had is being closed; it is closed all the same."""
    host.behave(
        last_line="wherry: ssh",
        engine="absent",
        fatal="Oops: int3: 0000 [#1]\r\nKernel panic - not syncing: Fatal exception",
        fatal_after_s=1.0,
        quit_s=0.5,
    )
    command = host.spawn("start", "--accel", "tcg")
    wait_until(lambda: "booting again" in host.service_log(), 20, "the kernel has failed")
    assert interrupt(host, command).status == 130
    host.at_rest()
    assert not host.paths.directory.exists()


def test_a_second_interrupt_changes_nothing(host: FakeHost) -> None:
    host.behave(last_line="wherry: init")
    command = host.spawn("start")
    wait_until(host.paths.qmp_socket.exists, 20, "QEMU")
    os.killpg(command.pid, signal.SIGINT)
    for _ in range(20):
        time.sleep(0.02)
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGINT)
    assert host.finish(command).status in (130, -signal.SIGINT)
    host.at_rest()
    assert not host.paths.directory.exists()


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupt_while_the_context_is_written(exists: bool, host: FakeHost) -> None:
    """The machine runs by then, so it is too late: never a context without its machine."""
    if exists:
        host.make()
    (host.directory / "docker").mkdir()
    config = host.directory / "docker/config.json"
    os.mkfifo(config)
    command = host.spawn("start", "--use")
    # Opening it waits for the reader, which is the command about to set the current context.
    with config.open("w") as writer:
        os.killpg(command.pid, signal.SIGINT)
        time.sleep(0.3)
        writer.write("{}")
    done = host.finish(command)
    assert (done.status, host.status()["state"]) == (0, "running"), done
    assert json.loads(config.read_text()) == {"currentContext": "wherry"}
    host.good("delete", "--yes")
    host.at_rest()


def test_an_interrupt_of_one_start_is_none_of_another(host: FakeHost) -> None:
    """Who waits for a machine that another started leaves it alone."""
    host.behave(delay_s=1)
    first = host.spawn("start")
    wait_until(host.launches, 20, "QEMU")
    second = host.spawn("start")
    waiting = psutil.Process(second.pid)
    wait_until(lambda: waiting.net_connections("unix"), 20, "the second one asks")
    assert interrupt(host, second).status == 130
    assert host.finish(first).status == 0
    assert host.status()["state"] == "running"


def test_an_interrupted_stop_goes_on_in_the_service(host: FakeHost) -> None:
    host.behave(deaf=True)
    host.make()
    with host.serve(guest_stop_s=1.5) as service:
        host.good("start")
        command = host.spawn("stop")
        wait_until(lambda: "state stopping" in host.service_log(), 20, "stopping")
        assert_interrupted(interrupt(host, command))
        service.wait(20)
    host.at_rest()
    assert host.status()["state"] == "stopped"
