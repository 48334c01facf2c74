"""Changing a tree: what is refused, what stays, what is never lost."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sync_trees import FIFO, read, text, tree, write

from wherry_sync import hashing, inplace, kernel
from wherry_sync.apply import Policy
from wherry_sync.entry import EMPTY, Entry, Leaf, is_file, link, lookup
from wherry_sync.local import LocalEndpoint
from wherry_sync.operation import DONE, FAILED, STALE, Arrival, Operation, Result
from wherry_sync.replace import with_executable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="directory descriptors")

MTIME_NS = 1_600_000_000_123_456_789


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")


class Crash(BaseException):
    """The process ends here."""


def crash_at(point: str) -> Callable[[str], None]:
    """Return what ends the process at a point."""

    def action(now: str) -> None:
        if now == point:
            raise Crash

    return action


class Place:
    """A tree and its endpoint."""

    def __init__(self, directory: Path, how: str = "staged") -> None:
        self.directory = directory
        self.how = how
        self.root = directory / "root"
        self.root.mkdir()
        self.action: Callable[[str], None] = lambda point: None
        self.policy = Policy()
        self.open()

    def open(self) -> None:
        self.end = LocalEndpoint(
            os.fspath(self.root),
            os.fspath(self.directory / "stage"),
            "boot",
            policy=self.policy,
            checkpoint=lambda point: self.action(point),
        )

    def restart(self) -> None:
        self.end.close()
        self.action = lambda point: None
        self.open()

    def do(self, *operations: Operation) -> list[Result]:
        self.end.scan()
        contents = []
        for number, operation in enumerate(operations):
            before, after = operation.before, operation.after
            if not is_file(after) or (is_file(before) and digest(before) == digest(after)):
                continue
            assert isinstance(after, Leaf)
            data = value_of(after).encode()
            if self.how == "staged":
                self.end.stage_all([(after, MTIME_NS, [data])])
                continue
            start = None
            if self.how == "known":
                had = value_of(before).encode() if is_file(before) else b""
                start = len(had) if data.startswith(had) else 0
            contents.append(Arrival(number, MTIME_NS, [data[start or 0 :]], start))
        return list(self.end.apply(operations, contents, verify=self.how != "known"))

    def one(self, path: str, before: object, after: object) -> Result:
        (result,) = self.do(Operation(path, tree(before), tree(after)))
        left = {path.name for path in (self.directory / "stage").iterdir()}
        assert {name.partition("-")[0] for name in left} <= {"journal", "rescued"}
        return result

    def rescued(self) -> list[tuple[str, str]]:
        return [
            (found.path, b"".join(self.end.read_rescued(found.name)).decode())
            for found in self.end.rescued()
        ]


CONTENTS = ["1", "2", "3", "1 and more", "short", "", "short and even longer"]


def digest(entry: Entry | None) -> bytes:
    assert isinstance(entry, Leaf)
    return entry.digest


def value_of(entry: Entry | None) -> str:
    return next(value for value in CONTENTS if text(value).digest == digest(entry))


@pytest.fixture(params=["staged", "along", "known"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A place whose contents were staged before, come along, or are known to be appended."""
    found = Place(tmp_path, request.param)
    yield found
    found.end.close()


@pytest.mark.parametrize("before", [None, "1", "1*", "->x", {}])
@pytest.mark.parametrize("after", [None, "2", "2*", "1", "->y", {}])
def test_anything_becomes_anything(place: Place, before: object, after: object) -> None:
    write(place.root, {} if before is None else {"p": before})
    operation = Operation("p", tree(before), tree(after))
    assert [result.status for result in place.do(operation)] == [DONE]
    assert read(place.root) == ({} if after is None else {"p": after})
    # Once more: it is so already.
    assert [result.status for result in place.do(operation)] == [DONE]
    assert lookup(place.end.scan().root, "p") == tree(after)


@pytest.mark.parametrize("there", ["3", "->z", {"in": "3"}, None, FIFO])
@pytest.mark.parametrize(("before", "after"), [("1", "2"), ("1", None), ("1", {}), (None, "2")])
def test_something_else_than_expected_is_left_alone(
    place: Place, there: object, before: object, after: object
) -> None:
    if there == before or (there is None and after is None):
        return
    write(place.root, {} if there is None else {"p": there})
    if isinstance(there, dict) and isinstance(after, dict):
        assert place.one("p", before, after).status == DONE
    else:
        assert place.one("p", before, after).status == STALE
    assert read(place.root) == ({} if there is None else {"p": there})


