"""Scanning: what is there, what is read again, what is left alone."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sync_trees import tree, write

from wherry.sync.core.rules import below, parse
from wherry_sync import hashing, kernel, records
from wherry_sync.entry import (
    EMPTY,
    IGNORED,
    MAX_DEPTH,
    PROBLEM,
    UNTRACKED,
    Directory,
    Entry,
    Leaf,
    count,
    file,
    link,
    lookup,
    name_problem,
    share,
    updated,
    walk,
)
from wherry_sync.ignore import Ignore
from wherry_sync.scan import Scanner, Snapshot

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="directory descriptors")

HOUR_NS = 3_600_000_000_000
STATUS_PACK = records.STATUS.pack


class Tree:
    """A directory and its scanner."""

    def __init__(self, path: Path, ignore: Ignore | None = None) -> None:
        self.path = path
        self.now_ns = 0
        path.mkdir()
        self.scanner = Scanner(ignore or Ignore(), granularity_ns=0)

    def scan(
        self,
        dirty: list[str] | None = None,
        rewritten: tuple[str, ...] = (),
        arrived: tuple[str, ...] = (),
    ) -> Snapshot:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return self.scanner.scan(fd, dirty, rewritten, arrived)
        finally:
            os.close(fd)


@pytest.fixture
def place(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "root")


def test_what_is_there_is_found(place: Tree) -> None:
    value = {"f": "1", "x": "2*", "d": {"e": {}, "g": "3"}, "l": "->/etc/passwd", "new\nline": "4"}
    write(place.path, value)
    found = place.scan()
    assert found.root == tree(value)
    assert found.files_read == 4
    assert not found.requeue


def test_nothing_new_is_the_same_object_and_reads_nothing(place: Tree) -> None:
    write(place.path, {"f": "1", "d": {"g": "2"}, "e": {}})
    first = place.scan()
    second = place.scan()
    assert second.root is first.root
    assert second.files_read == 0


def test_another_root_in_the_place_of_the_known_one_is_scanned_in_full(place: Tree) -> None:
    """Also if it was there for one scan only, between two looks at which root it is."""
    write(place.path, {"a": {}, "b": {"f": "1"}})
    known = place.scan().root
    aside, other = place.path.with_name("aside"), place.path.with_name("other")
    write(other, {"a": {}, "b": {"f": "2"}})
    place.path.rename(aside)
    other.rename(place.path)
    assert place.scan(["a"]).root == tree({"a": {}, "b": {"f": "2"}})
    place.path.rename(other)
    aside.rename(place.path)
    assert place.scan(["a"]).root == known


def test_of_a_directory_that_has_arrived_nothing_is_known(place: Tree) -> None:
    write(place.path, {"d": {"e": {"f": "1"}, "g": "2"}, "h": {}})
    first = place.scan().root
    (place.path / "d" / "e" / "f").write_text("3")
    assert place.scan(["h"]).root is first
    found = place.scan(["h"], arrived=("d", "d/e", "h/gone", "gone/x"))
    assert found.root == tree({"d": {"e": {"f": "3"}, "g": "2"}, "h": {}})
    assert found.files_read == 2
    assert lookup(found.root, "h") is lookup(first, "h")
    assert place.scan([]).root is found.root


def test_a_change_leaves_the_rest_the_same_objects(place: Tree) -> None:
    write(place.path, {"d": {"g": "2"}, "e": {"h": "1"}})
    first = place.scan().root
    (place.path / "e" / "h").write_text("3")
    found = place.scan()
    assert lookup(found.root, "d") is lookup(first, "d")
    assert found.root == tree({"d": {"g": "2"}, "e": {"h": "3"}})
    assert found.files_read == 1


def test_a_change_leaves_what_is_known_of_the_files_beside_it(place: Tree) -> None:
    """Whether contents have changed or not, only the one file is read, also by the next scan."""
    write(place.path, {"d": {"f": "1", "g": "2", "h": "3"}})
    place.scan()
    os.utime(place.path / "d" / "f", ns=(0, 0))
    assert [place.scan().files_read for _ in range(2)] == [1, 0]
    (place.path / "d" / "new").write_text("4")
    assert [place.scan().files_read for _ in range(2)] == [1, 0]
    (place.path / "d" / "g").unlink()
    assert place.scan().files_read == 0


def test_39_same_size_and_time_restored_is_noticed(place: Tree) -> None:
    path = place.path / "f"
    path.write_text("one")
    place.scan()
    status = path.stat()
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert place.scan().root == tree({"f": "two"})


@pytest.mark.parametrize("granularity_ns", [records.COARSE_NS, records.WHOLE_SECONDS_NS])
def test_a_digest_is_not_trusted_within_the_clocks_granularity(
    tmp_path: Path, granularity_ns: int
) -> None:
    path = tmp_path / "f"
    path.write_text("1")
    now_ns = path.stat().st_ctime_ns
    scanner = Scanner(granularity_ns=granularity_ns, now_ns=lambda: now_ns)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert [scanner.scan(fd).files_read for _ in range(2)] == [1, 1]
        now_ns += granularity_ns
        assert scanner.scan(fd).files_read == 1
        now_ns += 1
        assert [scanner.scan(fd).files_read for _ in range(2)] == [1, 0]
        # The clock was set back: the file is newer than now.
        path.write_text("2")
        now_ns -= HOUR_NS
        assert [scanner.scan(fd).files_read for _ in range(2)] == [1, 1]
    finally:
        os.close(fd)


def test_the_granularity_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert records.granularity_ns(fd, "x") in (0, records.COARSE_NS, records.WHOLE_SECONDS_NS)
    finally:
        os.close(fd)
    assert not list(tmp_path.iterdir())


def test_24_fifos_and_sockets_are_untracked(place: Tree) -> None:
    os.mkfifo(place.path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        directory = os.open(place.path, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{directory}/socket" if sys.platform == "linux" else "socket")
        os.close(directory)
    found = place.scan().root
    assert isinstance(found, Directory)
    kinds = [child.kind for child in found.children.values() if isinstance(child, Leaf)]
    assert kinds == [UNTRACKED, UNTRACKED]
    assert found.husk


def test_18_a_name_that_is_not_utf8_is_a_problem_of_its_own(place: Tree) -> None:
    (place.path / "ok").write_text("1")
    (place.path / os.fsdecode(b"b\xff")).write_text("1")
    (place.path / os.fsdecode(b"d\xfe")).mkdir()
    found = place.scan().root
    assert isinstance(found, Directory)
    assert lookup(found, "ok") == lookup(tree({"ok": "1"}), "ok")
    reasons = {
        name: child.reason
        for name, child in found.children.items()
        if isinstance(child, Leaf) and child.kind == PROBLEM
    }
    assert set(reasons) == {"b\\udcff", "d\\udcfe"}
    assert place.scan().root is found


def test_21_names_are_measured_in_bytes() -> None:
    assert name_problem("語" * 85) is None
    assert name_problem("語" * 200) == "its name is too long"
    assert [name_problem(name) is None for name in ("", ".", "..", "a/b", "a\0", ".wherry-x")] == [
        False
    ] * 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_what_cannot_be_read_is_reported_by_path(place: Tree) -> None:
    write(place.path, {"f": "1", "ok": "2", "d": {"g": "1"}})
    (place.path / "f").chmod(0)
    (place.path / "d").chmod(0)
    try:
        found = place.scan().root
    finally:
        (place.path / "d").chmod(0o700)
    for path in ("f", "d"):
        leaf = lookup(found, path)
        assert isinstance(leaf, Leaf)
        assert (leaf.kind, leaf.reason) == (PROBLEM, "permission denied")
    assert lookup(found, "ok") is not None


def scan_from_elsewhere(place: Tree, monkeypatch: pytest.MonkeyPatch) -> Entry | None:
    """Scan as if all that is in the root were on another filesystem."""
    fd = os.open(place.path, os.O_RDONLY)
    original = os.fstat

    def elsewhere(descriptor: int) -> os.stat_result:
        status = original(descriptor)
        return os.stat_result((*status[:2], status.st_dev + 1, *status[3:]))

    monkeypatch.setattr(os, "fstat", elsewhere)
    try:
        return place.scanner.scan(fd).root
    finally:
        os.close(fd)


def test_another_filesystem_is_not_entered(place: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place.path, {"d": {"g": "1"}, "f": "1"})
    place.scan()
    found = scan_from_elsewhere(place, monkeypatch)
    for path in ("d", "f"):
        leaf = lookup(found, path)
        assert isinstance(leaf, Leaf)
        assert leaf.reason == "another filesystem is mounted there"


def test_another_filesystem_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Tree(tmp_path / "root", parse("d\n"))
    write(place.path, {"d": {"g": "1"}})
    assert scan_from_elsewhere(place, monkeypatch) == tree({"d": IGNORED})


def test_the_depth_is_limited(place: Tree) -> None:
    fd = os.open(place.path, os.O_RDONLY)
    for _ in range(MAX_DEPTH + 5):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    paths = list(walk(place.scan().root))
    assert len(paths) == MAX_DEPTH + 2
    deepest = paths[-1][1]
    assert isinstance(deepest, Leaf)
    assert deepest.reason == "it is too deep in the tree"


def test_30_a_file_that_grows_while_it_is_read_is_taken_as_it_was(
    place: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.path / "log"
    path.write_text("a" * 100)
    original = hashing.read_digest

    def append_then_read(descriptor: int, size: int) -> tuple[bytes, int]:
        with path.open("a") as log:
            log.write("b" * 10)
        return original(descriptor, size)

    monkeypatch.setattr(hashing, "read_digest", append_then_read)
    found = place.scan()
    assert found.root == tree({"log": "a" * 100})
    assert found.requeue == {"log"}
    monkeypatch.undo()
    assert place.scan().written_over == {"log"}


def test_a_scan_tells_that_it_goes_on(place: Tree) -> None:
    """Whoever waits for one of a large file, or of many, sees that it is not stuck."""
    write(place.path, {"d": {"e": {}}, "f": "1", "g": "2"})
    with (place.path / "large").open("wb") as file:
        file.truncate(20 * hashing.CHUNK_BYTES)
    calls = 0

    def progress() -> None:
        nonlocal calls
        calls += 1

    place.scanner = Scanner(granularity_ns=0, progress=progress)
    place.scan()
    assert calls == 3 + 3 + 20
    calls = 0
    place.scan()
    assert calls == 3


def test_31_a_file_that_is_rewritten_while_it_is_read_is_never_torn(
    place: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.path / "f"
    path.write_text("0000")
    original = hashing.read_digest
    numbers: Iterator[int] = iter(range(1, 100))

    def rewrite_then_read(descriptor: int, size: int) -> tuple[bytes, int]:
        path.write_text(f"{next(numbers):04}")
        return original(descriptor, size)

    monkeypatch.setattr(hashing, "read_digest", rewrite_then_read)
    found = place.scan()
    leaf = lookup(found.root, "f")
    assert isinstance(leaf, Leaf)
    assert (leaf.kind, leaf.reason) == (PROBLEM, "it is being written")
    assert found.requeue == {"f"}
    monkeypatch.undo()
    found = place.scan()
    assert found.root == tree({"f": path.read_text()})
    assert found.written_over == {"f"}


@pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")
def test_a_file_that_is_written_in_place_is_looked_at_again(place: Tree) -> None:
    """By another endpoint of the same tree: see wherry_sync.inplace."""
    path = place.path / "f"
    path.write_text("1")
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert kernel.claim(descriptor)
        found = place.scan()
        leaf = lookup(found.root, "f")
        assert isinstance(leaf, Leaf)
        assert (leaf.kind, leaf.reason) == (PROBLEM, "it is being written")
        assert found.requeue == {"f"}
    finally:
        os.close(descriptor)
    assert place.scan().root == tree({"f": "1"})


def test_what_was_written_over_is_known_from_what_was_replaced(place: Tree) -> None:
    write(place.path, {"a": "1", "b": "1", "c": "1", "d": {"e": "1"}})
    assert place.scan().written_over == set()
    (place.path / "a").write_text("22")
    (place.path / "d" / "e").write_text("22")
    (place.path / "new").write_text("22")
    (place.path / "new").rename(place.path / "b")
    assert place.scan().written_over == {"a", "d/e"}
    assert place.scan().written_over == set()


def test_ignored_paths_are_there_but_not_looked_into(tmp_path: Path) -> None:
    ignore = parse(["*.o", "!keep.o", "# comment", "", "/build/"], ["node_modules"])
    place = Tree(tmp_path / "root", ignore)
    write(
        place.path,
        {
            "a.o": "1",
            "keep.o": "1",
            "build": {"x": "1"},
            "d": {"build": {"x": "1"}, "node_modules": {"y": "1"}},
        },
    )
    wanted = {
        "a.o": IGNORED,
        "keep.o": "1",
        "build": IGNORED,
        "d": {"build": {"x": "1"}, "node_modules": IGNORED},
    }
    first = place.scan()
    assert first.root == tree(wanted)
    assert first.files_read == 2
    assert place.scan().root is first.root
    # What an ignored directory's name stands for may change.
    (place.path / "build" / "x").unlink()
    (place.path / "build").rmdir()
    (place.path / "build").write_text("now a file")
    assert lookup(place.scan().root, "build") == lookup(tree({"b": "now a file"}), "b")


def test_other_rules_hold_from_the_next_scan_on_and_read_nothing_twice(place: Tree) -> None:
    write(place.path, {"a.o": "1", "b.c": "1", "d": {"x.o": "1"}})
    place.scan()
    place.scanner.set_ignore(parse(["*.o"]))
    found = place.scan([])
    assert found.root == tree({"a.o": IGNORED, "b.c": "1", "d": {"x.o": IGNORED}})
    assert found.files_read == 0
    place.scanner.set_ignore(parse([]))
    assert place.scan().root == tree({"a.o": "1", "b.c": "1", "d": {"x.o": "1"}})


@pytest.mark.parametrize(
    "line", ["*", "**", "/*", "own", "own/", "/own", "!own", "a/own", "a/**", "**/own", "*.o", "a"]
)
@pytest.mark.parametrize("at", ["in", "a", "a/own", "a+b", "own"])
def test_a_directory_s_rules_are_about_what_is_in_it_alone(line: str, at: str) -> None:
    lines = ["*", line] if line.startswith("!") else [line]
    rules = parse(lines)
    around = below(at, rules)
    for path in ("own", "a", "a/own", "a/own/own", "x.o", "a/x.o", "other"):
        for is_directory in (False, True):
            assert around(f"{at}/{path}", is_directory) is rules(path, is_directory)
            outside = path if not f"{path}/".startswith(f"{at}/") else "other"
            assert not around(outside, is_directory)
            assert not around(f"{at}-{path}", is_directory)
            assert not around(f"x/{at}/{path}", is_directory)
    assert not around(at, True)


def test_only_dirty_directories_are_listed(place: Tree) -> None:
    write(place.path, {"a": {"f": "1"}, "b": {"c": {"f": "1"}, "g": "1"}})
    first = place.scan().root
    (place.path / "a" / "f").write_text("2")
    (place.path / "b" / "c" / "f").write_text("2")
    found = place.scan(["b/c"]).root
    assert found == tree({"a": {"f": "1"}, "b": {"c": {"f": "2"}, "g": "1"}})
    assert lookup(found, "a") is lookup(first, "a")
    assert place.scan(["a", "", "gone/away"]).root == tree(
        {"a": {"f": "2"}, "b": {"c": {"f": "2"}, "g": "1"}}
    )


def test_44_45_a_directory_put_in_anothers_place_is_listed_whole(place: Tree) -> None:
    write(place.path, {"a": {"x": {"f": "1"}}, "b": {"x": {"f": "2"}}})
    place.scan()
    (place.path / "a" / "x" / "f").unlink()
    (place.path / "a" / "x").rmdir()
    (place.path / "b" / "x").rename(place.path / "a" / "x")
    assert place.scan(["a", "b"]).root == tree({"a": {"x": {"f": "2"}}, "b": {}})
    (place.path / "a").rename(place.path / "c")
    assert place.scan([""]).root == tree({"b": {}, "c": {"x": {"f": "2"}}})


def test_25_a_hard_links_other_names_are_read_as_well(place: Tree) -> None:
    (place.path / "a").write_text("1")
    (place.path / "b").hardlink_to(place.path / "a")
    place.scan()
    (place.path / "a").write_text("2")
    assert place.scan().root == tree({"a": "2", "b": "2"})


def test_25_other_names_in_directories_that_are_not_dirty_are_read_as_well(place: Tree) -> None:
    write(place.path, {"a": {"f": "1", "x": "0"}, "b": {"c": {}}, "d": {"h": "9"}})
    first = place.path / "a" / "f"
    (place.path / "b" / "c" / "g").hardlink_to(first)
    (place.path / "b" / "e").hardlink_to(first)
    place.scan()
    first.write_text("2")
    found = place.scan(["a"])
    wanted = {"a": {"f": "2", "x": "0"}, "b": {"c": {"g": "2"}, "e": "2"}, "d": {"h": "9"}}
    assert found.root == tree(wanted)
    assert found.files_read == 3
    # One that got a second name, through which it was written, was not known to be linked.
    (place.path / "z").hardlink_to(place.path / "d" / "h")
    (place.path / "z").write_text("8")
    assert place.scan([""]).root == tree({**wanted, "d": {"h": "8"}, "z": "8"})
    assert place.scan([""]).files_read == 0


def test_25_other_names_of_a_file_that_had_no_record_are_read_as_well(tmp_path: Path) -> None:
    """They were written within the clock's granularity, and the names are read one by one."""
    write(tmp_path, {"a": {}, "b": {"g": "1"}})
    (tmp_path / "a" / "f").hardlink_to(tmp_path / "b" / "g")
    scanner = Scanner(granularity_ns=records.COARSE_NS, now_ns=lambda: 0)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        scanner.scan(fd)
        for text in ("2", "3"):
            (tmp_path / "a" / "f").write_text(text)
            found = scanner.scan(fd, ["a"])
            assert found.root == tree({"a": {"f": text}, "b": {"g": text}})
            assert found.files_read == 2
    finally:
        os.close(fd)


