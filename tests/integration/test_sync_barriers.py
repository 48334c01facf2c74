"""What a barrier promises, with everything against it that can be had without a guest."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sync_guest import Guest, Stream
from sync_trees import read, write

from wherry.core.errors import WherryError
from wherry.platform import current
from wherry.platform.base import ChangeSink, TreeWatcher
from wherry.sync import barrier, flushing, session, watch
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.model import Paths, Root
from wherry.sync.progress import Progress
from wherry.sync.remote import Place, RemoteEndpoint
from wherry.sync.session import Session
from wherry_sync import handles, hashing, kernel
from wherry_sync.local import LocalEndpoint
from wherry_wire.messages import SyncBusy, SyncOpened, SyncYes, pack

pytestmark = pytest.mark.timeout(120)

WAIT_S = 30.0
HOUR_NS = 3_600_000_000_000


class Pair:
    """A host's directory and the session that keeps it equal to the guest's."""

    def __init__(
        self, directory: Path, silence_s: float = WAIT_S, host: Path | None = None
    ) -> None:
        self.guest = Guest(directory / "guest")
        self.host = host or directory / "host"
        self.host.mkdir(exist_ok=True)
        place = Place("r1", str(self.host))
        self.there = self.guest.tree(place)
        self.session = Session(
            Root(1, self.host, place),
            Paths(directory / "state", directory / "sync.db"),
            lambda place, ordered, progress: RemoteEndpoint(
                Stream(self.guest.connect()),
                place,
                ordered=ordered,
                progress=progress,
                silence_s=silence_s,
            ),
            boot="host-1",
            writes=True,
        )
        self.guest.sessions[:] = [self.session]

    def barrier(self, *, fresh: bool) -> None:
        ticket = self.session.ask(fresh=fresh)
        assert ticket.done.wait(WAIT_S), "the barrier neither held nor failed"
        ticket.check()

    def close(self) -> None:
        self.session.close()
        self.guest.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def test_52_53_a_thousand_rounds_without_a_stale_byte(pair: Pair) -> None:
    """One writes, the other reads, in turn: the same size, so that only contents tell."""
    for number in range(1000):
        mine, other = (pair.host, pair.there) if number % 2 else (pair.there, pair.host)
        name = f"f{number % 7}"
        if mine is pair.there and not mine.exists():
            continue
        (mine / name).write_text(f"{number:06}")
        pair.barrier(fresh=mine is pair.host)
        assert (other / name).read_text() == f"{number:06}"


class Busy:
    """A stream on which the guest is at work on its first scan, for ever; it says where."""

    def __init__(self, paths: Iterator[str]) -> None:
        self._frames = iter(
            [
                pack(SyncOpened(boot_id="guest-1", packed=False), 0),
                pack(SyncYes(done=True), 0),
            ]
        )
        self._paths = paths
        self._closed = threading.Event()

    def recv(self, size: int, /) -> bytes:
        frame = next(self._frames, None)
        if frame is None:
            closed = self._closed.wait(0.05)
            frame = b"" if closed else pack(SyncBusy(path=next(self._paths)), 0)
        return frame

    def sendall(self, data: bytes, /) -> None:
        pass

    def close(self) -> None:
        self._closed.set()


def test_a_guest_that_does_not_get_on_ends_the_wait_by_the_path_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file is that is longer than can be read while a program writes it all the time."""
    monkeypatch.setattr(barrier, "_SLICE_S", 0.05)
    monkeypatch.setattr(barrier, "BUSY_STALL_S", 0.5)
    monkeypatch.setattr(session, "_JOIN_S", 0.1)
    (tmp_path / "host").mkdir()
    place = Place("r1", str(tmp_path / "host"))
    names = itertools.chain((f"d/{number}" for number in range(20)), itertools.repeat("d/base"))
    busy = Session(
        Root(1, tmp_path / "host", place),
        Paths(tmp_path / "state", tmp_path / "sync.db"),
        lambda place, ordered, progress: RemoteEndpoint(Busy(names), place, progress=progress),
        boot="host-1",
    )
    try:
        with pytest.raises(WherryError, match="makes no progress at d/base, which is being read"):
            barrier.hold([busy], fresh=True)
        # While it got on there was no reason to give up.
        assert next(names) == "d/base"
    finally:
        busy.close()