def test_a_directory_that_still_holds_something_is_left(place: Place) -> None:
    write(place.root, {"d": {"new": "1"}})
    assert place.one("d", {}, None).status == DONE
    assert place.one("d", {}, "2").status == STALE
    assert read(place.root) == {"d": {"new": "1"}}


# 32: written between the check and the rename


@pytest.mark.parametrize("after", ["2", "->y", None, {}])
@pytest.mark.parametrize("point", ["exchange", "displace"])
@pytest.mark.parametrize("how", ["in place", "replaced", "same size", "deleted"])
def test_32_a_write_at_the_last_moment_survives(
    place: Place, after: object, point: str, how: str
) -> None:
    path = place.root / "p"
    write(place.root, {"p": "1"})
    status = path.stat()

    def action(now: str) -> None:
        if now != point:
            return
        if how == "replaced":
            (place.root / "new").write_text("mine")
            (place.root / "new").rename(path)
        elif how == "deleted":
            path.unlink()
        else:
            path.write_text("m" if how == "same size" else "mine")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    place.action = action
    result = place.one("p", "1", after)
    if result.status == DONE:
        # This operation does not pass that point.
        assert point != ("exchange" if isinstance(after, str) else "displace")
    elif how == "deleted":
        assert read(place.root) == {}
    else:
        assert result.status == STALE
        assert read(place.root) == {"p": "m" if how == "same size" else "mine"}
    assert place.rescued() == []


def test_32_a_write_after_the_exchange_back_is_rescued(place: Place) -> None:
    path = place.root / "p"
    write(place.root, {"p": "1"})

    def action(point: str) -> None:
        if point == "exchange":
            path.write_text("first")
        elif point == "exchanged":
            path.write_text("second")

    place.action = action
    assert place.one("p", "1", "2").status == STALE
    assert read(place.root) == {"p": "first"}
    assert place.rescued() == [("p", "second")]


def test_a_file_made_at_the_last_moment_survives(place: Place) -> None:
    place.action = lambda point: None if point != "create" else write(place.root, {"p": "mine"})
    assert place.one("p", None, "2").status == STALE
    assert read(place.root) == {"p": "mine"}


@pytest.mark.parametrize("missing", ["exchange", "rename_exclusive"])
def test_a_filesystem_without_special_renames(
    place: Place, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, missing, lambda *arguments: False)
    write(place.root, {"p": "1", "l": "->x"})
    assert place.one("p", "1", "2").status == DONE
    assert place.one("l", "->x", "->y").status == DONE
    assert place.one("n", None, "3").status == DONE
    assert place.one("m", None, "->m").status == DONE
    assert read(place.root) == {"p": "2", "l": "->y", "n": "3", "m": "->m"}
    place.action = lambda point: (
        None if point not in ("exchange", "create") else write(place.root, {"p": "mine"})
    )
    assert place.one("p", "2", "3").status == STALE
    (place.root / "p").unlink()
    assert place.one("p", None, "3").status == STALE
    assert read(place.root)["p"] == "mine"


# 22, 23: nothing outside the root


