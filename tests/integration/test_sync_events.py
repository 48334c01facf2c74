"""What programs that watch a tree are told by the kernel when changes are applied to it."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sync_pair import Pair, scratch
from sync_trees import read, text, tree, write
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from wherry_sync import kernel
from wherry_sync.entry import Leaf, is_file
from wherry_sync.local import LocalEndpoint
from wherry_sync.operation import DONE, STALE, Arrival, Operation, Result

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify")

MTIME_NS = 1_600_000_000_123_456_789
CONTENTS = {text(value).digest: value.encode() for value in ("1", "2", "1 and more")}

# include/uapi/linux/inotify.h
NAMES = {
    0x2: "MODIFY",
    0x8: "CLOSE_WRITE",
    0x40: "MOVED_FROM",
    0x80: "MOVED_TO",
    0x100: "CREATE",
    0x200: "DELETE",
}
DIRECTORY = 0x40000000
LEFT_AND_CAME = ["MOVED_FROM", "MOVED_TO"]


class Watcher:
    """An inotify instance that watches one directory."""

    def __init__(self, directory: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._fd = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if library.inotify_add_watch(self._fd, os.fsencode(directory), sum(NAMES)) < 0:
            raise OSError(ctypes.get_errno(), "it cannot be watched", os.fspath(directory))

    def close(self) -> None:
        os.close(self._fd)

    def take(self) -> dict[str, list[str]]:
        """Return the events of each name since the last call.

        They are queued before the system call that causes them returns, so none is still to
        come.
        """
        found: dict[str, list[str]] = {}
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return found
            offset = 0
            while offset < len(data):
                _, mask, _, length = struct.unpack_from("iIII", data, offset)
                name = data[offset + 16 : offset + 16 + length].rstrip(b"\0").decode()
                offset += 16 + length
                found.setdefault(name, []).append(NAMES[mask & ~DIRECTORY])


class Place:
    """A tree, its endpoint, and a watcher of the tree's root."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.root.mkdir()
        self.action: Callable[[str], None] = lambda point: None
        self.end = LocalEndpoint(
            os.fspath(self.root),
            os.fspath(directory / "stage"),
            "boot",
            checkpoint=lambda point: self.action(point),
        )
        self.watcher = Watcher(self.root)

    def close(self) -> None:
        self.watcher.close()
        self.end.close()

    def have(self, value: object) -> None:
        """Begin with this at ``p``, of which no event is told."""
        write(self.root, {} if value is None else {"p": value})
        self.end.scan()
        self.watcher.take()

    def one(self, before: object, after: object, *, staged: bool = False) -> Result:
        """Have ``p`` become something else, whose contents come before or with the operation."""
        entry = tree(after)
        arriving = []
        if is_file(entry):
            assert isinstance(entry, Leaf)
            chunks = [CONTENTS[entry.digest]]
            if staged:
                self.end.stage_all([(entry, MTIME_NS, chunks)])
            else:
                arriving = [Arrival(0, MTIME_NS, chunks, None)]
        (result,) = self.end.apply([Operation("p", tree(before), entry)], arriving)
        return result

    def told(self) -> list[str]:
        """Return the events of ``p``; there are none of any other name."""
        events = self.watcher.take()
        assert events.keys() <= {"p"}
        return events.get("p", [])


@pytest.fixture(params=["disk", "memory"])
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on the disk's filesystem, and one on tmpfs."""
    if request.param == "disk":
        yield tmp_path
        return
    made = scratch()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def place(directory: Path) -> Iterator[Place]:
    made = Place(directory)
    yield made
    made.close()