class Deaf:
    """A watcher that loses one event in ten and says nothing of it."""

    def __init__(self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]) -> None:
        self._sink = sink
        self._random = random.Random(63)
        self._watcher = current().watch_tree(root, self, skipped)
        self.exact = False

    def dirty(self, directory: str) -> None:
        if self._random.random() > 0.1:
            self._sink.dirty(directory)

    def __getattr__(self, name: str) -> Any:
        target = self._watcher if name in ("catch_up", "close") else self._sink
        return getattr(target, name)


def test_63_a_watcher_that_loses_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of macOS and Windows may: a barrier looks for itself."""

    class Platform:
        def watch_tree(
            self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]
        ) -> TreeWatcher:
            return Deaf(root, sink, skipped)

    monkeypatch.setattr(watch, "current", Platform)
    pair = Pair(tmp_path)
    try:
        for number in range(100):
            directory = pair.host / f"d{number % 10}"
            directory.mkdir(exist_ok=True)
            (directory / "f").write_text(f"{number:06}")
            pair.barrier(fresh=True)
            assert read(pair.there) == read(pair.host), number
    finally:
        pair.close()


def test_what_no_watch_tells_of_is_found_however_much_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is looked at now and then, also while there is always something to do."""

    class Deafer(Deaf):
        def dirty(self, directory: str) -> None:
            if directory != "deaf":
                self._sink.dirty(directory)

    class Platform:
        def watch_tree(
            self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]
        ) -> TreeWatcher:
            return Deafer(root, sink, skipped)

    monkeypatch.setattr(watch, "current", Platform)
    monkeypatch.setattr(session, "_CHECK_S", 2.0)
    pair = Pair(tmp_path)
    (pair.host / "deaf").mkdir()
    pair.barrier(fresh=True)
    (pair.host / "deaf" / "f").write_text("f")
    try:
        deadline = time.monotonic() + 15
        number = 0
        while not (pair.there / "deaf" / "f").exists():
            assert time.monotonic() < deadline
            number += 1
            # Neither half-written nor written again, after which everything is looked at as well.
            (tmp_path / "new").write_text(str(number))
            (tmp_path / "new").rename(pair.host / f"busy{number}")
            time.sleep(0.02)
    finally:
        pair.close()


def test_25_a_write_by_a_name_outside_of_the_root(pair: Pair) -> None:
    """No watch of the root hears of it; package managers link like this."""
    outside = pair.host.parent / "store"
    outside.write_text("one")
    (pair.host / "in").mkdir()
    os.link(outside, pair.host / "in" / "f")
    pair.barrier(fresh=True)
    for text in ("two", "three"):
        outside.write_text(text)
        pair.barrier(fresh=True)
        assert (pair.there / "in" / "f").read_text() == text
    (pair.host / "in" / "f").rename(pair.host / "g")
    (pair.host / "in").rmdir()
    pair.barrier(fresh=True)
    outside.write_text("four")
    pair.barrier(fresh=True)
    assert read(pair.there) == {"g": "four"}