def test_a_disk_that_takes_a_part_at_a_time_gets_all(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is nearly full does, without a word."""
    write(place.root, {"a": "1", "b": "3"})
    real_write, real_pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda to, data: real_write(to, _half(data)))
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: real_pwrite(to, _half(data), at))
    place.do(
        Operation("a", text("1"), text("1 and more")),
        Operation("b", text("3"), text("short")),
        Operation("c", None, text("short")),
        Operation("d", None, text("short")),
    )
    assert read(place.root) == {"a": "1 and more", "b": "short", "c": "short", "d": "short"}


def _half(data: bytes) -> bytes:
    return bytes(data)[: max(1, len(data) // 2)]


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out", "", ".", "a//b", "a\0b"])
def test_a_path_that_is_none_of_the_tree_is_refused(place: Place, path: str) -> None:
    write(place.root, {"a": {}})
    assert place.one(path, None, "2").status == FAILED
    assert not (place.directory / "out").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "2"), (None, {}), (None, "->x"), ("1", None), ("1", "2"), ({}, None)],
)
def test_23_a_parent_that_became_a_link_is_not_followed(
    place: Place, before: object, after: object
) -> None:
    outside = place.directory / "outside"
    write(outside, {} if before is None else {"f": before})
    was = read(outside)
    (place.root / "d").symlink_to(outside)
    result = place.one("d/f", before, after)
    assert result.status == (STALE if after is not None else result.status)
    assert read(outside) == was


def test_23_a_parent_swapped_under_way_changes_nothing_outside(place: Place) -> None:
    outside = place.directory / "outside"
    write(outside, {"f": "1"})
    write(place.root, {"d": {"f": "1"}})

    def action(point: str) -> None:
        if point == "exchange":
            (place.root / "d").rename(place.root / "was")
            (place.root / "d").symlink_to(outside)

    place.action = action
    place.one("d/f", "1", "2")
    assert read(outside) == {"f": "1"}


def test_22_a_link_is_replaced_not_followed(place: Place) -> None:
    target = place.directory / "target"
    target.write_text("1")
    (place.root / "l").symlink_to(target)
    assert place.one("l", f"->{target}", "2").status == DONE
    assert target.read_text() == "1"
    assert (place.root / "l").read_text() == "2"
    assert not (place.root / "l").is_symlink()


# Owner, mode, times


def test_new_files_have_the_policys_mode_and_old_ones_keep_theirs(place: Place) -> None:
    write(place.root, {"old": "1"})
    (place.root / "old").chmod(0o640)
    place.one("old", "1", "2*")
    place.one("new", None, "2*")
    place.one("d", None, {})
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.root.iterdir()}
    assert modes == {"old": 0o750, "new": 0o755, "d": 0o755}


def test_no_setuid_bit_is_put_on_what_comes_from_the_other_end(place: Place) -> None:
    write(place.root, {"f": "1*", "g": "1*"})
    (place.root / "f").chmod(0o6755)
    (place.root / "g").chmod(0o6755)
    place.one("f", "1*", "2*")
    assert stat.S_IMODE((place.root / "f").stat().st_mode) == 0o755
    # The bit of a file whose contents stay is its own.
    place.one("g", "1*", "1")
    assert stat.S_IMODE((place.root / "g").stat().st_mode) == 0o6644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_27_files_keep_their_owner_and_new_ones_get_the_directorys(place: Place) -> None:
    write(place.root, {"d": {"f": "1"}})
    os.chown(place.root / "d", 1000, 1001)
    os.chown(place.root / "d" / "f", 1002, 1003)
    place.do(
        Operation("d/f", text("1"), text("2")),
        Operation("d/new", None, text("3")),
        Operation("d/e", None, EMPTY),
        Operation("d/e/g", None, text("3")),
    )
    owners = {
        name: ((place.root / name).stat().st_uid, (place.root / name).stat().st_gid)
        for name in ("d/f", "d/new", "d/e", "d/e/g")
    }
    assert owners.pop("d/f") == (1002, 1003)
    assert set(owners.values()) == {(1000, 1001)}


def test_28_the_time_of_modification_comes_along(place: Place) -> None:
    write(place.root, {"f": "1", "log": "1"})
    place.one("f", "1", "2")
    place.one("new", None, "3")
    place.one("log", "1", "1 and more")
    for name in ("f", "new", "log"):
        assert (place.root / name).stat().st_mtime_ns == MTIME_NS


def test_what_we_wrote_is_not_read_again(place: Place) -> None:
    write(place.root, {"f": "1"})
    place.do(Operation("f", text("1"), text("2")), Operation("new", None, text("3")))
    found = place.end.scan()
    assert found.root == tree({"f": "2", "new": "3"})
    granularity_ns = place.end._scanner._granularity_ns
    assert found.files_read == (0 if granularity_ns == 0 else 2)
    (place.root / "f").write_text("mine")
    assert place.end.scan().root == tree({"f": "mine", "new": "3"})


@pytest.mark.parametrize(("before", "point"), [("1", "exchanged"), (None, "created")])
def test_a_write_right_after_ours_is_seen_even_of_the_same_size(
    place: Place, before: str | None, point: str
) -> None:
    write(place.root, {} if before is None else {"f": before})
    for change, wanted in ((lambda path: path.write_text("m"), "m"), (make_executable, "2*")):
        place.action = lambda now, change=change: (  # type: ignore[misc]
            change(place.root / "f") if now == point else None
        )
        assert place.one("f", before, "2").status == DONE
        assert place.end.scan().root == tree({"f": wanted})
        (place.root / "f").unlink()
        write(place.root, {} if before is None else {"f": before})


def make_executable(path: Path) -> None:
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("mode", "with_it", "without"),
    [(0o644, 0o755, 0o644), (0o600, 0o700, 0o600), (0o4755, 0o4755, 0o4644), (0o640, 0o750, 0o640)],
)
def test_the_executable_bit_follows_the_readable_ones(
    mode: int, with_it: int, without: int
) -> None:
    assert (with_executable(mode, True), with_executable(mode, False)) == (with_it, without)


# In place


def test_35_an_append_keeps_the_inode_and_other_edits_do_not(place: Place) -> None:
    write(place.root, {"log": "1", "f": "1"})
    inode = (place.root / "log").stat().st_ino
    with (place.root / "log").open() as tail:
        assert tail.read() == "1"
        place.one("log", "1", "1 and more")
        assert tail.read() == " and more"
    assert (place.root / "log").stat().st_ino == inode
    inode = (place.root / "f").stat().st_ino
    place.one("f", "1", "2")
    assert (place.root / "f").stat().st_ino != inode


def test_25_hard_links_stay_one_file(place: Place) -> None:
    write(place.root, {"a": "1 and more"})
    (place.root / "b").hardlink_to(place.root / "a")
    assert place.one("a", "1 and more", "short").status == DONE
    assert read(place.root) == {"a": "short", "b": "short"}
    assert (place.root / "a").samefile(place.root / "b")


@pytest.mark.parametrize("after", ["short", "1 and more"])
@pytest.mark.parametrize("in_place", [False, True])
def test_where_a_hard_link_may_be_outside_of_the_tree_it_is_not_written_to(
    tmp_path: Path, after: str, in_place: bool
) -> None:
    """Whether the contents were staged or come along."""
    place = Place(tmp_path, "along" if in_place else "staged")
    place.end.close()
    place.policy.links_stay = False
    place.open()
    write(place.root, {"f": "1", "p": "1"})
    outside, pinned = place.directory / "backup", place.directory / "pinned"
    outside.hardlink_to(place.root / "f")
    pinned.hardlink_to(place.root / "p")
    place.end.pin("p")
    operations = [
        Operation(name, text("1"), text(after), in_place=in_place and name == "f") for name in "fp"
    ]
    assert [result.status for result in place.do(*operations)] == [DONE, DONE]
    assert read(place.root) == {"f": after, "p": after}
    assert outside.read_text() == "1"
    # A mount refers to that one, and who writes to it there writes to all its names.
    assert pinned.read_text() == after
    place.end.close()


def test_34_a_single_file_is_rewritten_in_place(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("1 and more")
    inode = (tmp_path / "f").stat().st_ino
    end = LocalEndpoint(os.fspath(tmp_path / "f"), os.fspath(tmp_path / "stage"), "boot")
    try:
        assert end.scan().root == text("1 and more")
        end.stage_all([(text("2*"), MTIME_NS, [b"2*"]), (text("2"), MTIME_NS, [b"2"])])
        after = text("2", executable=True)
        (result,) = end.apply([Operation("", text("1 and more"), after)])
        assert result.status == DONE
        assert end.scan().root == after
        assert b"".join(end.read("")[1]) == b"2"
    finally:
        end.close()
    assert ((tmp_path / "f").read_text(), (tmp_path / "f").stat().st_ino) == ("2", inode)


def saved(path: str, before: str, after: str) -> Operation:
    """What a save in place on the other side comes to."""
    return Operation(path, text(before), text(after), in_place=True)


@pytest.mark.parametrize("after", ["2", "1 and more", "short", ""])
def test_a_file_that_was_saved_in_place_is_written_in_place(place: Place, after: str) -> None:
    write(place.root, {"f": "1"})
    inode = (place.root / "f").stat().st_ino
    assert place.do(saved("f", "1", after))[0].status == DONE
    assert ((place.root / "f").read_text(), (place.root / "f").stat().st_ino) == (after, inode)
    left = {path.name for path in (place.directory / "stage").iterdir()}
    assert {name.partition("-")[0] for name in left} <= {"journal", "rescued"}


@linux_only
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_a_file_that_somebody_has_open_is_replaced(place: Place, flags: int) -> None:
    """They would read half of it, or write to what we write."""
    write(place.root, {"f": "1"})
    descriptor = os.open(place.root / "f", flags)
    try:
        assert place.do(saved("f", "1", "2"))[0].status == DONE
        assert os.fstat(descriptor).st_nlink == 0
        assert os.fstat(descriptor).st_size == 1
    finally:
        os.close(descriptor)
    assert read(place.root) == {"f": "2"}


@linux_only
def test_nobody_opens_a_file_while_it_is_written_in_place(place: Place) -> None:
    write(place.root, {"f": "3"})
    refused = []

    def action(point: str) -> None:
        if point in ("written in place", "truncated"):
            for flags in (os.O_RDONLY, os.O_WRONLY | os.O_TRUNC):
                try:
                    os.close(os.open(place.root / "f", flags | os.O_NONBLOCK))
                except BlockingIOError:
                    refused.append(point)

    place.action = action
    assert place.do(saved("f", "3", "short"))[0].status == DONE
    assert refused == ["written in place"] * 2 + ["truncated"] * 2
    assert read(place.root) == {"f": "short"}


@linux_only
@pytest.mark.parametrize("written", ["2", "more than it was"])
def test_a_write_just_before_one_in_place_survives(place: Place, written: str) -> None:
    """Also one that changes neither the size nor the times, as it does now and then."""
    write(place.root, {"f": "3"})
    path = place.root / "f"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns

    def action(point: str) -> None:
        if point == "in place":
            path.write_text(written)
            os.utime(path, ns=times)

    place.action = action
    assert place.do(saved("f", "3", "short"))[0].status == STALE
    assert read(place.root) == {"f": written}


@linux_only
def test_who_opens_a_file_while_it_is_looked_at_has_it_replaced(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking may take longer than the kernel lets others wait, who write to it then."""
    write(place.root, {"f": "3"})
    original = hashing.read_digest

    def slow(descriptor: int, size: int) -> tuple[bytes, int]:
        if sys._getframe(1).f_code.co_name == "rewrite_alone":
            with pytest.raises(BlockingIOError):
                os.open(place.root / "f", os.O_WRONLY | os.O_NONBLOCK)
        return original(descriptor, size)

    inode = (place.root / "f").stat().st_ino
    monkeypatch.setattr(hashing, "read_digest", slow)
    assert place.do(saved("f", "3", "short"))[0].status == DONE
    assert (place.root / "f").stat().st_ino != inode
    assert read(place.root) == {"f": "short"}


@linux_only
def test_a_disk_with_no_room_for_both_has_the_file_replaced(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place.root, {"f": "3"})

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert place.do(saved("f", "3", "short"))[0].status == DONE
    assert read(place.root) == {"f": "short"}


@linux_only
def test_a_write_in_place_that_fails_half_way_is_finished_before_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place.root, {"f": "1 and more", "g": "1 and more"})
    original = os.ftruncate
    broken = []

    def fails_once(descriptor: int, size: int) -> None:
        if not broken:
            broken.append(size)
            raise OSError(errno.EIO, "Input/output error")
        original(descriptor, size)

    monkeypatch.setattr(os, "ftruncate", fails_once)
    results = place.do(saved("f", "1 and more", "short"), saved("g", "1 and more", "3"))
    assert [result.status for result in results] == [FAILED, DONE]
    assert place.end.scan().root == tree({"f": "short", "g": "3"})
    assert read(place.root) == {"f": "short", "g": "3"}


