"""Files, other programs, the crossing between threads and the loop, deadlines, errors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wherry.core import bridge, files, processes
from wherry.core.clock import Deadline
from wherry.core.errors import NoSuchMachine, NotRunning, StageError, UsageError, WherryError

LARGEST_BYTES = 4096


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond ``LARGEST_BYTES``, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_BYTES, before[1]))
    try:
        yield
    finally:
        # At once: the report of the tests may be a file as well.
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files.write_atomic(path, b"three", mode=0o644)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        files.write_atomic(path, b"x" * (2 * LARGEST_BYTES))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_and_what_another_writes_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, str(path)]) as writer:
        while not (left := [each for each in tmp_path.iterdir() if each != path]):
            time.sleep(0.01)
        files.write_atomic(path, b"ours")
        assert left[0].exists()
        writer.kill()
    files.write_atomic(path, b"ours again")
    assert list(tmp_path.iterdir()) == [path]


WRITES_FOR_EVER = """
import os, sys, time
from pathlib import Path
from wherry.core import files
os.fsync = lambda descriptor: time.sleep(60)
files.write_atomic(Path(sys.argv[1]), b"half")
"""


def test_what_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_atomic(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "absent" / "file", b"new")


def test_sha256_tells_how_far_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 << 20))
    steps: list[int] = []
    digest = files.sha256(path, progress=steps.append)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(steps) == 3 << 20
    assert len(steps) > 1


def test_a_program_gets_its_input_and_variables() -> None:
    done = processes.run(
        ["/bin/sh", "-c", 'cat; echo "$WORD $HOME"'],
        timeout_s=10,
        input=b"in ",
        env={"WORD": "word"},
    )
    assert done.stdout == f"in word {os.environ['HOME']}\n".encode()


def test_a_failure_carries_the_last_lines() -> None:
    script = "for i in 1 2 3 4 5 6 7; do echo line $i >&2; done; exit 3"
    with pytest.raises(WherryError) as caught:
        processes.run(["/bin/sh", "-c", script], timeout_s=10, hint="mend it")
    assert caught.value.message == (
        "/bin/sh failed with status 3: line 3 / line 4 / line 5 / line 6 / line 7"
    )
    assert caught.value.hint == "mend it"
    with pytest.raises(WherryError, match="it printed no reason"):
        processes.run(["/bin/false"], timeout_s=10)
    assert processes.run(["/bin/false"], timeout_s=10, check=False).returncode == 1


def test_no_shell_reads_the_arguments() -> None:
    argument = "$HOME; `id` 'x\" *"
    done = processes.run(["/bin/echo", argument], timeout_s=10)
    assert done.stdout.decode() == argument + "\n"


def test_programs_that_cannot_run_are_explained(tmp_path: Path) -> None:
    no_program = tmp_path / "empty"
    no_program.touch(mode=0o755)
    not_executable = tmp_path / "data"
    not_executable.touch(mode=0o644)
    cases = {
        tmp_path / "absent": "is not installed or not on PATH",
        no_program: "cannot be executed: Exec format error",
        not_executable: "cannot be executed: Permission denied",
        not_executable / "below": "cannot be executed: Not a directory",
    }
    for path, said in cases.items():
        with pytest.raises(WherryError, match=said):
            processes.run([path], timeout_s=10)
        with pytest.raises(WherryError, match=said):
            processes.spawn([path])


def test_a_program_that_hangs_is_ended_with_its_bound() -> None:
    # The grandchild holds the pipes: it must not prolong the wait.
    with pytest.raises(WherryError, match=r"did not finish within 0\.1 s"):
        processes.run(["/bin/sh", "-c", "sleep 5 & sleep 5"], timeout_s=0.1)


def test_a_session_of_its_own_is_out_of_reach_of_our_ctrl_c() -> None:
    child = processes.spawn(["/bin/sleep", "60"], new_session=True)
    try:
        assert os.getsid(child.pid) == child.pid
    finally:
        child.kill()
        child.wait()


def test_in_thread_returns_and_raises() -> None:
    async def work() -> None:
        assert await bridge.in_thread(lambda: threading.current_thread().name, name="it") == "it"
        with pytest.raises(KeyError):
            await bridge.in_thread(lambda: {}["absent"], name="it")

    asyncio.run(work())


def test_a_cancelled_wait_leaves_the_thread_to_end_alone() -> None:
    go_on, ended = threading.Event(), threading.Event()

    def blocking() -> None:
        go_on.wait(10)
        ended.set()
        raise ValueError("nobody waits for this")

    async def work() -> None:
        task = asyncio.create_task(bridge.in_thread(blocking, name="it"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    go_on.set()
    assert ended.wait(10)
    for thread in threading.enumerate():
        if thread.name == "it":
            thread.join(10)


def test_post_reaches_the_loop_and_not_a_closed_one() -> None:
    async def work() -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[str] = loop.create_future()
        threading.Thread(target=bridge.post, args=(loop, arrived.set_result, "here")).start()
        assert await asyncio.wait_for(arrived, 10) == "here"
        return loop

    closed = asyncio.run(work())
    bridge.post(closed, lambda: None)


def test_call_waits_for_the_loop_within_its_bound() -> None:
    cancelled = threading.Event()

    async def answer() -> int:
        return 7

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        seven = await bridge.in_thread(
            lambda: bridge.call(loop, answer(), timeout_s=10), name="caller"
        )
        assert seven == 7
        with pytest.raises(TimeoutError):
            await bridge.in_thread(lambda: bridge.call(loop, never(), timeout_s=0.1), name="caller")
        assert await bridge.in_thread(lambda: cancelled.wait(10), name="cancelled")

    asyncio.run(work())


def test_a_deadline_by_a_clock_that_stands_still() -> None:
    now = 100.0
    deadline = Deadline(5, now=lambda: now)
    assert (deadline.elapsed, deadline.remaining, deadline.passed) == (0, 5, False)
    now = 104.0
    assert (deadline.elapsed, deadline.remaining, deadline.passed) == (4, 1, False)
    now = 105.0
    assert (deadline.remaining, deadline.passed) == (0, True)
    now = 200.0
    assert (deadline.remaining, deadline.passed) == (0, True)


def test_errors_are_one_line_with_the_next_step() -> None:
    assert str(WherryError("it failed", hint="do this")) == "it failed; do this"
    assert str(WherryError("it failed")) == "it failed"
    stage = StageError("boot", "nothing within 5 s", hint="look")
    assert (stage.stage, str(stage)) == ("boot", "boot: nothing within 5 s; look")
    statuses = [each.exit_status for each in (WherryError, UsageError, NoSuchMachine, NotRunning)]
    assert statuses == [1, 2, 3, 4]