def test_25_a_write_in_the_guest_by_a_name_outside_of_the_copy(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No watch of the copy hears of it, so the guest, too, looks at everything now and then."""
    outside = pair.guest.directory / "store"
    (pair.host / "d").mkdir()
    pair.barrier(fresh=True)
    outside.write_text("one")
    os.link(outside, pair.there / "d" / "f")
    pair.barrier(fresh=False)
    monkeypatch.setattr(flushing, "_CALM_S", 0.1)
    monkeypatch.setattr(flushing, "_ASK_S", 0.1)
    monkeypatch.setattr(session, "_CHECK_S", 0.1)
    outside.write_text("two")
    deadline = time.monotonic() + 15
    while (pair.host / "d" / "f").read_text() != "two":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def slow_disk(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A flush of the host's disk that goes on until the event is set."""
    monkeypatch.setattr(flushing, "_CALM_S", 0.0)
    monkeypatch.setattr(flushing, "_ASK_S", 0.01)
    begun, release = threading.Event(), threading.Event()

    def flush(fd: int) -> None:
        begun.set()
        assert release.wait(30)

    monkeypatch.setattr(kernel, "flush", flush)
    (pair.host / "f").write_text("1")
    pair.barrier(fresh=True)
    assert begun.wait(10)
    yield release
    release.set()


def test_nobody_waits_for_the_disk(pair: Pair, slow_disk: threading.Event) -> None:
    """To write all that others have in the page cache may take long."""
    for number in range(3):
        (pair.host / "f").write_text(str(number))
        pair.barrier(fresh=True)
        assert (pair.there / "f").read_text() == str(number)
    assert not pair.session._flushing.is_idle
    slow_disk.set()
    deadline = time.monotonic() + 15
    while not pair.session._flushing.is_idle:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_cannot_be_watched_is_looked_at_while_a_disk_is_written(
    pair: Pair, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_POLL_S", 0.1)
    found = pair.session._watch
    assert found is not None
    found.close()
    found.failed("no watch")
    pair.barrier(fresh=True)
    (pair.host / "f").write_text("2")
    deadline = time.monotonic() + 10
    while (pair.there / "f").read_text() != "2":
        assert time.monotonic() < deadline, "nobody looked"
        time.sleep(0.01)


def test_a_directory_that_is_made_where_one_was_removed(pair: Pair) -> None:
    """It may have that one's inode, and so look like the known one with all that was in it."""
    for mine, other in ((pair.there, pair.host), (pair.host, pair.there)) * 2:
        (mine / "d" / "e").mkdir(parents=True)
        (mine / "d" / "e" / "f").write_text("1")
        pair.barrier(fresh=True)
        assert read(other) == {"d": {"e": {"f": "1"}}}
        shutil.rmtree(mine / "d")
        (mine / "d").mkdir()
        pair.barrier(fresh=True)
        assert read(other) == {"d": {}}


def test_a_directory_that_was_away_while_there_was_no_scan(pair: Pair) -> None:
    """What happened in it was told by another path, where it is no more."""
    write(pair.host, {"d": {"e": {"f": "1"}}})
    for _ in range(2):  # the second one looks at what the first one made
        pair.barrier(fresh=True)
    is_busy, go_on = threading.Event(), threading.Event()

    def keep_busy(conflicts: object) -> None:
        is_busy.set()
        go_on.wait(WAIT_S)

    busy = threading.Thread(target=pair.session.do, args=[keep_busy])
    busy.start()
    assert is_busy.wait(WAIT_S)
    (pair.there / "d").rename(pair.there / "t")
    (pair.there / "t" / "e" / "f").write_text("2")
    time.sleep(0.3)  # the agent has been told by then
    (pair.there / "t").rename(pair.there / "d")
    go_on.set()
    busy.join()
    pair.barrier(fresh=False)
    assert read(pair.host) == {"d": {"e": {"f": "2"}}}


@pytest.mark.parametrize("how", ["parent", "link", "root"])
def test_a_root_that_is_another_directory_now(tmp_path: Path, how: str) -> None:
    """A directory above it was renamed, or a link to it leads elsewhere: it has no event."""
    for name in ("one", "two"):
        write(tmp_path / name, {"host": {"d": {"f": name}, f"only-{name}": ""}})
    now = tmp_path / "now"
    end = "host" if how == "root" else ""
    if how == "parent":
        (tmp_path / "one").rename(now)
    else:
        now.symlink_to(tmp_path / "one" / end)
    pair = Pair(tmp_path, host=now if end else now / "host")
    try:
        pair.barrier(fresh=True)
        assert read(pair.there) == {"d": {"f": "one"}, "only-one": ""}
        if how == "parent":
            now.rename(tmp_path / "old")
            (tmp_path / "two").rename(now)
        else:
            (tmp_path / "new").symlink_to(tmp_path / "two" / end)
            (tmp_path / "new").rename(now)
        pair.barrier(fresh=True)
        assert read(pair.there) == {"d": {"f": "two"}, "only-two": ""}
        # And from here on it is this one that is watched.
        (pair.host / "d" / "f").write_text("edited")
        pair.barrier(fresh=True)
        assert (pair.there / "d" / "f").read_text() == "edited"
        (pair.there / "g").write_text("g")
        pair.barrier(fresh=False)
        assert (pair.host / "g").read_text() == "g"
    finally:
        pair.close()


def test_56_a_connection_that_is_cut_in_a_barrier(pair: Pair) -> None:
    pair.barrier(fresh=True)
    (pair.host / "large").write_bytes(os.urandom(40_000_000))
    ticket = pair.session.ask(fresh=True)
    while pair.session.status().bytes_moved < 1_000_000 and not ticket.done.is_set():
        time.sleep(0.001)
    pair.guest.allowed = False
    began = time.monotonic()
    pair.guest.cut()
    assert ticket.done.wait(5)
    assert time.monotonic() - began < 5
    with pytest.raises(WherryError, match=f"{pair.host} is not synchronised"):
        ticket.check()
    pair.guest.allowed = True
    assert pair.session.ask(fresh=True).done.wait(WAIT_S)


def test_56_a_guest_that_stops_in_a_barrier(tmp_path: Path) -> None:
    """It keeps the connection and says nothing, as one that is out of memory does."""
    pair = Pair(tmp_path, silence_s=0.5)
    try:
        pair.barrier(fresh=True)
        pair.guest.process.send_signal(signal.SIGSTOP)
        (pair.host / "f").write_text("f")
        began = time.monotonic()
        with pytest.raises(WherryError, match=f"{pair.host} is not synchronised"):
            pair.barrier(fresh=True)
        assert time.monotonic() - began < 10
    finally:
        pair.guest.process.send_signal(signal.SIGCONT)
        pair.close()


def test_57_a_conflict_is_named(pair: Pair) -> None:
    pair.barrier(fresh=True)
    for number in range(2):
        count = pair.session.conflict_count
        # While the guest's end stands still, neither hears of the other's change.
        pair.guest.process.send_signal(signal.SIGSTOP)
        (pair.host / f"f{number}").write_text("host")
        (pair.there / f"f{number}").write_text("guest")
        pair.guest.process.send_signal(signal.SIGCONT)
        pair.barrier(fresh=False)
        assert pair.session.conflicts_since(count) == [str(pair.host / f"f{number}")]
        assert (pair.there / f"f{number}").read_text() == "host"


def test_57_a_conflict_that_comes_again_is_named_again(pair: Pair) -> None:
    """With the same bytes in the container, as of a program that runs once more."""
    pair.barrier(fresh=True)
    for number in range(2):
        count = pair.session.conflict_count
        pair.guest.process.send_signal(signal.SIGSTOP)
        (pair.host / "f").write_text(f"host {number}")
        (pair.there / "f").write_text("guest")
        pair.guest.process.send_signal(signal.SIGCONT)
        pair.barrier(fresh=False)
        assert pair.session.conflicts_since(count) == [str(pair.host / "f")]
        assert pair.session.status().conflicts == 1


@contextlib.contextmanager
def failing(pair: Pair, side: int, match: str) -> Iterator[None]:
    """Each barrier fails for one side and not for the other, and holds afterwards."""
    for fresh in (True, False):
        ticket = pair.session.ask(fresh=fresh)
        assert ticket.done.wait(WAIT_S)
        ticket.check(1 - side)
        with pytest.raises(WherryError, match=match):
            ticket.check(side)
    assert pair.session.is_troubled
    yield
    pair.barrier(fresh=True)
    assert not pair.session.is_troubled
    assert read(pair.there) == read(pair.host)


def test_a_file_that_never_holds_still_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair.host / "f").write_text("a" * 100)
    (pair.host / "g").write_text("g")
    pair.barrier(fresh=True)
    original = hashing.read_digest
    numbers = iter(range(10_000))

    def torn(descriptor: int, size: int) -> tuple[bytes, int]:
        found = original(descriptor, size)
        if size >= 200:
            (pair.host / "f").write_text(f"{next(numbers):0200}")
        return found

    monkeypatch.setattr(hashing, "read_digest", torn)
    (pair.host / "f").write_text("b" * 200)
    with failing(pair, GUEST, r"f cannot be brought up to date in the guest: it is being written"):
        monkeypatch.undo()


def test_a_file_that_changes_whenever_it_is_sent_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.barrier(fresh=True)
    original = LocalEndpoint.read
    numbers = iter(range(10_000))

    def reading(self: LocalEndpoint, path: str) -> tuple[int, Iterator[bytes]]:
        (pair.host / path).write_text(f"{next(numbers):06}")
        return original(self, path)

    monkeypatch.setattr(LocalEndpoint, "read", reading)
    (pair.host / "f").write_text("b")
    with failing(pair, GUEST, r"f cannot be brought up to date in the guest: it changed meanwhile"):
        monkeypatch.undo()


def test_a_file_that_cannot_be_read_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair.host / "g").write_text("g")
    pair.barrier(fresh=True)
    original = handles.open_regular

    def refusing(fd: int, name: str) -> int:
        if name == "f":
            raise PermissionError(13, "Permission denied")
        return original(fd, name)

    monkeypatch.setattr(handles, "open_regular", refusing)
    (pair.host / "f").write_text("f")
    with failing(pair, GUEST, r"f cannot be brought up to date in the guest: permission denied"):
        # Nothing tells of that.
        monkeypatch.undo()