@linux_only
def test_a_program_that_runs_is_replaced(place: Place) -> None:
    shutil.copy("/bin/sleep", place.root / "f")
    before, after = lookup(place.end.scan().root, "f"), text("2", executable=True)
    with subprocess.Popen([place.root / "f", "60"]) as runs:
        try:
            place.end.stage_all([(after, MTIME_NS, [b"2"])])
            (result,) = place.end.apply([Operation("f", before, after, in_place=True)])
            assert result.status == DONE
            assert runs.poll() is None
        finally:
            runs.kill()
    assert read(place.root) == {"f": "2*"}


def replaced(path: Path) -> None:
    """Put another file in the place of one, as a container does by a rename."""
    path.with_name("new").write_text("mine")
    path.with_name("new").rename(path)


NAME_GOES = pytest.mark.parametrize(
    ("goes", "left"), [(replaced, {"f": "mine"}), (Path.unlink, {})], ids=["replaced", "removed"]
)


@NAME_GOES
@pytest.mark.parametrize("point", ["written in place", "truncated"])
@pytest.mark.parametrize("alone", [pytest.param(True, marks=linux_only), False])
def test_what_was_written_in_place_counts_only_if_it_has_its_name_still(
    place: Place,
    goes: Callable[[Path], None],
    left: dict[str, object],
    point: str,
    alone: bool,
) -> None:
    write(place.root, {"f": "3"})
    place.end.pin("" if alone else "f")

    def action(now: str) -> None:
        if now == point:
            goes(place.root / "f")

    place.action = action
    operation = saved("f", "3", "short") if alone else Operation("f", text("3"), text("short"))
    assert place.do(operation)[0].status == STALE
    assert read(place.root) == left
    # Nor is it finished later.
    place.restart()
    assert read(place.root) == left
    assert not place.rescued()


