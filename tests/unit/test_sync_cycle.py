"""Whole rounds between two real directories: conflicts, halts, crashes, losses of power."""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sync_pair import Crash, Oldest, Pair, scratch
from sync_trees import read, write

from wherry.sync.core import cycle
from wherry.sync.core.cycle import Outcome
from wherry.sync.core.plan import ALONG_BYTES
from wherry.sync.core.reconcile import GUEST, HOST, Problem
from wherry.sync.core.rules import parse
from wherry.sync.core.safety import Halt
from wherry_sync import kernel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="directory descriptors")


@pytest.fixture
def place() -> Iterator[Path]:
    found = scratch()
    yield found
    shutil.rmtree(found)


@pytest.fixture
def pair(place: Path) -> Iterator[Pair]:
    found = Pair(place / "pair")
    yield found
    found.close()


def synchronised(pair: Pair, value: dict[str, object]) -> None:
    """Have a tree on both sides, and on both disks."""
    write(pair.host, value)
    pair.settle()
    assert pair.trees() == (value, value)
    for side in (HOST, GUEST):
        pair.flush(side)


def save(path: Path, text: str) -> None:
    """Save a file as careful editors do."""
    new = path.with_name(".wherry-new")
    new.write_text(text)
    new.rename(path)


@pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")
def test_a_save_in_place_is_one_in_the_guest_too(pair: Pair) -> None:
    files = {str(number): "1" for number in range(33)}
    synchronised(pair, {"f": "1", "g": "1", **files})

    def inodes() -> list[int]:
        return [(pair.guest / name).stat().st_ino for name in ("f", "g")]

    before = inodes()
    for number in range(3):
        (pair.host / "f").write_text(f"saved {number}")
        save(pair.host / "g", f"saved {number}")
        pair.settle()
        after = inodes()
        assert after[0] == before[0]
        assert after[1] != before[1]
        before = after
    # One that comes to nothing at first, as the guest's changes at that moment.
    (pair.host / "f").write_text("saved, but")

    def action(point: str) -> None:
        if point == "in place":
            (pair.guest / "f").write_text("in the container")

    pair.fuse.action = action
    assert pair.run().requeue == {"f"}
    pair.fuse.action = None
    pair.settle()
    assert (inodes()[0], (pair.guest / "f").read_text()) == (before[0], "saved, but")
    assert pair.saved() == {"in the container"}
    # One that is executed may not be open for writing.
    (pair.host / "f").chmod(0o755)
    pair.settle()
    (pair.host / "f").write_text("a program")
    pair.settle()
    assert inodes()[0] != before[0]
    # Nor is anybody kept waiting while much is read and written.
    for size in (ALONG_BYTES + 1, 10):
        held = (pair.guest / "g").stat().st_ino
        (pair.host / "g").write_text("x" * size)
        pair.settle()
        assert (pair.guest / "g").stat().st_ino != held
    # A program's work: the fast way.
    held = (pair.guest / "0").stat().st_ino
    for name in files:
        (pair.host / name).write_text("formatted")
    pair.settle()
    assert (pair.guest / "0").stat().st_ino != held
    # In the guest only: who works on the host may have the file open.
    held = (pair.host / "f").stat().st_ino
    (pair.guest / "f").write_text("in the container")
    pair.settle()
    assert (pair.host / "f").stat().st_ino != held
    assert pair.trees()[0] == pair.trees()[1]


@pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")
@pytest.mark.parametrize("point", ["written in place", "truncated"])
@pytest.mark.parametrize("kept", ["by the container", None])
def test_a_host_save_survives_what_a_container_does_while_it_is_written_in_place(
    pair: Pair, point: str, kept: str | None
) -> None:
    """The container cannot have seen it."""
    synchronised(pair, {"f": "1", "g": "1"})
    (pair.host / "f").write_text("saved in place")

    def action(now: str) -> None:
        if now == point:
            pair.fuse.action = None
            if kept is None:
                (pair.guest / "f").unlink()
            else:
                save(pair.guest / "f", kept)

    pair.fuse.action = action
    assert pair.run().requeue == {"f"}
    assert pair.fuse.action is None
    pair.settle()
    assert pair.trees() == ({"f": "saved in place", "g": "1"},) * 2
    assert pair.saved() == ({kept} if kept else set())


