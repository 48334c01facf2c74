"""Finding, starting and ending a machine's service, as far as that needs no machine."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Sequence

import pytest
from filelock import FileLock

from wherry.config.layout import Layout, MachinePaths
from wherry.core.errors import WherryError
from wherry.core.processes import spawn
from wherry.service import launch, machine, shutdown, state
from wherry.service.stages import DEFAULT_BOUNDS
from wherry.service.state import Record, State
from wherry.vm.qemu.process import identify


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_APPEAR_TIMEOUT_S", 0.1)
    monkeypatch.setattr(launch, "_EXIT_TIMEOUT_S", 0.1)


def test_without_anything_there_is_no_service(layout: Layout, paths: MachinePaths) -> None:
    assert not launch.answers(layout, paths)
    assert not launch.end_by_force(layout, paths)


def test_a_service_that_cannot_be_reached_is_not_taken_for_none(
    layout: Layout, paths: MachinePaths
) -> None:
    """Its lock tells that it lives; what it has must not be overwritten or removed."""
    record = Record(State.RUNNING)
    state.write(paths, record)
    with FileLock(paths.service_lock):
        with pytest.raises(WherryError, match=r"runs, but nothing answers at .*control\.sock"):
            launch.answers(layout, paths)
        with pytest.raises(WherryError, match=r"end the process that holds .*service\.lock"):
            launch.end_by_force(layout, paths)
    assert '"running"' in paths.state.read_text()


def test_a_killed_service_that_still_has_its_lock_is_none(
    layout: Layout, paths: MachinePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that it has not answered hears of its end before the lock is free."""
    lock = FileLock(paths.service_lock)
    lock.acquire()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(paths.control_socket))
        listener.listen()

        def die() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=die)
        thread.start()
        monkeypatch.setattr(launch.time, "sleep", lambda seconds: lock.release())
        assert not launch.answers(layout, paths)
        thread.join()


def test_a_service_that_ends_as_it_is_being_ended(
    layout: Layout, paths: MachinePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with spawn(["/bin/sleep", "60"]) as process:
        gone = identify(process.pid)
        process.kill()
    lock = FileLock(paths.service_lock)
    lock.acquire()

    def read(_: MachinePaths) -> Record:
        lock.release()
        return Record(State.RUNNING, service=gone)

    monkeypatch.setattr(state, "read", read)
    assert launch.end_by_force(layout, paths)


def programs(script: str) -> Sequence[str]:
    return [sys.executable, "-c", f"import sys; {script}"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "print('2026-11-25 10:00:00,1 ERROR wherry.service: the key is gone', file=sys.stderr)",
            "ended: the key is gone",
        ),
        ("import nonsense", "ended: ModuleNotFoundError: No module named 'nonsense'"),
        ("", "ended: it left no message"),
    ],
)
def test_a_service_that_ends_at_once_is_quoted(
    script: str,
    reason: str,
    layout: Layout,
    paths: MachinePaths,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what it said itself; the log has what others said before."""
    paths.service_log.write_text("2026-11-24 10:00:00,1 ERROR wherry: an old story\n")
    monkeypatch.setattr(launch, "_APPEAR_TIMEOUT_S", 20.0)
    monkeypatch.setattr(launch, "command", lambda name: programs(script))
    with pytest.raises(WherryError) as caught:
        launch.ensure(layout, paths)
    assert caught.value.message.endswith(reason)


def test_a_command_waits_for_another_as_long_as_an_orderly_stop_takes() -> None:
    longest = DEFAULT_BOUNDS.guest_stop_s + shutdown.STOP_ENGINE_S + 2 * shutdown.ASK_S
    assert longest < machine._LOCK_TIMEOUT_S