@NAME_GOES
def test_what_was_appended_counts_only_if_it_has_its_name_still(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    goes: Callable[[Path], None],
    left: dict[str, object],
) -> None:
    write(place.root, {"f": "1"})

    def late() -> None:
        goes(place.root / "f")

    if place.how == "known":
        monkeypatch.setattr(os, "write", filling(late))
    else:
        place.action = lambda point: late() if point == "written in place" else None
    assert place.one("f", "1", "1 and more").status == STALE
    assert read(place.root) == left
    place.restart()
    assert read(place.root) == left
    assert not place.rescued()


@NAME_GOES
def test_what_gets_the_name_while_a_torn_file_is_finished_is_left_alone(
    place: Place, goes: Callable[[Path], None], left: dict[str, object]
) -> None:
    write(place.root, {"f": "1 and more"})
    place.end.pin("f")

    place.action = crash_at("written in place")
    with pytest.raises(Crash):
        place.one("f", "1 and more", "short")
    place.end.close()
    place.action = lambda point: goes(place.root / "f") if point == "truncated" else None
    place.open()
    assert read(place.root) == left
    assert not place.rescued()


@pytest.mark.parametrize("point", ["in place", "written in place", "truncated"])
@pytest.mark.parametrize("edited", [False, True])
def test_a_crash_in_place_is_never_an_edit(place: Place, point: str, edited: bool) -> None:
    write(place.root, {"a": "1 and more"})
    (place.root / "b").hardlink_to(place.root / "a")

    place.action = crash_at(point)
    with pytest.raises(Crash):
        place.one("a", "1 and more", "short")
    if edited:
        (place.root / "a").write_text("mine")
    place.restart()
    wanted = "1 and more" if point == "in place" and not edited else "short"
    assert read(place.root) == {"a": wanted, "b": wanted}
    assert place.rescued() == ([("a", "mine")] if edited else [])
    assert not list((place.directory / "stage").glob("c-*"))