def test_both_sides_become_equal_and_idle_rounds_do_nothing(pair: Pair) -> None:
    write(pair.host, {"a": "1*", "d": {"l": "->../a", "empty": {}}})
    write(pair.guest, {"b": "2", "d": {"x": "3"}})
    pair.settle()
    wanted = {"a": "1*", "b": "2", "d": {"l": "->../a", "empty": {}, "x": "3"}}
    assert pair.trees() == (wanted, wanted)
    pair.fuse.points.clear()
    outcome = pair.run()
    assert (outcome.changed, pair.fuse.points) == (False, [])
    pair.restart()
    pair.settle()
    assert "transfer" not in pair.fuse.points


def test_12_equal_trees_are_not_transferred(pair: Pair) -> None:
    for root in (pair.host, pair.guest):
        write(root, {"a": "1", "d": {"b": "2"}})
    pair.settle()
    assert "transfer" not in pair.fuse.points
    assert "operation" not in pair.fuse.points


def test_a_renamed_file_is_not_transferred(pair: Pair) -> None:
    synchronised(pair, {"d": {"big": "1"}})
    (pair.host / "d").rename(pair.host / "e")
    reads: list[str] = []
    original = pair.ends[HOST].read
    pair.ends[HOST].read = lambda path: reads.append(path) or original(path)  # type: ignore
    pair.settle()
    assert pair.trees()[1] == {"e": {"big": "1"}}
    assert reads == []


def test_6_in_a_conflict_the_hosts_stays_and_the_guests_is_kept(pair: Pair) -> None:
    synchronised(pair, {"f": "1", "g": "1"})
    write(pair.host, {"f": "host", "g": "both"})
    write(pair.guest, {"f": "guest", "g": "both"})
    assert pair.settle().conflicts == ["f"]
    assert pair.trees() == ({"f": "host", "g": "both"},) * 2
    assert [(kept.path, b"".join(pair.conflicts.open(kept))) for kept in pair.conflicts] == [
        ("f", b"guest")
    ]


def test_25_what_a_container_writes_does_not_leave_the_hosts_directory(pair: Pair) -> None:
    """By a hard link out of it: a package manager's store, or a snapshot."""
    synchronised(pair, {"f": "1", "log": "1"})
    for name in ("f", "log"):
        (pair.directory / name).hardlink_to(pair.host / name)
    save(pair.guest / "f", "by the container")
    with (pair.guest / "log").open("a") as log:
        log.write(" and more")
    pair.settle()
    assert pair.trees() == ({"f": "by the container", "log": "1 and more"},) * 2
    assert [(pair.directory / name).read_text() for name in ("f", "log")] == ["1", "1"]
    # In the guest they stay one file.
    (pair.guest / "b").hardlink_to(pair.guest / "f")
    pair.settle()
    save(pair.host / "f", "by the host")
    pair.settle()
    assert pair.trees()[0] == pair.trees()[1]
    assert (pair.guest / "b").read_text() == "by the host"


def test_14_a_husk_stays_and_does_not_come_back(place: Path) -> None:
    pair = Pair(place / "pair", ignore=parse(["node_modules"]))
    synchronised(pair, {"app": {"index.js": "1"}})
    write(pair.guest / "app", {"node_modules": {"dep": "1"}})
    shutil.rmtree(pair.host / "app")
    pair.settle()
    assert pair.trees() == ({}, {"app": {"node_modules": {"dep": "1"}}})
    shutil.rmtree(pair.guest / "app")
    pair.settle()
    pair.close()


def test_51_what_a_container_deletes_goes_to_the_hosts_trash(pair: Pair) -> None:
    synchronised(pair, {"a": "1", "d": {"b": "2"}})
    shutil.rmtree(pair.guest / "d")
    (pair.guest / "a").unlink()
    pair.settle()
    assert pair.trees() == ({}, {})
    assert {kept.path: b"".join(pair.trash.open(kept)) for kept in pair.trash} == {
        "a": b"1",
        "d/b": b"2",
    }


@pytest.mark.parametrize("taken", [False, True])
def test_what_cannot_go_to_the_trash_is_not_deleted(pair: Pair, taken: bool) -> None:
    synchronised(pair, {"a": "1", "b": "2"})
    shutil.rmtree(pair.directory / "trash")
    (pair.guest / "a").unlink()

    def action(point: str) -> None:
        if point == "displaced":
            (pair.host / "a").write_text("new")

    pair.fuse.action = action if taken else None
    outcome = pair.run()
    pair.fuse.action = None
    assert [(each.path, each.lacking) for each in outcome.failed] == [("a", (HOST,))]
    assert read(pair.host) == {"a": "new" if taken else "1", "b": "2"}
    (pair.directory / "trash").mkdir()
    pair.settle()
    if taken:
        assert pair.trees() == ({"a": "new", "b": "2"}, {"a": "new", "b": "2"})
    else:
        assert pair.trees() == ({"b": "2"}, {"b": "2"})
    # In the one or the other.
    assert pair.saved() == {"1"}