def scribble(path: Path, text: str) -> None:
    """Write so that nothing tells it: as if through a page that was dirty at the last scan."""
    status = path.stat()
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_55_a_rewritten_file_is_read_whatever_its_record_says(
    place: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place.path, {"a": {"f": "1", "g": "1", "s": {"h": "1"}}, "b": {}})
    (place.path / "b" / "f").hardlink_to(place.path / "a" / "f")
    # A file's time of change cannot be set back, so here nobody looks at it.
    without_change = SimpleNamespace(
        pack=lambda *values: STATUS_PACK(*values[:4], 0), size=records.STATUS.size
    )
    monkeypatch.setattr(records, "STATUS", without_change)
    place.scan()
    scribble(place.path / "a" / "f", "2")
    assert place.scan().files_read == 0
    before = {"a": {"f": "2", "g": "1", "s": {"h": "1"}}, "b": {"f": "2"}}
    found = place.scan([], ("a/f", "a/s", "a/gone", "no/where", "a/g"))
    assert found.root == tree(before)
    assert found.files_read == 3
    scribble(place.path / "b" / "f", "3")
    found = place.scan(None, ("b/f",))
    assert found.root == tree({**before, "a": {**before["a"], "f": "3"}, "b": {"f": "3"}})
    assert found.files_read == 2
    assert place.scan([""]).files_read == 0