def test_what_is_written_over_a_torn_file_is_kept_too(place: Place) -> None:
    write(place.root, {"a": "1 and more"})
    (place.root / "b").hardlink_to(place.root / "a")

    seen: list[str] = []

    def edit(point: str) -> None:
        seen.append(point)
        if point == "torn" and seen.count(point) == 1:
            (place.root / "a").write_text("mine")

    place.action = crash_at("written in place")
    with pytest.raises(Crash):
        place.one("a", "1 and more", "short")
    place.end.close()
    place.action = edit
    place.open()
    assert read(place.root) == {"a": "short", "b": "short"}
    assert place.rescued() == [("a", "mine")]


@pytest.mark.parametrize("place", ["staged"], indirect=True)
@pytest.mark.parametrize("before", ["", "1", "1 and more"])
@pytest.mark.parametrize("after", ["", "1 and more", "short", "short and even longer"])
@pytest.mark.parametrize("edited", [None, 0, -1])
def test_what_is_torn_anywhere_is_told_from_an_edit(
    place: Place, before: str, after: str, edited: int | None
) -> None:
    """A kernel that ends a program ends its write where it likes, with space reserved or not."""
    old, new = before.encode(), after.encode()

    found = [
        new[:done] + room[done:]
        for room in {old, old.ljust(len(new), b"\0")}
        for done in range(len(new) + 1)
    ]
    for torn in {bytes(each) for each in found} - {old, new}:
        there = bytearray(torn)
        if edited is not None:
            there[edited] ^= 1
        write(place.root, {"a": before})
        (place.root / "b").hardlink_to(place.root / "a")
        place.action = crash_at("in place")
        with pytest.raises(Crash):
            place.one("a", before, after)
        (place.root / "a").write_bytes(there)
        place.restart()
        assert read(place.root) == {"a": after, "b": after}
        lost = [] if edited is None else [("a", there.decode())]
        assert place.rescued() == lost, torn
        for each in place.end.rescued():
            place.end.forget_rescued(each.name)
        for path in place.root.iterdir():
            path.unlink()


@pytest.mark.parametrize("place", ["staged"], indirect=True)
@pytest.mark.parametrize("point", ["in place", "written in place"])
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_of_much_only_what_was_appended_is_known_to_be_torn(
    place: Place, monkeypatch: pytest.MonkeyPatch, point: str, grown: bool, edited: bool
) -> None:
    """Its old contents are not kept meanwhile; who wrote what cannot be told, so it is kept."""
    monkeypatch.setattr(inplace, "_OLD_BYTES", 4)
    monkeypatch.setattr(inplace, "_STEP_BYTES", 4)
    before, after = ("short", "short and even longer") if grown else ("1 and more", "short")
    write(place.root, {"a": before})
    (place.root / "b").hardlink_to(place.root / "a")

    place.action = crash_at(point)
    with pytest.raises(Crash):
        place.one("a", before, after)
    there = (place.root / "a").read_bytes()
    if edited:
        (place.root / "a").write_bytes(there + b"!")
        there += b"!"
    place.restart()
    touched = edited or point != "in place"
    assert read(place.root)["a"] == (after if touched else before)
    kept = edited or (touched and not grown)
    assert place.rescued() == ([("a", there.decode())] if kept else [])


