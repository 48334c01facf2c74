"""state.json: what is written, and what of it is believed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from wherry.config.layout import Layout, MachinePaths
from wherry.core.clock import Deadline
from wherry.core.processes import Child, spawn
from wherry.service import state
from wherry.service.state import Record, State
from wherry.service.status import describe
from wherry.vm.driver import ProcessIdentity
from wherry.vm.qemu.process import QemuProcess, find, identify


@pytest.fixture
def child() -> Iterator[Child]:
    process = spawn(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def gone() -> ProcessIdentity:
    """A process that has ended."""
    process = spawn(["/bin/cat"], stdin=subprocess.PIPE)
    identity = identify(process.pid)
    process.communicate()
    return identity


def test_what_is_written_is_read(paths: MachinePaths, child: Child) -> None:
    record = Record(
        State.RUNNING,
        "",
        state.ourselves(),
        identify(child.pid),
        {"version": "1", "sha256": "ab"},
        "tcg",
        "slow",
        time.time(),
    )
    state.write(paths, record)
    assert state.read(paths) == record
    assert state.uptime(record) < 10


def test_without_a_file_a_machine_is_stopped(paths: MachinePaths) -> None:
    assert state.read(paths) == Record()


def test_the_readme_lists_every_state() -> None:
    """Scripts rely on the words, so each new one is written down."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    listed = " ".join(readme.split()).partition("`state` in `wherry status --json` is ")[2]
    words = re.split(r", | or ", listed.partition(";")[0])
    assert set(words) == set(State)


@pytest.mark.parametrize("was", [State.STARTING, State.RUNNING, State.STOPPING])
def test_a_dead_service_breaks_a_machine(
    was: State, paths: MachinePaths, gone: ProcessIdentity
) -> None:
    state.write(paths, Record(was, service=gone, qemu=gone))
    found = state.read(paths)
    assert (found.state, found.service, found.qemu) == (State.BROKEN, None, None)
    assert found.reason == f"the service died while the machine was {was}"
    assert state.uptime(found) == 0


@pytest.mark.parametrize("was", [State.STOPPED, State.SUSPENDED])
def test_a_dead_service_does_not_break_one_at_rest(
    was: State, paths: MachinePaths, gone: ProcessIdentity
) -> None:
    state.write(paths, Record(was, service=gone))
    assert state.read(paths).state is was


def test_a_virtual_machine_without_its_service_is_told(
    paths: MachinePaths, child: Child, gone: ProcessIdentity
) -> None:
    state.write(paths, Record(State.RUNNING, service=gone, qemu=identify(child.pid)))
    found = state.read(paths)
    assert found.state is State.BROKEN
    assert found.reason == "the service died; the virtual machine still runs"
    assert found.qemu == identify(child.pid)


def test_a_number_that_another_program_has_now_is_not_the_service(
    paths: MachinePaths, child: Child
) -> None:
    now = identify(child.pid)
    for stale in (replace(now, started=now.started - 0.01), replace(now, boot="another boot")):
        assert find(stale) is None
    state.write(paths, Record(State.RUNNING, service=stale, qemu=stale))
    found = state.read(paths)
    assert (found.state, found.service, found.qemu) == (State.BROKEN, None, None)
    assert find(now) is not None


def test_ending_what_has_just_ended_is_no_error(gone: ProcessIdentity, tmp_path: Path) -> None:
    QemuProcess(gone, None, tmp_path / "log").kill()


def test_a_zombie_is_not_running() -> None:
    process = spawn(["/bin/cat"], stdin=subprocess.PIPE)
    identity = identify(process.pid)
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert find(identity) is None
    adopted = QemuProcess.__new__(QemuProcess)
    adopted._child, adopted.identity = None, identity
    assert not adopted.alive
    process.wait()