def test_18_a_name_of_a_container_that_is_not_utf8_is_named(pair: Pair) -> None:
    pair.barrier(fresh=True)
    path = pair.there / os.fsdecode(b"r\xe9sultat")
    path.write_text("r")
    with failing(
        pair, HOST, r"r.*sultat cannot be brought .* on this computer: .* not valid UTF-8"
    ):
        assert path.read_text() == "r"
        assert r"r\udce9sultat" in pair.session.status().reason
        path.unlink()


LOG = """
import sys, time
end = time.monotonic() + 30
with open(sys.argv[1], "a") as log:
    while time.monotonic() < end:
        log.write("a line of the log\\n")
        log.flush()
        time.sleep(0.0003)
"""


@pytest.mark.parametrize("side", [HOST, GUEST])
def test_a_log_that_never_rests_holds_up_no_barrier(pair: Pair, side: int) -> None:
    """What was in it when the barrier was asked for is on the other side."""
    (pair.host / "log").write_text("." * 300_000)
    pair.barrier(fresh=True)
    one, other = (pair.host, pair.there) if side == HOST else (pair.there, pair.host)
    writer = subprocess.Popen([sys.executable, "-c", LOG, one / "log"])
    try:
        while (one / "log").stat().st_size == 300_000:
            time.sleep(0.01)
        for _ in range(10):
            size = (one / "log").stat().st_size
            pair.barrier(fresh=True)
            assert (other / "log").stat().st_size >= size
    finally:
        writer.kill()
        writer.wait()