def test_what_the_host_deletes_is_gone(pair: Pair) -> None:
    synchronised(pair, {"a": "1", "b": "2"})
    (pair.host / "a").unlink()
    pair.settle()
    assert pair.trees()[1] == {"b": "2"}
    assert not list(pair.trash)


def empty(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("side", "accident", "halt"),
    [
        (HOST, shutil.rmtree, Halt.VANISHED),
        (GUEST, shutil.rmtree, Halt.VANISHED),
        (HOST, empty, Halt.EMPTIED),
        (HOST, lambda root: (shutil.rmtree(root), root.write_text("")), Halt.KIND),
    ],
)
def test_48_a_root_that_is_gone_halts_and_deletes_nothing(
    pair: Pair, side: int, accident: Callable[[Path], object], halt: Halt
) -> None:
    synchronised(pair, {"a": "1", "b": "2"})
    root, other = (pair.host, pair.guest) if side == HOST else (pair.guest, pair.host)
    accident(root)
    for _ in range(2):
        assert pair.run().halt == (side, halt)
        pair.restart()
    assert read(other) == {"a": "1", "b": "2"}
    # It was only away for a while.
    if root.exists():
        root.unlink() if root.is_file() else root.rmdir()
    write(root, {"a": "1", "b": "2", "c": "3"})
    pair.settle()
    assert read(other) == {"a": "1", "b": "2", "c": "3"}


@pytest.mark.parametrize("stopped", [False, True])
def test_48_another_directory_in_the_place_of_a_root(
    pair: Pair, place: Path, stopped: bool
) -> None:
    """Not an edit if nothing of what was in it is there; not even if that was one file."""
    synchronised(pair, {"a": "1"})
    if stopped:
        pair.restart()
    pair.host.rename(place / "moved")
    write(pair.host, {})
    assert pair.run().halt == (HOST, Halt.REPLACED)
    write(pair.host, {"b": "2", "c": "3"})
    for _ in range(2):
        assert pair.run().halt == (HOST, Halt.REPLACED)
        pair.restart()
    assert read(pair.guest) == {"a": "1"}
    # It becomes one that is like it, as a new clone is; that is the root from now on.
    write(pair.host, {"a": "4"})
    pair.settle()
    assert read(pair.guest) == {"a": "4", "b": "2", "c": "3"}
    empty(pair.host)
    write(pair.host, {"d": "5"})
    pair.settle()
    assert read(pair.guest) == {"d": "5"}
    pair.restart()
    shutil.rmtree(pair.host)
    (place / "moved").rename(pair.host)
    assert pair.run().halt == (HOST, Halt.REPLACED)


def test_48_that_the_only_child_is_gone_is_an_edit(pair: Pair) -> None:
    """Which takes nothing from who changed something there."""
    synchronised(pair, {"d": {"a": "1", "b": "2"}})
    shutil.rmtree(pair.host / "d")
    (pair.guest / "d" / "b").write_text("3")
    pair.settle()
    assert pair.trees() == ({"d": {"b": "3"}}, {"d": {"b": "3"}})


def test_another_device_halts(pair: Pair) -> None:
    synchronised(pair, {"a": "1"})
    pair.store.meet(("host-1", "guest-1"), (1, pair.guest.stat().st_dev), {})
    assert pair.run().halt == (HOST, Halt.DEVICE)


def test_a_device_may_have_another_number_in_another_boot(pair: Pair) -> None:
    synchronised(pair, {"a": "1", "b": "2"})
    pair.store.meet(("host-1", "guest-1"), (1, 1), {})
    pair.boots = ["host-2", "guest-2"]
    pair.restart()
    (pair.host / "b").unlink()
    pair.settle()
    assert read(pair.guest) == {"a": "1"}