@pytest.mark.parametrize("place", ["staged"], indirect=True)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("there", ["sh", "short more\0", "short\0\0\0\0\0", "other"])
def test_what_only_looks_torn_is_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch, there: str, late: bool
) -> None:
    """Cut off, grown, full of zeros; or it was when its old contents were read."""
    write(place.root, {"a": "1 and more"})
    (place.root / "b").hardlink_to(place.root / "a")

    def read_late(fd: int, name: str, before: Leaf) -> bytes:
        return there.encode()

    place.action = crash_at("in place")
    if late:
        monkeypatch.setattr(inplace, "old_contents", read_late)
    with pytest.raises(Crash):
        place.one("a", "1 and more", "short")
    (place.root / "a").write_text(there)
    place.restart()
    assert read(place.root) == {"a": "short", "b": "short"}
    assert place.rescued() == [("a", there)]


def test_50_a_full_disk_leaves_the_file_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place.root, {"log": "1"})

    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    if place.how == "known":
        # There is room for a part of it.
        monkeypatch.setattr(os, "write", filling(full))
    else:
        monkeypatch.setattr(os, "posix_fallocate", full)
    result = place.one("log", "1", "1 and more")
    assert (result.status, result.reason) == (FAILED, "no space left on device")
    assert read(place.root) == {"log": "1"}


@pytest.mark.parametrize("place", ["known"], indirect=True)
@pytest.mark.parametrize("written", ["1 too", "3"])
def test_32_a_write_just_before_an_append_survives(place: Place, written: str) -> None:
    path = place.root / "log"
    write(place.root, {"log": "1"})
    place.action = lambda point: path.write_text(written) and None if point == "append" else None
    assert place.one("log", "1", "1 and more").status == STALE
    assert read(place.root) == {"log": written}


@pytest.mark.parametrize("place", ["known"], indirect=True)
def test_two_appends_at_the_same_moment_are_both_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.root / "log"
    write(place.root, {"log": "1"})
    original = os.write

    def late(descriptor: int, data: bytes) -> int:
        if bytes(data) == b" and more":
            with path.open("a") as file:
                file.write(" and mine")
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", late)
    assert place.one("log", "1", "1 and more").status == STALE
    assert read(place.root) == {"log": "1 and mine and more"}


def test_a_directory_that_goes_between_two_operations_is_no_failure(place: Place) -> None:
    write(place.root, {"d": {"a": "1"}})

    def action(point: str) -> None:
        if point == "create":
            (place.root / "d" / "a").unlink(missing_ok=True)
            (place.root / "d").rmdir()
            place.action = lambda point: None

    place.action = action
    operations = [Operation(f"d/{name}", None, text(name)) for name in ("2", "3")]
    assert [result.status for result in place.do(*operations)] == [STALE, STALE]
    assert read(place.root) == {}


@pytest.mark.parametrize("status", [FAILED, STALE])
@pytest.mark.parametrize("after", [None, "2"])
def test_a_directory_of_which_something_could_not_be_removed_is_not_done(
    place: Place, monkeypatch: pytest.MonkeyPatch, status: str, after: object
) -> None:
    write(place.root, {"d": {"e": {"x": "1", "y": "1"}}, "other": {"new": "3"}})
    original = os.rename

    def rename(old: str, new: str, **where: int) -> None:
        if old == "x":
            raise OSError(errno.EACCES, "Permission denied")
        original(old, new, **where)

    if status == FAILED:
        monkeypatch.setattr(os, "rename", rename)
    else:
        (place.root / "d" / "e" / "x").write_text("3")
    operations = [Operation(f"d/e/{name}", text("1"), None) for name in "xy"]
    operations += [
        Operation("d/e", EMPTY, None),
        # One that was not told of what it holds.
        Operation("other", EMPTY, None),
        Operation("d", EMPTY, tree(after)),
    ]
    results = place.do(*operations)
    assert [result.status for result in results] == [status, DONE, status, DONE, status]
    if status == FAILED:
        assert results[-1].reason == "something in it could not be removed"
    assert lookup(place.end.scan().root, "d/e/y") is None
    assert (place.root / "d" / "e" / "x").exists()