def barriers(pair: Pair, count: int) -> None:
    for _ in range(count):
        pair.barrier(fresh=True)


OVER = """
import sys
with open(sys.argv[1], "r+b") as file:
    count = 0
    while True:
        count += 1
        file.seek(0)
        file.write(b"%08d" % count * 500_000)
"""


@pytest.mark.parametrize("side", [HOST, GUEST])
def test_a_file_that_is_written_over_without_end(pair: Pair, side: int) -> None:
    """Whose own writes are in the container must not fail for those of another one there."""
    (pair.host / "data").write_bytes(bytes(4_000_000))
    pair.barrier(fresh=True)
    one = pair.host if side == HOST else pair.there
    writer = subprocess.Popen([sys.executable, "-c", OVER, one / "data"])
    try:
        while (one / "data").read_bytes()[:1] == b"\0":
            time.sleep(0.01)
        if side == HOST:
            with pytest.raises(WherryError, match="/data cannot be brought up to date in the gu"):
                barriers(pair, 20)
        else:
            barriers(pair, 5)
    finally:
        writer.kill()
        writer.wait()
    pair.barrier(fresh=True)
    assert (pair.there / "data").read_bytes() == (pair.host / "data").read_bytes()


def test_a_scan_of_this_computer_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[str] = []
    original = Progress.moved

    def moved(self: Progress, point: str = "") -> None:
        points.append(point)
        original(self, point)

    monkeypatch.setattr(Progress, "moved", moved)
    (tmp_path / "host").mkdir()
    with (tmp_path / "host" / "large").open("wb") as file:
        file.truncate(6 << 20)
    pair = Pair(tmp_path)
    try:
        pair.barrier(fresh=True)
    finally:
        pair.close()
    assert points.index("bytes") < points.index("") < points.index("transfer")
    assert points.count("") > 20


