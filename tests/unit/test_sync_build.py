"""Making what is new, many at a time: complete or not at all, and never over something."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from sync_pair import scratch
from sync_trees import read, text, tree

from wherry.sync.core.plan import plan
from wherry.sync.core.reconcile import reconcile
from wherry_sync import build, kernel, records, wire
from wherry_sync.apply import Policy
from wherry_sync.diff import diff
from wherry_sync.entry import EMPTY, Leaf, is_file
from wherry_sync.local import LocalEndpoint
from wherry_sync.operation import DONE, FAILED, STALE, Arrival, Operation, Result
from wherry_sync.stage import Damaged
from wherry_wire.frames import Decoder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="directory descriptors")

MTIME_NS = 1_600_000_000_123_456_789
TREE: dict[str, object] = {
    "alone": "1",
    "new": {"a": "1", "below": {"b": "2", "tool": "3*", "empty": {}}, "link": "->a", "z": ""},
    "other": {"c": "4"},
}
VALUES = {text(value).digest: value.encode() for value in ("", "1", "2", "3", "4")}


class Crash(BaseException):
    """The process ends here."""


class Place:
    """A tree and its endpoint."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.stage = directory / "stage"
        self.root.mkdir()
        self.action: Callable[[str], None] = lambda point: None
        self.policy = Policy(0o640, 0o750)
        self.open()

    def open(self, *, told: bool = False) -> None:
        self.end = LocalEndpoint(
            os.fspath(self.root),
            os.fspath(self.stage),
            "boot",
            policy=self.policy,
            checkpoint=lambda point: self.action(point),
            told=told,
        )

    def build(self, value: dict[str, object], **options: bool) -> dict[str, Result]:
        operations = creating(value)
        results = self.end.build(operations, contents(operations), **options)
        assert [result.operation for result in results] == operations
        return {result.operation.path: result for result in results}

    def rubbish(self) -> list[str]:
        return [path.name for path in self.stage.iterdir() if path.name != "journal"]


@pytest.fixture
def place() -> Iterator[Place]:
    directory = scratch()
    made = Place(directory)
    yield made
    made.end.close()
    shutil.rmtree(directory)


def creating(value: dict[str, object]) -> list[Operation]:
    found = diff(EMPTY, tree(value))
    order = sorted(found, key=lambda path: path.split("/"))
    return [Operation(path, None, found[path]) for path in order]


def contents(operations: list[Operation]) -> Iterator[tuple[int, int, Iterable[bytes]]]:
    for number in build.needed(operations):
        after = operations[number].after
        assert isinstance(after, Leaf)
        yield number, MTIME_NS, [VALUES[after.digest]]


def test_all_of_it_is_there_with_its_modes_and_times(place: Place) -> None:
    results = place.build(TREE)
    assert {result.status for result in results.values()} == {DONE}
    assert read(place.root) == TREE
    for path, mode in (("new/a", 0o640), ("new/below/tool", 0o750), ("new/below", 0o750)):
        assert (place.root / path).stat().st_mode & 0o7777 == mode
    assert (place.root / "new" / "a").stat().st_mtime_ns == MTIME_NS
    assert not place.rubbish()


def test_what_was_built_is_not_read_again_but_a_write_after_it_is_seen(place: Place) -> None:
    value = {"new": {f"f{number}": "1" for number in range(build._WORTH_WAITING)}}
    place.build(value)
    path = place.root / "new" / "f3"
    path.write_text("2")
    # Whoever sets the time back does not hide it.
    os.utime(path, ns=(MTIME_NS, MTIME_NS))
    found = place.end.scan()
    assert found.files_read == 1
    assert found.root == tree({"new": {**value["new"], "f3": "2"}})