def filling(then: Callable[..., None], data: bytes = b" and more") -> Callable[..., int]:
    """Return a write that writes half of some data, and then does something else."""
    original = os.write

    def write(descriptor: int, piece: bytes) -> int:
        if bytes(piece) == data:
            return original(descriptor, data[: len(data) // 2])
        if data.endswith(bytes(piece)):
            then()
        return original(descriptor, piece)

    return write


@pytest.mark.parametrize("place", ["known"], indirect=True)
@pytest.mark.parametrize("edited", [None, "mine", "1 and my"])
def test_a_torn_append_is_never_an_edit(
    place: Place, monkeypatch: pytest.MonkeyPatch, edited: str | None
) -> None:
    write(place.root, {"log": "1"})

    def crash() -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", filling(crash))
        with pytest.raises(Crash):
            place.one("log", "1", "1 and more")
    assert read(place.root) == {"log": "1 and"}
    if edited is not None:
        (place.root / "log").write_text(edited)
    place.restart()
    assert read(place.root) == {"log": "mine" if edited == "mine" else "1 and more"}
    # One that is an edit, and nothing else, is left where it is.
    assert place.rescued() == ([("log", "1 and my")] if edited == "1 and my" else [])


def test_the_next_scan_looks_where_we_have_changed_something(place: Place) -> None:
    """A watch may tell of it later; what is not seen would pass for deleted by somebody else."""
    place.do(Operation("d", None, EMPTY))
    place.do(Operation("d/a", None, text("1")))
    assert lookup(place.end.scan(()).root, "d/a") == text("1")
    place.do(Operation("d/a", text("1"), None))
    assert lookup(place.end.scan(()).root, "d/a") is None


# The stage


def test_contents_that_are_not_those_announced_are_refused(place: Place) -> None:
    for chunks in ([b"2"], [b"1", b"1"], []):
        assert place.end.stage_all([(text("1"), MTIME_NS, chunks)]) == set()
    assert place.end.missing([text("1")]) == [text("1")]
    assert {path.name for path in (place.directory / "stage").iterdir()} == {"journal"}


def test_one_content_for_several_paths_is_staged_once(place: Place) -> None:
    place.end.scan()
    place.end.stage_all([(text("1"), MTIME_NS, [b"1"])])
    operations = [Operation(name, None, text("1")) for name in "abc"]
    assert {result.status for result in place.end.apply(operations)} == {DONE}
    assert read(place.root) == {"a": "1", "b": "1", "c": "1"}
    assert len({path.stat().st_ino for path in place.root.iterdir()}) == 3
    assert {path.name for path in (place.directory / "stage").iterdir()} == {"journal"}


@pytest.mark.parametrize("after", ["2", "->y", None])
def test_a_crash_at_any_point_leaves_the_old_or_the_new_and_no_rubbish(
    place: Place, after: object
) -> None:
    for moment in range(20):
        write(place.root, {"p": "1"})
        left = moment

        def action(point: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        place.action = action
        try:
            place.do(Operation("p", text("1"), tree(after)))
        except Crash:
            pass
        else:
            break
        place.restart()
        assert read(place.root) in ({"p": "1"}, {} if after is None else {"p": after})
        assert {path.name for path in (place.directory / "stage").iterdir()} == {"journal"}
        for path in place.root.iterdir():
            path.unlink()
    else:
        raise AssertionError("it never ends")
    assert moment >= 3


def test_what_a_crash_displaced_unseen_is_rescued(place: Place) -> None:
    write(place.root, {"p": "1"})

    def action(point: str) -> None:
        if point == "exchange":
            (place.root / "p").write_text("mine")
        if point == "exchanged":
            raise Crash

    place.action = action
    with pytest.raises(Crash):
        place.one("p", "1", "2")
    place.restart()
    assert place.rescued() == [("p", "mine")]


def test_the_stage_must_be_on_the_trees_filesystem(tmp_path: Path) -> None:
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one filesystem only")
    with pytest.raises(OSError, match="not on the filesystem"):
        LocalEndpoint("/dev/shm", os.fspath(tmp_path / "stage"), "boot")


def test_a_link_may_point_anywhere(place: Place) -> None:
    for number, target in enumerate([b"/etc/passwd", b"../../x", b"\xff", b"loop-3"]):
        assert place.do(Operation(f"l{number}", None, link(target)))[0].status == DONE
        assert os.fsencode((place.root / f"l{number}").readlink()) == target