def test_55_a_rewritten_single_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("1")
    scanner = Scanner(granularity_ns=0)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        read = [scanner.scan_file(fd, "f", rewritten=told).files_read for told in (False,) * 2]
        assert read == [1, 0]
        assert scanner.scan_file(fd, "f", rewritten=True).files_read == 1
    finally:
        os.close(fd)


# Trees as values

leaves = st.one_of(
    st.builds(file, st.booleans(), st.integers(0, 1 << 40), st.binary(min_size=32, max_size=32)),
    st.builds(link, st.binary(min_size=1, max_size=20)),
)
entries = st.recursive(
    leaves,
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner).map(Directory),
    max_leaves=10,
)


@given(st.booleans(), st.integers(0, 1 << 60), st.binary(min_size=32, max_size=32))
def test_a_leaf_tells_what_it_was_made_of(executable: bool, size: int, digest: bytes) -> None:
    leaf = file(executable, size, digest)
    assert (leaf.executable, leaf.size, leaf.digest) == (executable, size, digest)
    assert leaf.with_executable(not executable).digest == digest


@given(entries, entries)
@settings(deadline=None)
def test_sharing_changes_nothing_but_identity(new: Entry, old: Entry) -> None:
    assert share(new, old) == new
    copy = updated(new, {"": new})
    assert share(copy, new) is new


@given(st.lists(st.tuples(st.text("ab/", min_size=1, max_size=5), leaves | st.none())))
@settings(deadline=None)
def test_changes_at_once_are_as_one_after_another(
    changes: list[tuple[str, Leaf | None]],
) -> None:
    valid = {path: entry for path, entry in changes if all(part for part in path.split("/"))}
    # One path must not be below another: then order would matter.
    apart = {
        path: entry
        for path, entry in valid.items()
        if not any(path.startswith(f"{other}/") for other in valid)
    }
    one_by_one: Entry | None = EMPTY
    for path, entry in apart.items():
        if entry is not None:
            one_by_one = updated(one_by_one, {path: entry})
    wanted = {path: entry for path, entry in apart.items() if entry is not None}
    assert updated(EMPTY, wanted) == one_by_one
    assert count(updated(EMPTY, dict.fromkeys(apart))) == 1
