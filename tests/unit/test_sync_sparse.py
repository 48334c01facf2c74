"""Holes of sparse files stay holes, and never hide what was to be written."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sync_pair import Pair, scratch

from wherry.sync.core.reconcile import GUEST, HOST
from wherry_sync import blocks, handles, hashing
from wherry_sync.entry import file
from wherry_sync.hashing import CHUNK_BYTES
from wherry_sync.local import LocalEndpoint
from wherry_sync.stage import fill

MB = 1 << 20
HOLE = handles.HOLE_BYTES
ROOM = 4 * HOLE
"""What a file may take on the disk beyond its data: the blocks that have data and zeros."""


def make(path: Path, size: int, data: dict[int, bytes]) -> bytes:
    """Make a file that has some data and is a hole else; return its contents."""
    with path.open("wb") as file:
        file.truncate(size)
        for position, piece in data.items():
            file.seek(position)
            file.write(piece)
    return path.read_bytes()


def on_disk(path: Path) -> int:
    """Return the bytes that a file takes."""
    return path.stat().st_blocks * 512


def assert_copied(pair: Pair, name: str, contents: bytes, data: int = 0) -> None:
    """Assert that a file is on both sides, and takes no more than its data."""
    for root in (pair.host, pair.guest):
        assert (root / name).read_bytes() == contents
        assert on_disk(root / name) <= data + ROOM


PIECES: dict[str, dict[int, bytes]] = {
    "all of it": {},
    "at both ends": {3 * MB + 17: b"data"},
    "between data": {0: b"data", 6 * MB - 4: b"data"},
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("from_host", [True, False])
def test_29_a_new_sparse_file_takes_no_more_on_the_other_side(
    pair: Pair, from_host: bool, pieces: str
) -> None:
    one = pair.host if from_host else pair.guest
    make(one / "f", 6 * MB, PIECES[pieces])
    # Which is not sent, but made there of the first one.
    contents = make(one / "g", 6 * MB, PIECES[pieces])
    pair.settle()
    for name in ("f", "g"):
        assert_copied(pair, name, contents)


@pytest.mark.parametrize("side", [HOST, GUEST])
@pytest.mark.parametrize("size", [MB // 2, 2 * MB])
def test_29_a_file_that_becomes_a_sparse_one_takes_no_more(
    pair: Pair, side: int, size: int
) -> None:
    """Half a megabyte comes with the operation, two are staged before it; also for two files."""
    one = (pair.host, pair.guest)[side]
    for name in ("f", "twin", "other twin"):
        (one / name).write_bytes(random.Random(name).randbytes(3 * MB))
    pair.settle()
    contents = make(one / "f", size, {size // 2: b"data"})
    for name in ("twin", "other twin"):
        twins = make(one / name, size, {0: b"twins"})
    pair.settle()
    assert_copied(pair, "f", contents)
    for name in ("twin", "other twin"):
        assert_copied(pair, name, twins)


@pytest.mark.parametrize("verify", [True, False])
def test_29_a_big_sparse_file_of_which_a_block_changes_takes_no_more(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    done = []
    original = LocalEndpoint.stage_blocks

    def stage_blocks(end: LocalEndpoint, *arguments: object) -> bool:
        done.append(original(end, *arguments, verify=verify))  # type: ignore[arg-type]
        return done[-1]

    monkeypatch.setattr(LocalEndpoint, "stage_blocks", stage_blocks)
    size = blocks.LEAST_BYTES + 8 * CHUNK_BYTES
    make(pair.host / "f", size, {MB: b"x" * MB})
    pair.settle()
    contents = make(pair.host / "f", size, {MB: b"x" * MB, 3 * MB: b"data"})
    pair.settle()
    assert done == [True]
    assert_copied(pair, "f", contents, MB)


def test_zeros_that_are_written_in_place_are_written(pair: Pair) -> None:
    """What is there must not shine through a hole."""
    pair.ends[GUEST].pin("f")
    (pair.host / "f").write_bytes(random.Random(1).randbytes(MB))
    pair.settle()
    inode = (pair.guest / "f").stat().st_ino
    for size in (MB, MB // 2, 2 * MB):
        contents = make(pair.host / "f", size, {size // 2: b"data %d" % size})
        pair.settle()
        assert (pair.guest / "f").stat().st_ino == inode
        assert (pair.guest / "f").read_bytes() == contents


def test_the_guests_side_of_a_conflict_is_kept_with_its_holes(pair: Pair) -> None:
    (pair.host / "f").write_bytes(b"host")
    contents = make(pair.guest / "f", 4 * MB, {0: b"guest"})
    pair.settle()
    (kept,) = pair.conflicts
    assert b"".join(pair.conflicts.open(kept)) == contents
    assert on_disk(pair.directory / "conflicts" / str(kept.number)) <= ROOM


RUN = st.builds(
    lambda byte, size: byte * size,
    st.sampled_from([b"\0", b"x"]),
    st.sampled_from([0, 1, HOLE - 1, HOLE, HOLE + 1, 3 * HOLE]),
)
PIECE = st.lists(RUN, max_size=4).map(b"".join)


@given(st.lists(PIECE, max_size=4))
@example([b"\0" * HOLE + b"x" * HOLE + b"\0" * HOLE, b""])
def test_a_file_is_what_was_written_in_whatever_pieces(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    place = scratch()
    descriptor = os.open(place / "f", os.O_RDWR | os.O_CREAT)
    try:
        fill(descriptor, file(False, len(data), hashing.digest(data)), pieces)
        assert (place / "f").read_bytes() == data
    finally:
        os.close(descriptor)
        shutil.rmtree(place)


def test_of_a_file_with_holes_that_became_shorter_nothing_is_made_up(tmp_path: Path) -> None:
    make(tmp_path / "old", 2 * MB, {})
    source = os.open(tmp_path / "old", os.O_RDONLY)
    target = os.open(tmp_path / "made", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(blocks.Damaged):
            blocks.assemble(target, source, file(False, 3 * MB, bytes(32)), 3 * MB, [], [], None)
    finally:
        os.close(source)
        os.close(target)