def test_where_writes_are_told_nothing_of_ours_is_read_again_but_what_was_written_to(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.end.close()
    # As on a filesystem on which changes in a row have the same time.
    monkeypatch.setattr(records, "granularity_ns", lambda *arguments: 60_000_000_000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    place.open(told=True)
    place.end.scan()
    place.build({"a": "1", "b": "1"})
    change = Operation("a", text("1"), text("2"))
    (done,) = place.end.apply([change], [Arrival(0, MTIME_NS, [b"2"])])
    assert done.status == DONE
    assert place.end.scan(()).files_read == 0
    place.build({"c": "1", "d": "1"})
    assert place.end.scan((), ("c",)).files_read == 1
    place.build({"e": "1", "f": "1"})
    # And c, which was read too soon after it was made.
    assert place.end.scan((), lost=True).files_read == 3


@pytest.mark.parametrize("there", ["file", "directory", "link"])
def test_what_somebody_made_meanwhile_stays(place: Place, there: str) -> None:
    def meddle(point: str) -> None:
        if point == "place" and not os.path.lexists(place.root / "new"):
            target = place.root / "new"
            if there == "file":
                target.write_text("theirs")
            elif there == "directory":
                target.mkdir()
            else:
                target.symlink_to("/nowhere")

    place.action = meddle
    results = place.build(TREE)
    expected: object = {"file": "theirs", "directory": {}, "link": "->/nowhere"}[there]
    assert read(place.root) == {**TREE, "new": expected}
    assert {path for path, result in results.items() if result.status == STALE} == {
        path for path in results if path.split("/")[0] == "new"
    }
    assert not place.rubbish()


def test_a_directory_that_is_there_already_is_filled(place: Place) -> None:
    (place.root / "new").mkdir()
    (place.root / "new" / "ignored").write_text("theirs")
    results = place.build(TREE)
    assert {result.status for result in results.values()} == {DONE}
    assert read(place.root)["new"] == {**TREE["new"], "ignored": "theirs"}  # type: ignore[dict-item]


def test_a_file_that_is_there_already_stays(place: Place) -> None:
    (place.root / "alone").write_text("theirs")
    assert place.build(TREE)["alone"].status == STALE
    assert read(place.root) == {**TREE, "alone": "theirs"}


def test_contents_that_are_others_or_missing_leave_their_file_out_alone(place: Place) -> None:
    operations = creating(TREE)
    given = []
    for number, mtime_ns, chunks in contents(operations):
        path = operations[number].path
        if path == "new/a":
            given.append((number, mtime_ns, [b"9"]))
        elif path != "alone":
            given.append((number, mtime_ns, chunks))
    results = {
        result.operation.path: result.status for result in place.end.build(operations, given)
    }
    assert {path for path, status in results.items() if status != DONE} == {"new/a", "alone"}
    assert not (place.root / "new" / "a").exists()
    assert (place.root / "new" / "below" / "b").read_text() == "2"


def test_an_end_that_fails_ends_it_and_nothing_is_there(place: Place) -> None:
    operations = creating(TREE)

    def chunks() -> Iterator[bytes]:
        yield b""
        raise OSError("the connection was lost")

    given = [
        (number, mtime_ns, chunks() if operations[number].path == "new/z" else found)
        for number, mtime_ns, found in contents(operations)
    ]
    with pytest.raises(OSError, match="lost"):
        place.end.build(operations, given)
    assert read(place.root) == {}
    # The end itself lives on, as the host's does when the guest is gone.
    place.build(TREE)
    assert read(place.root) == TREE
    assert not place.rubbish()


def test_a_crash_at_any_point_leaves_whole_directories_and_no_rubbish(place: Place) -> None:
    points = 0
    for crash_at in range(100):
        left = crash_at

        def tick(point: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        place.action = tick
        try:
            place.build(TREE)
        except Crash:
            points += 1
            place.action = lambda point: None
            place.end.close()
            place.open()
            assert not place.rubbish()
            found = read(place.root)
            assert found.items() <= TREE.items()
            shutil.rmtree(place.root)
            place.root.mkdir()
        else:
            break
    assert points > 10
    assert read(place.root) == TREE


def test_without_special_renames(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "rename_exclusive", lambda *_: False)
    assert {result.status for result in place.build(TREE).values()} == {DONE}
    assert read(place.root) == TREE
    assert not place.rubbish()
    results = place.build(TREE)
    assert {path for path, result in results.items() if result.status == STALE} == {
        path for path, operation in ((r.operation.path, r.operation) for r in results.values())
        if operation.after != EMPTY
    }  # fmt: skip
    assert read(place.root) == TREE


@pytest.mark.parametrize("path", ["../out", "a/../../out", ".wherry-x", "", "/out"])
def test_a_path_that_is_none_of_the_tree_is_refused(place: Place, path: str) -> None:
    operation = Operation(path, None, text("1"))
    (result,) = place.end.build([operation], [(0, MTIME_NS, [b"1"])])
    assert result.status in (FAILED, STALE)
    assert not list(place.root.iterdir())


def test_a_parent_that_is_a_link_is_not_followed(place: Place) -> None:
    outside = place.root.parent / "outside"
    outside.mkdir()
    (place.root / "way").symlink_to(outside)
    operation = Operation("way/file", None, text("1"))
    (result,) = place.end.build([operation], [(0, MTIME_NS, [b"1"])])
    assert result.status == STALE
    assert not list(outside.iterdir())


def test_a_large_file_that_comes_again_is_sent_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "REPEATED_BYTES", 0)
    value: dict[str, object] = {"one": {"a": "1", "b": "2"}, "two": {"a": "1", "c": "1*"}}
    operations = creating(value)
    sent = [operations[number].path for number in build.needed(operations)]
    assert sent == ["one/a", "one/b"]
    place.build(value)
    assert read(place.root) == value
    assert (place.root / "two" / "c").stat().st_mtime_ns == MTIME_NS


def test_a_renamed_directory_is_not_built(place: Place) -> None:
    before = tree({"old": {"a": "1", "b": "2"}, "x": {"y": "1"}})
    after = tree({"new": {"a": "1", "b": "3"}, "x": {"y": "1"}, "fresh": {"c": "4"}})
    found = reconcile(before, after, before)
    todo = plan(found.decisions, lambda decision: decision.guest)
    assert {operation.path for operation in todo.builds} == {"fresh", "fresh/c"}
    assert [want.local for want in todo.wants if want.path == "new/a"] == ["old/a"]
    assert all(
        not is_file(operation.before) or not operation.after for operation in todo.operations
    )


def test_a_file_that_changes_while_it_is_sent_is_called_off() -> None:
    def changing() -> Iterator[bytes]:
        yield bytes(wire.CHUNK_BYTES)
        yield b"x"
        raise Damaged("it has changed")

    def at_once() -> Iterator[bytes]:
        yield b"small"
        raise Damaged("it has changed")

    files: list[tuple[bytes, int, Iterable[bytes]]] = [
        (b"1", 0, [b"one"]), (b"2", 0, changing()), (b"3", 0, at_once()), (b"4", 0, [b"four"]),
    ]  # fmt: skip
    payloads = [frame.payload for frame in Decoder().feed(b"".join(wire.contents(files)))]
    frames = iter([*payloads, None])
    found = {}
    for key, _, chunks in wire.Contents(lambda: next(frames)):
        try:
            found[key] = b"".join(chunks)
        except Damaged:
            found[key] = b"damaged"
    assert found == {b"1": b"one", b"2": b"damaged", b"4": b"four"}