@pytest.mark.parametrize("seed", range(2))
def test_62_clocks_that_jump_by_an_hour(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Of this computer while it is set, and of the files of one whose clock was wrong."""
    choose = random.Random(seed)
    now = time.time_ns
    offset = 0
    monkeypatch.setattr(time, "time_ns", lambda: now() + offset)
    for number in range(60):
        offset = choose.choice([-HOUR_NS, 0, HOUR_NS])
        path = pair.host / f"f{choose.randrange(3)}"
        path.write_text(f"{number:06}")
        if choose.random() < 0.5:
            times = now() + choose.choice([-HOUR_NS, HOUR_NS])
            os.utime(path, ns=(times, times))
        pair.barrier(fresh=True)
        assert read(pair.there) == read(pair.host), number
        path = pair.there / f"f{choose.randrange(3)}"
        path.write_text(f"g{number:05}")
        offset = choose.choice([-HOUR_NS, 0, HOUR_NS])
        pair.barrier(fresh=False)
        assert read(pair.there) == read(pair.host), number


MAPPED = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    area = mmap.mmap(file.fileno(), 0)
    for word in sys.stdin:
        area[:len(word) - 1] = word[:-1].encode()
        print("written", flush=True)
"""


def test_55_a_writer_through_a_mapping_that_has_died(pair: Pair) -> None:
    (pair.host / "m").write_bytes(b"." * 8192)
    pair.barrier(fresh=True)
    for number in range(30):
        argv = [sys.executable, "-c", MAPPED, pair.there / "m"]
        subprocess.run(argv, input=f"{number:06}\n", text=True, check=True, capture_output=True)
        pair.barrier(fresh=False)
        assert (pair.host / "m").read_bytes()[:6] == b"%06d" % number


def test_53_while_others_write_elsewhere_in_the_root(pair: Pair) -> None:
    """200 files a second, as another container does, are nobody's reason to wait for long."""
    pair.barrier(fresh=True)
    (pair.there / "busy").mkdir()
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.wait(0.005):
            number += 1
            with contextlib.suppress(OSError):
                (pair.there / "busy" / f"f{number % 300}").write_text(str(number))

    writer = threading.Thread(target=write)
    writer.start()
    longest = 0.0
    try:
        for number in range(100):
            (pair.host / "h").write_text(f"{number:06}")
            began = time.monotonic()
            pair.barrier(fresh=True)
            assert (pair.there / "h").read_text() == f"{number:06}"
            (pair.there / "g").write_text(f"{number:06}")
            pair.barrier(fresh=False)
            assert (pair.host / "g").read_text() == f"{number:06}"
            longest = max(longest, time.monotonic() - began)
    finally:
        over.set()
        writer.join()
    assert longest < 5
    # What was written last travels as well, when it is its turn.
    pair.barrier(fresh=False)
    assert read(pair.there) == read(pair.host)


def test_36_what_could_not_be_done_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells that it can be done now: there is no event, and nobody asks."""
    monkeypatch.setattr(session, "_UNSETTLED_S", 0.5)
    pair = Pair(tmp_path)
    (pair.host / "d").mkdir()
    pair.barrier(fresh=True)
    subprocess.run(["chattr", "+i", pair.there / "d"], check=True)
    try:
        (pair.host / "d" / "f").write_text("f")
        with pytest.raises(
            WherryError, match=r"d/f cannot be brought up to date in the guest: .*not permitted"
        ):
            pair.barrier(fresh=True)
        time.sleep(1)
        assert not (pair.there / "d" / "f").exists()
        (problem,) = pair.session.status().problems
        assert problem.path == "d/f"
    finally:
        subprocess.run(["chattr", "-i", pair.there / "d"], check=True)
    try:
        deadline = time.monotonic() + 10
        while not (pair.there / "d" / "f").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rounds = pair.session.status().rounds
        time.sleep(1.2)
        assert pair.session.status().rounds <= rounds + 1, "and then it rests"
        assert pair.session.status().problems == []
    finally:
        pair.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MB."""
    at = tmp_path / "disk"
    at.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", at], check=False)
    if done.returncode != 0:
        pytest.skip("needs the right to mount")
    yield at
    subprocess.run(["umount", "-l", at], check=True)


@pytest.mark.parametrize("side", ["guest", "host"])
def test_50_a_disk_that_is_full(tmp_path: Path, small_disk: Path, side: str) -> None:
    """It is said of which path; all others go on; and with room it goes on by itself."""
    if side == "guest":
        (tmp_path / "guest").symlink_to(small_disk)
    else:
        (tmp_path / "host").symlink_to(small_disk)
        (small_disk / "mine").write_text("m")
    pair = Pair(tmp_path)
    try:
        pair.barrier(fresh=True)
        one, other = (pair.host, pair.there) if side == "guest" else (pair.there, pair.host)
        (tmp_path / "new").write_bytes(b"x" * 20_000_000)
        (tmp_path / "new").rename(one / "large")
        (one / "small").write_text("s")
        for _ in range(3):
            with pytest.raises(
                WherryError, match=r"large cannot be brought up to date.*no space left"
            ) as failed:
                pair.barrier(fresh=True)
        assert str(pair.host) in str(failed.value)
        assert not (other / "large").exists()
        assert (other / "small").read_text() == "s", "the others go on"
        assert pair.session.status().state == "watching"
        subprocess.run(["mount", "-o", "remount,size=90m", small_disk], check=True)
        pair.barrier(fresh=True)
        assert (other / "large").read_bytes() == b"x" * 20_000_000
    finally:
        pair.close()


def test_nothing_of_ours_stays_in_a_root_on_another_filesystem(
    tmp_path: Path, small_disk: Path
) -> None:
    (tmp_path / "host").symlink_to(small_disk)
    (small_disk / "f").write_text("f")
    pair = Pair(tmp_path)
    pair.barrier(fresh=True)
    (pair.there / "g").write_text("g")
    pair.barrier(fresh=False)
    assert (small_disk / ".wherry-stage").is_dir()
    assert sorted(read(pair.there)) == ["f", "g"]
    pair.close()
    assert sorted(path.name for path in small_disk.iterdir()) == ["f", "g"]