def test_a_single_file_is_a_root_too(place: Path) -> None:
    (place / "pair").mkdir()
    pair = Pair(place / "pair", file=True)
    pair.host.write_text("1")
    pair.guest.write_text("1")
    pair.settle()
    held = pair.guest.stat().st_ino
    # An editor's atomic save on the host.
    (place / "new").write_text("2")
    (place / "new").rename(pair.host)
    pair.settle()
    assert (pair.guest.read_text(), pair.guest.stat().st_ino) == ("2", held)
    pair.guest.write_text("3")
    held = pair.host.stat().st_ino
    pair.settle()
    assert (pair.host.read_text(), pair.host.stat().st_ino) == ("3", held)
    pair.host.write_text("4")
    pair.guest.write_text("5")
    pair.settle()
    assert (pair.host.read_text(), pair.guest.read_text()) == ("4", "4")
    assert pair.saved() == {"5"}
    pair.host.unlink()
    assert pair.run().halt == (HOST, Halt.VANISHED)
    pair.close()


def test_what_is_rescued_ends_with_the_conflicts(pair: Pair) -> None:
    synchronised(pair, {"f": "1"})
    save(pair.host / "f", "2")

    def action(point: str) -> None:
        if point == "exchange":
            (pair.guest / "f").write_text("first")
        elif point == "exchanged":
            (pair.guest / "f").write_text("second")

    pair.fuse.action = action
    pair.run()
    pair.fuse.action = None
    pair.settle()
    assert pair.trees() == ({"f": "2"}, {"f": "2"})
    assert pair.saved() == {"first", "second"}
    assert not pair.ends[GUEST].rescued()


