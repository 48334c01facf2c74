"""Sending only those blocks of a big file that its receiver has not."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sync_pair import Pair, scratch

from wherry.sync.core.reconcile import GUEST, HOST
from wherry_sync import blocks, hashing
from wherry_sync.entry import file
from wherry_sync.hashing import CHUNK_BYTES
from wherry_sync.local import LocalEndpoint
from wherry_sync.stage import Damaged

SIZE = blocks.LEAST_BYTES + 4 * CHUNK_BYTES + 1000


@given(st.binary(max_size=64), st.lists(st.integers(0, 3 * CHUNK_BYTES), max_size=4))
@settings(deadline=None)
def test_a_digest_is_the_same_in_whatever_pieces_the_bytes_come(
    seed: bytes, cuts: list[int]
) -> None:
    data = (seed or b"x") * (3 * CHUNK_BYTES // max(1, len(seed)))
    state = hashing.new()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        state.update(data[start:end])
    assert state.digest() == hashing.digest(data) == hashing.root(state.sums())
    assert len(state.sums()) == 32 * blocks.count(len(data))


def test_a_small_file_is_hashed_as_it_is_and_a_big_one_is_not_the_file_of_its_sums() -> None:
    data = b"x" * CHUNK_BYTES
    assert hashing.digest(data) == blake2b(data, digest_size=32).digest()
    data += b"y"
    state = hashing.new()
    state.update(data)
    assert hashing.digest(state.sums()) != hashing.digest(data)


edits = st.lists(
    st.tuples(
        st.sampled_from(["write", "append", "cut"]),
        st.integers(0, 5 * CHUNK_BYTES),
        st.sampled_from([1, 100, CHUNK_BYTES, CHUNK_BYTES + 1]),
    ),
    max_size=4,
)


@given(edits, st.sampled_from([0, 1, 3 * CHUNK_BYTES, 4 * CHUNK_BYTES - 1]), st.booleans())
@example([("write", 10, 1), ("append", 0, 100)], 3 * CHUNK_BYTES, False)
@example([("append", 0, CHUNK_BYTES + 1)], 4 * CHUNK_BYTES - 1, True)
@settings(deadline=None, max_examples=12)
def test_what_is_put_together_is_the_new_version(
    edits: list[tuple[str, int, int]], size: int, hashed: bool
) -> None:
    old = random.Random(size).randbytes(size)
    new = bytearray(old)
    for kind, position, length in edits:
        if kind == "append":
            new += b"+" * length
        elif kind == "cut":
            del new[position:]
        else:
            new[position : position + length] = b"-" * length
    sums = {data: _sums(data) for data in (old, bytes(new))}
    numbers = blocks.changed(sums[old], sums[bytes(new)]) if new else []
    place = scratch()
    (place / "old").write_bytes(old)
    (place / "new").write_bytes(new)
    source = os.open(place / "old", os.O_RDONLY)
    target = os.open(place / "made", os.O_RDWR | os.O_CREAT)
    try:
        chunks = blocks.read(
            lambda: os.open(place / "new", os.O_RDONLY), len(new), numbers, sums[bytes(new)]
        )
        leaf = file(False, len(new), hashing.digest(new))
        state = hashing.new() if hashed else None
        grew = blocks.assemble(target, source, leaf, size, numbers, _cut(chunks), state)
        assert (place / "made").read_bytes() == new
        assert grew == (len(new) > size and new.startswith(old))
        assert state is None or state.digest() == leaf.digest
    finally:
        os.close(source)
        os.close(target)
        shutil.rmtree(place)


def _sums(data: bytes) -> bytes:
    state = hashing.new()
    state.update(data)
    return state.sums()


def _cut(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in other pieces."""
    data = b"".join(chunks)
    yield from (data[start : start + 100_000] for start in range(0, len(data), 100_000))


def test_sums_are_forgotten_before_they_take_much_memory() -> None:
    known = blocks.Sums()
    known.keep(b"small", bytes(32))
    assert known.get(b"small") == b""
    for number in range(20):
        known.keep(b"%d" % number, bytes(1 << 20))
    assert known.get(b"19")
    assert sum(len(known.get(b"%d" % number)) for number in range(20)) <= 4 << 20


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    (made.host / "f").write_bytes(random.Random(1).randbytes(SIZE))
    made.settle()
    yield made
    made.close()


def change(path: Path, position: int, data: bytes, size: int | None = None) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)
        if size is not None:
            file.truncate(size)


@pytest.mark.parametrize("side", [HOST, GUEST])
@pytest.mark.parametrize(
    ("position", "size", "sent"),
    [(SIZE // 2, None, 1), (SIZE, None, 1), (0, SIZE - 3 * CHUNK_BYTES, 2)],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_38_of_a_big_file_only_what_has_changed_is_sent(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    side: int,
    position: int,
    size: int | None,
    sent: int,
    restarted: bool,
) -> None:
    if restarted:
        # Nobody remembers the sums of the old version.
        pair.restart()
        pair.settle()
    asked: list[list[int]] = []
    original = LocalEndpoint.stage_blocks

    def stage_blocks(end: LocalEndpoint, *arguments: object) -> bool:
        asked.append(arguments[3])  # type: ignore[arg-type]
        done = original(end, *arguments, verify=side == GUEST)  # type: ignore[arg-type]
        assert done
        return done

    monkeypatch.setattr(LocalEndpoint, "stage_blocks", stage_blocks)
    here, there = (pair.host, pair.guest)[:: 1 if side == HOST else -1]
    inode = (there / "f").stat().st_ino
    change(here / "f", position, b"changed", size)
    pair.settle()
    assert (there / "f").read_bytes() == (here / "f").read_bytes()
    (numbers,) = asked
    assert len(numbers) == sent
    # What only grew is still the file that a reader has open.
    assert ((there / "f").stat().st_ino == inode) == (position == SIZE)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("side", ["sent", "had"])
def test_a_file_that_changes_meanwhile_is_not_taken(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, side: str, verify: bool
) -> None:
    change(pair.host / "f", 10, b"new")
    old, new = (pair.ends[1].scan().root, pair.ends[0].scan().root)
    leaves = [tree.children["f"] for tree in (old, new)]  # type: ignore[union-attr]
    mtime_ns, chunks = pair.ends[0].read_blocks("f", leaves[1], [0])  # type: ignore[arg-type]

    def disturbed() -> Iterator[bytes]:
        if side == "sent":
            change(pair.host / "f", 20, b"newer")
        else:
            change(pair.guest / "f", SIZE - 10, b"newer")
        yield from chunks

    taken = pair.ends[1].stage_blocks(
        leaves[1],  # type: ignore[arg-type]
        "f",
        leaves[0],  # type: ignore[arg-type]
        [0],
        mtime_ns,
        disturbed(),
        verify=verify,
    )
    assert not taken
    assert pair.ends[1].missing([leaves[1]]) == [leaves[1]]  # type: ignore[list-item]


def test_blocks_that_are_not_the_file_s_are_refused(pair: Pair) -> None:
    root = pair.ends[0].scan().root
    leaf = root.children["f"]  # type: ignore[union-attr]
    change(pair.host / "f", 0, b"x")
    with pytest.raises(Damaged):
        list(pair.ends[0].read_blocks("f", leaf, [0])[1])  # type: ignore[arg-type]
    other = file(False, SIZE, bytes(32))
    for chunks in ([b"x" * CHUNK_BYTES], [], [b"x" * (CHUNK_BYTES + 1)]):
        assert not pair.ends[1].stage_blocks(
            other,
            "f",
            leaf,  # type: ignore[arg-type]
            [0],
            0,
            chunks,
        )