@pytest.mark.parametrize("staged", [False, True], ids=["along", "staged"])
@pytest.mark.parametrize(
    ("before", "after", "events"),
    [
        ("1", "2", LEFT_AND_CAME),
        ("1", "->y", LEFT_AND_CAME),
        ("->x", "2", LEFT_AND_CAME),
        ("->x", "->y", LEFT_AND_CAME),
        ("1", "1 and more", ["MODIFY", "CLOSE_WRITE"]),
        (None, "2", ["MOVED_TO"]),
        (None, "->y", ["MOVED_TO"]),
        ({}, "2", ["DELETE", "MOVED_TO"]),
        ("1", {}, ["MOVED_FROM", "CREATE"]),
        ("1", None, ["MOVED_FROM"]),
        ("->x", None, ["MOVED_FROM"]),
        ({}, None, ["DELETE"]),
    ],
)
def test_the_last_event_of_a_name_says_whether_it_is_there(
    place: Place, before: object, after: object, events: list[str], staged: bool
) -> None:
    place.have(before)
    assert place.one(before, after, staged=staged).status == DONE
    assert place.told() == events
    assert read(place.root) == ({} if after is None else {"p": after})


@pytest.mark.parametrize(("after", "moves"), [("2", 2), (None, 1)])
def test_what_is_put_back_is_told_to_be_there(place: Place, after: object, moves: int) -> None:
    place.have("1")

    def action(point: str) -> None:
        if point in ("exchange", "displace"):
            (place.root / "p").write_text("mine")
            place.watcher.take()

    place.action = action
    assert place.one("1", after).status == STALE
    assert place.told() == LEFT_AND_CAME * moves
    assert read(place.root) == {"p": "mine"}


def test_a_filesystem_that_cannot_exchange_tells_so_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "exchange", lambda *arguments: False)
    place.have("1")
    assert place.one("1", "2").status == DONE
    assert place.told() == ["MOVED_TO"]


def test_what_a_host_does_is_told_in_the_guest(directory: Path) -> None:
    pair = Pair(directory)
    write(pair.host, {"saved": "1", "gone": "2", "old": {"in": "3"}})
    pair.settle()
    watcher = Watcher(pair.guest)
    try:
        (pair.host / ".saved.swp").write_text("4")
        (pair.host / ".saved.swp").rename(pair.host / "saved")
        (pair.host / "gone").unlink()
        (pair.host / "made").write_text("5")
        (pair.host / "old").rename(pair.host / "new")
        pair.settle()
        assert read(pair.guest) == {"saved": "4", "made": "5", "new": {"in": "3"}}
        assert watcher.take() == {
            "saved": LEFT_AND_CAME,
            "gone": ["MOVED_FROM"],
            "made": ["MOVED_TO"],
            "old": ["DELETE"],
            "new": ["CREATE"],
        }
    finally:
        watcher.close()
        pair.close()


class Told(FileSystemEventHandler):
    """Keeps the kinds of watchdog's events by name."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[str]] = {}
        self.ended = threading.Event()

    def on_any_event(self, event: FileSystemEvent) -> None:
        name = Path(os.fsdecode(event.src_path)).name
        if event.is_directory or event.event_type not in ("created", "deleted", "moved"):
            return
        self.kinds.setdefault(name, []).append(event.event_type)
        if name == "end":
            self.ended.set()


def test_watchdog_takes_no_saved_file_for_a_deleted_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    told = Told()
    observer = Observer()
    write(place.root, {"saved": "1", "gone": "1"})
    place.end.scan()
    observer.schedule(told, os.fspath(place.root), recursive=True)
    observer.start()
    try:
        place.end.stage_all([(text("2"), MTIME_NS, [b"2"])])
        operations = [
            Operation("gone", text("1"), None),
            Operation("made", None, text("2")),
            Operation("saved", text("1"), text("2")),
        ]
        results = place.end.apply(operations)
        assert [result.status for result in results] == [DONE] * 3
        # Its event comes after all others: watchdog holds back what follows a file that left.
        (place.root / "end").write_text("")
        assert told.ended.wait(20)
    finally:
        observer.stop()
        observer.join()
        place.close()
    assert told.kinds == {
        "gone": ["deleted"],
        "made": ["created"],
        "saved": ["deleted", "created"],
        "end": ["created"],
    }