def test_rounds_go_on_while_a_disk_is_written(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do meanwhile is not on it when that is done."""
    release = threading.Event()
    monkeypatch.setattr(kernel, "flush", lambda fd: release.wait(10))
    assert not any(end.flushed() for end in pair.ends)
    write(pair.host, {"f": "1", "g": "1"})
    pair.settle()
    pair.cycle.begin_flush()
    save(pair.host / "f", "2")
    save(pair.host / "h", "1")
    pair.settle()
    assert pair.trees()[1] == {"f": "2", "g": "1", "h": "1"}
    assert not pair.cycle.flushed()
    assert {"f", "g", "h"} <= pair.store.pending(GUEST).keys()
    release.set()
    while not pair.cycle.flushed():
        time.sleep(0.001)
    for side in (HOST, GUEST):
        assert pair.store.pending(side).keys() == {"f", "h"}


@pytest.mark.parametrize("side", [HOST, GUEST])
@pytest.mark.parametrize("back", [False, True])
def test_what_is_on_the_disk_when_rounds_have_gone_on(pair: Pair, side: int, back: bool) -> None:
    """The side that loses power has what was there when the flush began, and that is no edit."""
    roots = (pair.host, pair.guest)
    synchronised(pair, {"f": "1"})
    (roots[1 - side] / "f").write_text("22")
    pair.settle()
    pair.cycle.begin_flush()
    pair.on_disk[side] = pair.image(side)
    (roots[1 - side] / "f").write_text("333")
    pair.settle()
    while not pair.cycle.flushed():
        time.sleep(0.001)
    if back:
        # But this is one.
        (roots[side] / "f").write_text("1")
        pair.on_disk[side] = pair.image(side)
    pair.lose_power(Oldest(), side)
    pair.settle()
    # In the guest it is not trusted, as it may be what a loss of power has left of something.
    value = "1" if back and side == HOST else "333"
    assert pair.trees() == ({"f": value}, {"f": value})
    assert {"1", "333"} <= {value, *pair.saved()} or not back
    assert "22" not in pair.saved()


def test_flushes_do_not_pile_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    running: list[int] = []

    def flush(fd: int) -> None:
        running.append(fd)
        release.wait(10)

    monkeypatch.setattr(kernel, "flush", flush)
    before = set(threading.enumerate())
    pair.ends[HOST].begin_flush()
    while not running:
        time.sleep(0.001)
    for _ in range(4):
        pair.ends[HOST].begin_flush()
    assert len(set(threading.enumerate()) - before) == 1
    release.set()
    while not pair.ends[HOST].flushed():
        time.sleep(0.001)
    # What came since the first one began has one of its own.
    assert len(running) == 2
    pair.ends[HOST].begin_flush()
    while not pair.ends[HOST].flushed():
        time.sleep(0.001)
    assert len(running) == 3


def test_a_flush_that_came_to_nothing_is_not_done(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise MemoryError

    monkeypatch.setattr(kernel, "flush", fail)
    pair.ends[HOST].begin_flush()
    with pytest.raises(OSError, match="cannot be flushed: MemoryError"):
        any(iter(pair.ends[HOST].flushed, True))
    assert not pair.ends[HOST].flushed()
    monkeypatch.undo()
    pair.ends[HOST].begin_flush()
    while not pair.ends[HOST].flushed():
        time.sleep(0.001)


def test_a_disk_that_fails_is_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError("the disk failed")

    monkeypatch.setattr(kernel, "flush", fail)
    write(pair.host, {"f": "1"})
    pair.settle()
    pair.cycle.begin_flush()
    with pytest.raises(OSError, match="the disk failed"):
        any(iter(pair.cycle.flushed, True))
    assert "f" in pair.store.pending(GUEST)


def test_one_path_that_fails_holds_up_no_other(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    write(pair.host, {"bad": {}, "ok": "1"})
    original = kernel.rename_exclusive

    def rename(old_fd: int, old: str, new_fd: int, new: str) -> bool:
        if new == "bad":
            raise PermissionError(13, "Permission denied")
        return original(old_fd, old, new_fd, new)

    monkeypatch.setattr(kernel, "rename_exclusive", rename)
    outcome = pair.run()
    assert [(problem.path, problem.reason) for problem in outcome.failed] == [
        ("bad", "permission denied")
    ]
    assert pair.trees()[1] == {"ok": "1"}
    monkeypatch.undo()
    pair.settle()
    assert pair.trees()[1] == {"ok": "1", "bad": {}}


def test_where_the_host_shall_have_nothing_it_lacks_nothing(pair: Pair) -> None:
    pair.cycle.writes = False
    synchronised(pair, {"f": "1", "g": "1"})
    save(pair.guest / "f", "2")
    (pair.guest / os.fsdecode(b"r\xe9sultat")).write_text("r")
    outcome = pair.run()
    assert sorted(problem.path for problem in outcome.unequal) == ["f", "r\\udce9sultat"]
    assert {problem.lacking for problem in outcome.unequal} == {()}


@pytest.mark.parametrize("writes", [False, True])
def test_what_the_host_changes_comes_to_what_the_guest_has_changed_for_itself(
    pair: Pair, writes: bool
) -> None:
    """Contents and executable bit are apart; neither of the guest's own ever travels."""
    pair.cycle.writes = False
    synchronised(pair, {"f": "1", "g": "1"})
    (pair.guest / "f").chmod(0o755)
    save(pair.guest / "g", "guest")
    pair.run()
    for text, bit in (("2", "*"), ("3", "")):
        save(pair.host / "f", text)
        (pair.host / "g").chmod(0o755 if bit else 0o644)
        for _ in range(2):
            outcome = pair.run()
            assert [(each.path, each.lacking) for each in outcome.unequal] == [("f", ()), ("g", ())]
            # A star is for what can be executed.
            assert pair.trees() == (
                {"f": text, "g": f"1{bit}"},
                {"f": f"{text}*", "g": f"guest{bit}"},
            )
    assert outcome.quiescent
    pair.restart()
    pair.cycle.writes = pair.cycle.first = writes
    pair.settle()
    assert pair.trees() == ({"f": "3", "g": "1"}, {"f": "3*", "g": "guest"})
    assert pair.saved() == set()


def test_what_is_written_over_in_the_guest_is_not_lacked_and_what_was_refused_is() -> None:
    outcome = Outcome()
    outcome.put_off("busy", HOST, GUEST)
    outcome.put_off("refused", HOST)
    outcome.failed.append(Problem("refused", "permission denied", (HOST,)))
    outcome.problems.append(Problem("torn", "it is being written", (HOST, GUEST)))
    outcome.problems.append(Problem("unread", "permission denied", (HOST, GUEST)))
    outcome.requeue.add("torn")
    outcome.stuck.add("torn")
    assert [each.path for each in outcome.lacked_by(HOST)] == ["refused", "unread"]
    assert [each.path for each in outcome.lacked_by(GUEST)] == ["busy", "torn", "unread"]
    # What moved in this round and not in all since somebody asked came after that.
    outcome.stuck &= {"torn"}
    assert [each.path for each in outcome.lacked_by(GUEST)] == ["torn", "unread"]


def test_a_conflict_that_comes_to_nothing_at_first_is_kept_once(pair: Pair) -> None:
    synchronised(pair, {"f": "1"})
    save(pair.host / "f", "2")
    save(pair.guest / "f", "3")

    def action(point: str) -> None:
        if point == "saved":
            raise OSError("the connection was cut")

    pair.fuse.action = action
    for _ in range(2):
        with pytest.raises(OSError, match="cut"):
            pair.run()
    pair.fuse.action = None
    pair.settle()
    assert [kept.number for kept in pair.conflicts] == [1]
    # The same once more is another one, for whoever waits then.
    save(pair.host / "f", "4")
    save(pair.guest / "f", "3")
    pair.settle()
    assert [kept.number for kept in pair.conflicts] == [2]


@pytest.mark.parametrize("points", [("begun",), ("saved",)])
def test_a_log_that_the_host_has_emptied_and_a_container_goes_on_with(
    pair: Pair, points: tuple[str, ...]
) -> None:
    """It fails no command, and leaves nothing with each try; when it rests, all of it is kept."""
    synchronised(pair, {"log": "begin\n", "other": "1"})
    save(pair.host / "log", "")
    (pair.guest / "log").write_text("begin\nmore\n")

    def action(point: str) -> None:
        if point in points:
            with (pair.guest / "log").open("a") as log:
                log.write("and more\n")

    pair.fuse.action = action
    for _ in range(5):
        outcome = pair.run()
        assert outcome.requeue == {"log"}
        assert [*outcome.lacked_by(GUEST), *outcome.lacked_by(HOST)] == []
    written = (pair.guest / "log").read_text()
    assert len(list(pair.conflicts)) <= 1
    pair.fuse.action = None
    pair.settle()
    assert pair.trees()[1] == {"log": "", "other": "1"}
    assert written in pair.saved()


@pytest.mark.parametrize("side", [HOST, GUEST])
def test_what_cannot_be_deleted_does_not_come_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    synchronised(pair, {"d": {"x": "1", "y": "1"}, "ok": "1"})
    roots = (pair.host, pair.guest)
    shutil.rmtree(roots[1 - side] / "d")
    original = os.rename

    def rename(old: str, new: str, **where: int) -> None:
        if old == "x":
            raise PermissionError(13, "Permission denied")
        original(old, new, **where)

    monkeypatch.setattr(os, "rename", rename)
    for _ in range(3):
        outcome = pair.run()
        assert {problem.path: problem.reason for problem in outcome.failed} == {
            "d/x": "permission denied",
            "d": "something in it could not be removed",
        }
        assert outcome.requeue == set()
        assert read(roots[1 - side]) == {"ok": "1"}
        assert read(roots[side]) == {"d": {"x": "1"}, "ok": "1"}
    monkeypatch.undo()
    pair.settle()
    assert pair.trees() == ({"ok": "1"}, {"ok": "1"})


# 59: a crash at every point


EDITS_HOST: dict[str, object] = {
    "edited": "h2", "new": "h", "both": "host", "kind": {"in": "h"}, "log": "1 and more",
}  # fmt: skip
EDITS_GUEST: dict[str, object] = {"back": "g2", "both": "guest", "sub": {"x": "g"}}
BEFORE: dict[str, object] = {
    "edited": "1", "back": "1", "both": "1", "kind": "1", "log": "1", "gone": "1",
    "dir": {"p": "1", "q": "1"},
}  # fmt: skip


def work(pair: Pair) -> None:
    """Change much on both sides."""
    (pair.host / "kind").unlink()
    write(pair.host, EDITS_HOST)
    shutil.rmtree(pair.host / "dir")
    write(pair.guest, EDITS_GUEST)
    (pair.guest / "dir" / "p").write_text("kept")
    (pair.guest / "gone").unlink()


AFTER: dict[str, object] = {
    "edited": "h2", "back": "g2", "both": "host", "kind": {"in": "h"}, "log": "1 and more",
    "new": "h", "sub": {"x": "g"}, "dir": {"p": "kept"},
}  # fmt: skip


def test_59_a_crash_at_every_point_ends_in_the_same_trees(place: Path) -> None:
    moment = 0
    while True:
        pair = Pair(place / str(moment))
        synchronised(pair, BEFORE)
        work(pair)
        pair.fuse.left = moment
        try:
            pair.run()
        except Crash:
            crashed = True
        else:
            crashed = False
        pair.restart()
        pair.settle()
        assert pair.trees() == (AFTER, AFTER), moment
        assert {"guest", "1"} <= pair.saved(), moment
        pair.close()
        shutil.rmtree(place / str(moment))
        if not crashed:
            break
        moment += 1
    assert moment > 40


def test_59_a_crash_between_parts_of_what_is_new_ends_in_the_same_trees(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much that is new is made in parts, so a directory may be there before all that is in it."""
    monkeypatch.setattr(cycle, "_BUILT_AT_ONCE", 2)
    below = {"x": "1", "y": "2", "deeper": {"z": "3", "w": "4"}}
    tree: dict[str, object] = {"a": {**below, "b": below, "c": below}, "d": below, "e": "5"}
    moment = 0
    crashed = True
    while crashed:
        pair = Pair(place / str(moment))
        synchronised(pair, {})
        write(pair.host, tree)
        pair.fuse.left = moment
        try:
            pair.run()
            crashed = False
        except Crash:
            pass
        (pair.host / "a" / "b" / "deeper" / "z").unlink()
        pair.restart()
        pair.settle()
        there = read(pair.host)
        assert pair.trees() == (there, there), moment
        assert there["a"] == {**below, "b": {**below, "deeper": {"w": "4"}}, "c": below}, moment
        assert list(pair.conflicts) == [], moment
        pair.close()
        shutil.rmtree(place / str(moment))
        moment += 1
    assert moment > 40


@pytest.mark.parametrize("origin", ["host", "guest"])
@pytest.mark.parametrize(
    ("before", "now"), [("1", "3"), (None, "3"), ("1", None), (None, None), ("1", "1")]
)
def test_59_what_goes_on_being_written_while_a_round_is_cut_off_is_no_conflict(
    place: Path, origin: str, before: str | None, now: str | None
) -> None:
    """The other side has the change, nothing is written down, and the first one goes on."""
    moment = 0
    applied = 0
    while True:
        pair = Pair(place / str(moment))
        synchronised(pair, {} if before is None else {"d": {"f": before}})
        one, other = (pair.host, pair.guest) if origin == "host" else (pair.guest, pair.host)
        (one / "d").mkdir(exist_ok=True)
        (one / "d" / "f").write_text("2")
        (one / "d" / "g").write_text("2")
        pair.fuse.left = moment
        try:
            pair.run()
        except Crash:
            crashed = True
        else:
            crashed = False
        was = (other / "d" / "f").read_text() if (other / "d" / "f").exists() else None
        if now is None:
            (one / "d" / "f").unlink()
        else:
            (one / "d" / "f").write_text(now)
        pair.restart()
        outcome = pair.settle()
        assert outcome.conflicts == [], (moment, was)
        wanted = {"g": "2"} if now is None else {"g": "2", "f": now}
        assert pair.trees() == ({"d": wanted}, {"d": wanted}), (moment, was)
        assert list(pair.conflicts) == []
        applied += was == "2"
        pair.close()
        shutil.rmtree(place / str(moment))
        if not crashed:
            break
        moment += 1
    assert applied > 1, "the round was cut off between the two, too"


# 60: losses of power


@pytest.mark.parametrize("left", ["", "1", None, "1 and"])
def test_60_what_a_guest_lost_does_not_overwrite_the_host(pair: Pair, left: str | None) -> None:
    synchronised(pair, {"f": "1", "g": "1"})
    pair.host.joinpath("f").write_text("1 and 2")
    pair.settle()
    # The guest stops before its disk is flushed, and comes back with this:
    pair.lose_power(random.Random(0))
    pair.guest.joinpath("f").unlink(missing_ok=True)
    if left is not None:
        pair.guest.joinpath("f").write_text(left)
    pair.settle()
    assert pair.trees() == ({"f": "1 and 2", "g": "1"},) * 2
    assert pair.saved() == ({"1 and"} if left == "1 and" else set())


def test_60_the_guests_own_edit_is_pending_as_well(pair: Pair) -> None:
    synchronised(pair, {"f": "1", "g": "1"})
    pair.guest.joinpath("f").write_text("2")
    pair.guest.joinpath("g").unlink()
    pair.settle()
    assert pair.trees()[0] == {"f": "2"}
    pair.lose_power(random.Random(0))
    write(pair.guest, {"f": "1", "g": "1"})
    pair.settle()
    assert pair.trees() == ({"f": "2"}, {"f": "2"})


def test_60_an_equal_edit_on_both_sides_is_pending_as_well(pair: Pair) -> None:
    before: dict[str, object] = {"f": "1", "g": "1", "d": {"h": "1"}, "k": "1"}
    synchronised(pair, before)
    for root in (pair.host, pair.guest):
        (root / "f").write_text("2")
        (root / "g").unlink()
        shutil.rmtree(root / "d")
    pair.settle()
    pair.lose_power(random.Random(0))
    write(pair.guest, before)
    pair.settle()
    assert pair.trees() == ({"f": "2", "k": "1"},) * 2
    assert not pair.saved()


def test_60_contents_that_were_never_pending_are_not_believed_either(pair: Pair) -> None:
    synchronised(pair, {"f": "1", "g": "1"})
    pair.lose_power(random.Random(0))
    write(pair.guest, {"f": "", "g": "other"})
    pair.settle()
    assert pair.trees() == ({"f": "1", "g": "1"},) * 2
    assert pair.saved() == {"other"}


def test_60_a_crash_of_the_service_as_well(pair: Pair) -> None:
    """The remedy is written down before it is used: a second crash does not undo it."""
    synchronised(pair, {"f": "1", "g": "1"})
    (pair.host / "f").write_text("2")
    pair.settle()
    pair.lose_power(random.Random(0))
    (pair.guest / "f").write_text("1")
    for moment in range(4):
        pair.fuse.left = moment
        with pytest.raises(Crash):
            pair.run()
        pair.restart()
    pair.settle()
    assert pair.trees() == ({"f": "2", "g": "1"},) * 2


def test_an_edit_after_an_orderly_end_is_an_edit(pair: Pair) -> None:
    synchronised(pair, {"f": "1"})
    pair.store.part(GUEST, pair.store.ticket())
    pair.boots[GUEST] = "guest-2"
    (pair.guest / "f").write_text("")
    pair.restart()
    pair.settle()
    assert pair.trees() == ({"f": ""}, {"f": ""})


def test_a_host_that_lost_power_gets_the_guests_bytes_back(pair: Pair) -> None:
    synchronised(pair, {"f": "1", "g": "1"})
    (pair.guest / "f").write_text("2")
    pair.settle()
    pair.boots[HOST] = "host-2"
    (pair.host / "f").write_text("")
    (pair.host / "g").write_text("edited since")
    pair.restart()
    pair.settle()
    assert pair.trees() == ({"f": "2", "g": "edited since"},) * 2


@pytest.mark.parametrize("origin", ["host", "guest"])
@pytest.mark.parametrize("guest_too", [False, True])
def test_what_a_host_has_half_of_after_it_lost_power_is_kept_whole(
    pair: Pair, origin: str, guest_too: bool
) -> None:
    synchronised(pair, {"f": "1", "g": "1"})
    ((pair.host if origin == "host" else pair.guest) / "f").write_text("the result")
    pair.settle()
    pair.boots[HOST] = "host-2"
    if guest_too:
        pair.boots[GUEST] = "guest-2"
    (pair.host / "f").write_text("the")
    pair.restart()
    assert pair.settle().conflicts == ["f"]
    assert pair.trees() == ({"f": "the", "g": "1"},) * 2
    assert pair.saved() == {"the result"}


@pytest.mark.parametrize("side", [HOST, GUEST])
@pytest.mark.parametrize("before", [None, "1"])
@pytest.mark.parametrize("written_down", [False, True])
def test_a_crash_after_a_loss_of_power_does_not_make_an_edit_of_what_it_left(
    pair: Pair, side: int, before: str | None, written_down: bool
) -> None:
    """That a side's change was once carried to the other one says nothing of what it has now."""
    synchronised(pair, {"g": "1"} if before is None else {"g": "1", "f": before})
    path = (pair.host, pair.guest)[side] / "f"
    path.write_text("the result")

    def crash(point: str) -> None:
        if point == ("committed" if written_down else "commit"):
            raise Crash

    pair.fuse.action = crash
    with pytest.raises(Crash):
        pair.run()
    pair.boots[side] += "+"
    path.write_text("the")
    pair.restart()

    def crash_again(point: str) -> None:
        if point == "met":
            raise Crash

    pair.fuse.action = crash_again
    with pytest.raises(Crash):
        pair.run()
    pair.fuse.action = None
    pair.restart()
    pair.settle()
    stays, saved = ("the", "the result") if side == HOST else ("the result", "the")
    assert pair.trees() == ({"f": stays, "g": "1"},) * 2
    assert pair.saved() == {saved}
