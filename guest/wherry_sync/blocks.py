"""Sending of a big file only the blocks that its receiver has not.

Both versions are cut into blocks at the same places, so this finds what was overwritten, and what
was appended or cut off at the end; what was inserted moves all that is behind it, and is sent with
it. To find that as well takes a hash that rolls over every byte, at 5 MB/s in Python.

The sums of a version (:mod:`wherry_sync.hashing`) are known to whoever has read it for a scan, so
that mostly neither end reads a file only to find out what is the same. The receiver puts the
blocks it has and the blocks that come together in its stage; from there on it is a file that was
received. Who does not trust the other end hashes all of it on the way; who does takes its own old
blocks for what their record says, if that is the same after they were copied.
"""

from __future__ import annotations

import errno
import os

from wherry_sync import handles
from wherry_sync.entry import DIGEST_BYTES
from wherry_sync.hashing import CHUNK_BYTES, Hash
from wherry_sync.stage import Damaged, Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from wherry_sync.entry import Leaf

LEAST_BYTES = 4 << 20
"""Files below this size are sent as they are."""

_KEPT_BYTES = 4 << 20
_STEP_BYTES = 16 << 20
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP}


class Sums:
    """The sums of those files that were read last."""

    def __init__(self) -> None:
        self._known: dict[bytes, bytes] = {}
        self._bytes = 0

    def keep(self, digest: bytes, sums: bytes) -> None:
        """Remember a file's sums if it is a big one; the oldest are forgotten."""
        if count(LEAST_BYTES) * DIGEST_BYTES <= len(sums) and digest not in self._known:
            self._known[digest] = sums
            self._bytes += len(sums)
            while self._bytes > _KEPT_BYTES and len(self._known) > 2:
                self._bytes -= len(self._known.pop(next(iter(self._known))))

    def get(self, digest: bytes) -> bytes:
        """Return a file's sums; empty if they are not known."""
        return self._known.get(digest, b"")


def count(size: int) -> int:
    """Return how many blocks a file has."""
    return (size + CHUNK_BYTES - 1) // CHUNK_BYTES


def changed(old: bytes, new: bytes) -> list[int]:
    """Return the numbers of the blocks of one version that the other one has not, by the sums."""
    width = DIGEST_BYTES
    return [
        start // width
        for start in range(0, len(new), width)
        if new[start : start + width] != old[start : start + width]
    ]


def extent(number: int, size: int) -> tuple[int, int]:
    """Return where a block begins, and how long it is."""
    start = number * CHUNK_BYTES
    return start, min(CHUNK_BYTES, size - start)


def read(
    opened: Callable[[], int], size: int, numbers: Iterable[int], sums: bytes
) -> Iterator[bytes]:
    """Yield blocks of a file.

    :param opened: opens it, or raises Gone.
    :raises Damaged: one is not what the sums say.
    """
    try:
        descriptor = opened()
    except Gone as error:
        raise Damaged(str(error)) from error
    try:
        for number in numbers:
            start, length = extent(number, size)
            data = os.pread(descriptor, length, start)
            state = Hash()
            state.update(data)
            if state.digest() != sums[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]:
                raise Damaged("the file has changed")
            yield data
    finally:
        os.close(descriptor)


def assemble(
    target: int,
    source: int,
    leaf: Leaf,
    had: int,
    numbers: Sequence[int],
    chunks: Iterable[bytes],
    state: Hash | None,
) -> bool:
    """Write a file of the blocks that come and, for the rest, of another file.

    :param had: size of the other file.
    :param numbers: of the blocks that come, ascending.
    :param chunks: their bytes, in pieces of any size.
    :param state: takes all that is written, if it shall.
    :returns: whether the file begins with all of the other one.
    :raises Damaged: bytes are missing.
    """
    pieces = _Pieces(chunks)
    position = 0
    only_grew = leaf.size > had
    for number in numbers:
        start, length = extent(number, leaf.size)
        _copy(target, source, position, start, state)
        data = pieces.take(length)
        if start < had and only_grew:
            part = os.pread(source, min(length, had - start), start)
            only_grew = data.startswith(part)
        if state is not None:
            state.update(data)
        handles.write_new(target, data, start)
        position = start + length
    _copy(target, source, position, leaf.size, state)
    pieces.end()
    # It may end with a hole.
    os.ftruncate(target, leaf.size)
    return only_grew


class _Pieces:
    """Bytes that come in pieces, taken in others."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def take(self, size: int) -> bytes:
        parts = [self._rest]
        missing = size - len(self._rest)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise Damaged("blocks are missing")
            parts.append(chunk)
            missing -= len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]

    def end(self) -> None:
        if self._rest or next(self._chunks, b""):
            raise Damaged("there are more blocks than were asked for")


def _copy(target: int, source: int, start: int, end: int, state: Hash | None) -> None:
    """Copy a part of a file to where nothing was written yet; its holes stay holes."""
    within = state is None and hasattr(os, "copy_file_range")
    while start < end:
        if within:
            try:
                begin, after = _data(source, start, end)
                done = begin - start
                if begin < after:
                    done += os.copy_file_range(source, target, after - begin, begin, begin)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                within = False
                continue
        else:
            data = os.pread(source, min(CHUNK_BYTES, end - start), start)
            if state is not None:
                state.update(data)
            handles.write_new(target, data, start)
            done = len(data)
        if not done:
            raise Damaged("the other file has become shorter")
        start += done


def _data(source: int, start: int, end: int) -> tuple[int, int]:
    """Return where in a part of a file the first data begins, and how far it goes, or a step.

    By lseek(2), ``SEEK_DATA`` and ``SEEK_HOLE``; a file that is shorter has no hole at its end.
    """
    try:
        begin = min(os.lseek(source, start, os.SEEK_DATA), end)
        after = os.lseek(source, begin, os.SEEK_HOLE) if begin < end else end
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        # There is none up to the file's end.
        begin = after = min(max(start, os.fstat(source).st_size), end)
    return begin, min(after, end, begin + _STEP_BYTES)