ONLY_THE_FIRST_THREAD_ENDS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall({number}, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS ends threads together")
def test_a_process_runs_while_any_of_its_threads_does() -> None:
    """What it holds, such as the machine's lock, is free when its last thread has ended."""
    number = {"x86_64": 60, "aarch64": 93}[os.uname().machine]  # exit, of one thread: _exit(2)
    process = spawn(
        [sys.executable, "-c", ONLY_THE_FIRST_THREAD_ENDS.format(number=number)],
        stdin=subprocess.PIPE,
    )
    identity = identify(process.pid)
    deadline = Deadline(10)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert not deadline.passed
        time.sleep(0.01)
    assert find(identity) is not None
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert find(identity) is None
    process.wait()


def test_an_adopted_process_is_killed_though_nobody_reaps_it(
    paths: MachinePaths, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wherry.vm.qemu.process._POLL_S", 0.01)
    adopted = QemuProcess.adopt(identify(child.pid), paths.qemu_log)
    adopted.kill()  # our child, but not known to be: it stays a zombie meanwhile
    assert not adopted.alive
    adopted.kill()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"state": "dancing"}',
        json.dumps({"state": "running", "reason": "", "service": 5}),
        "\ufffd",
    ],
)
def test_a_damaged_file_means_broken(damage: str, paths: MachinePaths) -> None:
    paths.state.write_text(damage)
    found = state.read(paths)
    assert found.state is State.BROKEN
    assert "cannot be read" in found.reason


@pytest.mark.parametrize("pid", [-1, 0, 1 << 40, 1 << 80])
def test_numbers_that_no_process_has(pid: int, paths: MachinePaths) -> None:
    state.write(paths, Record(State.RUNNING, service=ProcessIdentity(pid, 1.0, "boot")))
    assert state.read(paths).state is State.BROKEN


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN"])
def test_numbers_that_are_none(number: str, paths: MachinePaths) -> None:
    state.write(paths, Record(State.RUNNING, service=ProcessIdentity(111, 1.0, "boot")))
    paths.state.write_text(paths.state.read_text().replace("111", number))
    assert state.read(paths).state is State.BROKEN


def test_an_orphan_is_found_by_its_monitor_and_nothing_else_is(paths: MachinePaths) -> None:
    sleeper = "import sys; sys.stdin.read()"
    socket = f"unix:{paths.qmp_socket},server=on,wait=off"
    other = paths.qmp_socket.with_name("other.sock")

    def run(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", sleeper, *words], stdin=subprocess.PIPE)

    bystanders = [
        run(f"a shell that mentions -qmp {socket}"),
        run("-x", socket),
        run("-qmp", f"unix:{other},server=on,wait=off"),
    ]
    try:
        assert state.find_orphan(paths) is None
        with run("-name", "wherry-default", "-qmp", socket) as orphan:
            assert state.find_orphan(paths) == identify(orphan.pid)
            orphan.communicate()
        assert state.find_orphan(paths) is None
    finally:
        for each in bystanders:
            each.communicate()


def test_an_orphans_commas_are_doubled(layout: Layout) -> None:
    paths = Layout(layout.home / "a,b", layout.platform).machine("default")
    socket = f"unix:{str(paths.qmp_socket).replace(',', ',,')},server=on,wait=off"
    words = [sys.executable, "-c", "import sys; sys.stdin.read()", "-qmp", socket]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as orphan:
        found = state.find_orphan(paths)
        assert found is not None
        assert found.pid == orphan.pid
        orphan.communicate()


def test_status_has_what_scripts_rely_on(
    layout: Layout, paths: MachinePaths, make_image: Any
) -> None:
    make_image("7")
    fields = describe(layout, paths)
    assert set(fields) >= {
        "name", "state", "docker_host", "docker_context", "accelerator", "cpus",
        "memory_bytes", "image", "engine_version", "service_pid", "qemu_pid", "uptime_s",
        "idle_s",
    }  # fmt: skip
    assert (fields["name"], fields["state"]) == ("default", "stopped")
    assert fields["docker_host"] == f"unix://{paths.docker_socket}"
    assert (fields["cpus"], fields["memory_bytes"]) == (4, 4 << 30)
    assert fields["image"]["version"] == "7"
    json.dumps(fields)


def test_status_of_a_machine_that_cannot_be_understood(layout: Layout, paths: MachinePaths) -> None:
    paths.config.write_text("cpus = many")
    fields = describe(layout, paths)
    assert fields["cpus"] is None
    assert f"{paths.config}:1" in fields["reason"]
