"""A guest that wants to do harm: whatever bytes it answers with, the host stays whole.

Each answer either is one that a guest could give, or ends the connection with an error; nothing
else is raised, nothing waits without a bound, and nothing is written outside of the root.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync_pair import scratch
from sync_trees import text
from zstandard import ZstdCompressor

from wherry.core.errors import WherryError
from wherry.service import syncing
from wherry.sync import connection
from wherry.sync.core.cycle import Cycle
from wherry.sync.core.keep import Keep
from wherry.sync.core.store import Store
from wherry.sync.packing import packer
from wherry.sync.remote import Place, RemoteEndpoint
from wherry_sync import wire
from wherry_sync.apply import Policy
from wherry_sync.entry import Leaf, file, link
from wherry_sync.local import LocalEndpoint
from wherry_sync.operation import Operation
from wherry_sync.stage import Damaged, Gone
from wherry_wire.frames import Frame
from wherry_wire.messages import (
    Done,
    Failure,
    SyncBusy,
    SyncChanged,
    SyncOpened,
    SyncScanned,
    SyncYes,
    pack,
)

OPENED = pack(SyncOpened(boot_id="b", packed=False), 0)
REFUSED = (OSError, Gone, Damaged)


class Canned:
    """A stream on which all answers are there already, and then the end."""

    def __init__(self, answers: Iterator[bytes] | bytes) -> None:
        self._answers = iter([answers]) if isinstance(answers, bytes) else answers
        self._first: bytes | None = OPENED
        self.sent = 0

    def recv(self, size: int, /) -> bytes:
        first, self._first = self._first, None
        return first if first is not None else next(self._answers, b"")

    def sendall(self, data: bytes, /) -> None:
        self.sent += len(data)

    def close(self) -> None:
        self._answers = iter(())


def endpoint(answers: Iterator[bytes] | bytes) -> RemoteEndpoint:
    return RemoteEndpoint(Canned(answers), Place("r1", "/r"))


numbers = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 2])
names = st.sampled_from(
    ["", "a", "a/b", "/etc/passwd", "..", "a/../../b", "a/./b", "a//b", "a\0b", "x" * 300, "a\\b"]
).map(str.encode) | st.binary(max_size=12)
leaves = (
    st.sampled_from([b"D", text("x"), text("x", executable=True), link(b"../.."), link(b"/"), b""])
    | st.builds(
        file, st.booleans(), st.sampled_from([0, 5, 2**62]), st.binary(min_size=32, max_size=32)
    )
    | st.binary(max_size=50)
)
fields = (
    names | leaves | st.sampled_from([b"\0\0\0\0", b"\0\0\0\1", b"\xff\xff\xff\xff", b"d", b"s"])
)
row_frames = st.lists(st.lists(fields, min_size=1, max_size=3), max_size=4).map(
    lambda rows: b"".join(wire.rows(tuple(row) for row in rows))
)
packed = st.builds(
    lambda length, frame, size: Frame(wire.PACKED, 0, struct.pack(">I", length) + frame[:size]),
    st.sampled_from([0, 1, 9, 1 << 31]),
    st.sampled_from([b"B", b"W" * 9, bytes(9)]).map(ZstdCompressor().compress) | st.binary(),
    st.sampled_from([5, 99]),
).map(Frame.encode)
contents = st.builds(
    lambda files, frame: b"".join(wire.contents(files, frame)),
    st.lists(
        st.tuples(
            fields.map(lambda field: field[:255]),
            st.integers(-(2**63), 2**63 - 1),
            st.lists(st.binary(max_size=9) | st.just(bytes(99)), max_size=3),
        ),
        max_size=3,
    ),
    st.sampled_from([wire.plain, packer()]),
)
replies = st.one_of(
    st.builds(
        SyncScanned,
        present=st.booleans(),
        device=numbers,
        files_read=numbers,
        bytes_read=numbers,
        changes=st.integers(-1, 5),
        rescued=st.booleans(),
    ),
    st.just(Done()),
    st.builds(SyncYes, done=st.booleans()),
    st.builds(Failure, message=st.text(max_size=20)),
    st.builds(SyncBusy, path=st.text(max_size=20)),
    st.builds(SyncChanged, root=st.text(max_size=5)),
).map(lambda message: pack(message, 0))
raw_frames = st.builds(
    lambda kind, flags, id, payload: (
        len(payload).to_bytes(4, "big") + bytes([kind, flags]) + id.to_bytes(4, "big") + payload
    ),
    st.integers(0, 255),
    st.sampled_from([0, 0, 1]),
    st.sampled_from([0, 0, 7]),
    st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b'{"a":' * 60, b"null"]),
)
streams = st.lists(
    row_frames | contents | packed | replies | raw_frames | st.binary(max_size=30), max_size=6
).map(b"".join)

LEAVES = [text("one"), text("two")]
OPERATIONS = [Operation("a", None, LEAVES[0]), Operation("b", LEAVES[0], None)]


def test_what_nobody_reads_may_be_packed_wrongly() -> None:
    (good,) = wire.contents([(wire.pack_number(0), 0, [b"contents"])])
    end = endpoint(good + Frame(wire.PACKED, 0, b"\0\0\0\x05hello").encode())
    files = end.read_all([("a", LEAVES[0])])
    next(files)
    files.close()
    with pytest.raises(OSError, match="was lost"):
        end.sums("a", LEAVES[0])


def drained(files: Iterator[tuple[object, int, Iterator[bytes]]]) -> None:
    for _, _, chunks in files:
        with contextlib.suppress(Damaged):
            for _ in chunks:
                pass


CALLS: list[Callable[[RemoteEndpoint], object]] = [
    lambda end: end.scan(),
    lambda end: end.missing(LEAVES),
    lambda end: drained(end.read_all([("a", LEAVES[0]), ("b", LEAVES[1])])),  # type: ignore[arg-type]
    lambda end: list(end.read("a")[1]),
    lambda end: end.stage_all([(LEAVES[0], 0, [b"one"])]),
    lambda end: end.stamps(["a", "b"]),
    lambda end: end.stage_local([("a", LEAVES[0]), ("b", LEAVES[1])]),
    lambda end: list(end.apply(OPERATIONS)),
    lambda end: end.recall(LEAVES[0]),
    lambda end: end.sums("a", LEAVES[0]),
    lambda end: end.build(OPERATIONS[:1], [(0, 0, [b"one"])]),
    lambda end: end.flush(),
    lambda end: end.rescued(),
    lambda end: list(end.read_rescued("rescued-1")),
]


@given(st.sampled_from(CALLS), streams)
def test_whatever_is_answered(call: Callable[[RemoteEndpoint], object], answers: bytes) -> None:
    end = endpoint(answers)
    try:
        with contextlib.suppress(*REFUSED):
            call(end)
    finally:
        end.close()


class Places:
    """What a round needs, with something outside of the root that must stay as it is."""

    def __init__(self) -> None:
        self.base = scratch()
        self.root = self.base / "root"
        self.root.mkdir()
        (self.root / "mine").write_text("mine")
        (self.base / "outside").write_text("outside")
        (self.root / "door").symlink_to(self.base)

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.base)

    def round(self, answers: bytes) -> None:
        store = Store(self.base / "sync.db", 1)
        trash, conflicts = Keep(self.base / "trash"), Keep(self.base / "conflicts")
        host = LocalEndpoint(
            os.fspath(self.root),
            os.fspath(self.base / "stage"),
            "b",
            policy=Policy(keep=trash.take, links_stay=False),
        )
        end = endpoint(answers)
        try:
            Cycle(host, end, store, conflicts).run()
        except REFUSED:
            pass
        finally:
            for part in (end, host, store, trash, conflicts):
                part.close()

    def check(self) -> None:
        assert sorted(path.name for path in self.base.iterdir()) == sorted(
            ["root", "outside", "sync.db", "trash", "conflicts", "stage"]
        )
        assert (self.base / "outside").read_text() == "outside"
        # The root has never been equal to anything, so nothing in it can have been deleted.
        assert (self.root / "mine").read_text() == "mine"
        for path in self.root.rglob("*"):
            mode = path.lstat().st_mode
            assert not mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX)
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


tree_rows = st.dictionaries(
    names | st.sampled_from([b"mine", b"door", b"door/outside", b"door/new", b"new", b"new/x"]),
    leaves,
    max_size=6,
)


@given(
    tree_rows, st.lists(st.binary(max_size=6) | st.just(b"x"), max_size=4), st.binary(max_size=40)
)
def test_a_round_with_a_hostile_tree(
    tree: dict[bytes, bytes], files: list[bytes], rest: bytes
) -> None:
    rows = {b"": b"D", **tree}
    scanned = SyncScanned(
        present=True, device=1, files_read=0, bytes_read=0, changes=len(rows), rescued=False
    )
    answers = [
        *wire.rows(rows.items()),
        pack(scanned, 0),
        *wire.contents((wire.pack_number(at), 0, [data]) for at, data in enumerate(files)),
        pack(Done(), 0),
        *wire.contents((wire.pack_number(at), 0, [data]) for at, data in enumerate(files)),
        pack(Done(), 0),
        *wire.rows([(b"d", b"")] * 3),
        pack(Done(), 0),
        rest,
    ]
    with Places() as places:
        places.round(b"".join(answers))
        places.check()


def test_lists_have_a_bound_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_ROWS_BYTES", 3_000_000)

    def endless() -> Iterator[bytes]:
        for number in range(10_000):
            yield from wire.rows([(b"%08d" % number, b"x" * 100_000)])

    answers = endless()
    end = endpoint(answers)
    with pytest.raises(OSError, match="too long"):
        end.scan()
    assert next(answers)[10 + 4 : 10 + 12] < b"00000100"
    end.close()


def test_a_tree_has_a_bound_however_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_ROWS", 100)

    def grown(start: int, gone: int = 0) -> bytes:
        rows = [(b"", b"D")] if start == 0 else []
        rows += [(b"f%d" % number, text("x")) for number in range(start, start + 60)]
        rows += [(b"f%d" % number, b"") for number in range(gone)]
        scanned = SyncScanned(
            present=True, device=1, files_read=0, bytes_read=0, changes=len(rows), rescued=False
        )
        return b"".join(wire.rows(rows)) + pack(scanned, 0)

    end = endpoint(iter([grown(0), grown(60, 30), grown(120)]))
    end.scan()
    end.scan()
    with pytest.raises(OSError, match="too many entries"):
        end.scan()
    end.close()


def test_a_guest_that_is_only_ever_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BUSY_S", 0.05)

    def busy() -> Iterator[bytes]:
        while True:
            time.sleep(0.01)
            yield pack(SyncBusy(path=""), 0)

    end = endpoint(busy())
    began = time.monotonic()
    with pytest.raises(OSError, match="is busy for"):
        end.flush()
    assert time.monotonic() - began < 5
    end.close()


def endless_file() -> Iterator[bytes]:
    """A file without an end, of which a chunk is small."""
    start, *_ = wire.contents([(wire.pack_number(0), 0, [b"x" * 200_000] * 3)])
    yield start
    piece = b"D" + (100_000).to_bytes(4, "big") + b"x" * 100_000
    while True:
        yield Frame(wire.CONTENTS, 0, piece).encode()


@pytest.mark.parametrize("place", ["stage", "conflicts"])
def test_a_file_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """It is longer than it was said to be: neither does it fill the disk, nor is it read on."""
    monkeypatch.setattr(connection, "LEFT_OVER_BYTES", 1_000_000)
    end = endpoint(endless_file())
    leaf = text("12345")
    if place == "stage":
        host = LocalEndpoint(os.fspath(tmp_path), os.fspath(tmp_path / ".wherry-stage"), "b")
        with pytest.raises(OSError, match=r"lost|broke"):
            host.stage_all(end.read_all([("a", leaf)]))
        host.close()
    else:
        keep = Keep(tmp_path / "conflicts")
        assert not keep.save("a", leaf, end.read("a")[1])
        keep.close()
    with pytest.raises(OSError, match="lost"):
        end.flush()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1_000_000
    end.close()


def test_messages_that_are_deep_or_large_are_refused() -> None:
    for payload in (b"[" * 100_000, json.dumps({"message": ["x"] * 9}).encode(), b'{"done":1e999}'):
        end = endpoint(Frame(0x01, 0, payload).encode())
        with pytest.raises(OSError, match=r"protocol|in the guest"):
            end.flush()
        end.close()


def test_the_round_with_a_tree_comes_to_its_end() -> None:
    """Of what a good guest would answer, files are made: so the harm could have been done."""
    leaf = text("new")
    rows = {b"": b"D", b"new": leaf, b"d": b"D", b"d/x": leaf}
    scanned = SyncScanned(
        present=True, device=1, files_read=0, bytes_read=0, changes=len(rows), rescued=False
    )
    files = [(wire.pack_number(at), 0, [b"new"]) for at in range(2)]
    answers = [
        *wire.rows(rows.items()),
        pack(scanned, 0),
        *wire.contents(files),
        pack(Done(), 0),
    ]
    with Places() as places:
        places.round(b"".join(answers))
        places.check()
        assert (places.root / "new").read_text() == (places.root / "d" / "x").read_text() == "new"


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "d/../../outside", "a\0b", ""])
def test_what_is_rescued_has_a_path_in_the_root(path: str) -> None:
    leaf = text("x")
    scanned = pack(
        SyncScanned(present=False, device=1, files_read=0, bytes_read=0, changes=0, rescued=True),
        0,
    )
    rows = b"".join(wire.rows([(b"rescued-1", path.encode(), leaf)]))
    end = endpoint(scanned + rows + pack(Done(), 0))
    end.scan()
    if path:
        with pytest.raises(OSError, match="broke the protocol"):
            end.rescued()
    else:
        (found,) = end.rescued()
        assert found.path == ""
    end.close()


class Resolved:
    """A root with one file that a conflict left, for what the user wants of it."""

    def __init__(self, base: Path, path: str, leaf: Leaf | None = None) -> None:
        self.number = 1
        self.path = base / "root"
        self.path.mkdir()
        self.root = self
        self.keep = Keep(base / "conflicts")
        self.keep.save(path, text("theirs") if leaf is None else leaf, [b"theirs"])

    def all(self) -> list[Resolved]:
        return [self]

    def do(self, function: Callable[[Keep], str]) -> str:
        return function(self.keep)

    def resolve(self, action: str, target: str = "") -> str:
        return syncing._resolve(self, "1.1", action, target)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["{outside}/f", "../outside/f", "door/f", "door/new/f"])
def test_a_conflict_is_restored_in_the_root_alone(tmp_path: Path, path: str) -> None:
    """Neither by its name, nor by a link that a container made, does it lead anywhere else."""
    outside = tmp_path / "outside"
    outside.mkdir()
    root = Resolved(tmp_path, path.format(outside=outside))
    (root.path / "door").symlink_to(outside)
    with pytest.raises(WherryError, match=r"is no path|cannot be written"):
        root.resolve("restore")
    assert os.listdir(outside) == []  # noqa: PTH208
    # It is still there, for the user to put where he likes.
    target = outside / "new" / "g"
    assert root.resolve("save", str(target)) == str(target)
    assert target.read_text() == "theirs"
    assert list(root.keep) == []
    root.keep.close()


@pytest.mark.parametrize("kind", ["new", "there", "link", "link there"])
def test_a_conflict_is_restored_where_it_was(tmp_path: Path, kind: str) -> None:
    root = Resolved(tmp_path, "d/e/f", link(b"nowhere") if kind == "link" else None)
    path = root.path / "d" / "e" / "f"
    if kind in ("there", "link there"):
        path.parent.mkdir(parents=True)
    if kind == "there":
        path.write_text("mine")
        path.chmod(0o600)
    elif kind == "link there":
        path.symlink_to(tmp_path / "elsewhere")
    assert root.resolve("restore") == str(path)
    assert path.is_symlink() == (kind == "link")
    if kind == "link":
        assert path.readlink() == Path("nowhere")
    else:
        assert path.read_text() == "theirs"
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if kind == "there" else 0o644)
    assert not (tmp_path / "elsewhere").exists()
    assert os.listdir(path.parent) == ["f"]  # noqa: PTH208
    root.keep.close()
