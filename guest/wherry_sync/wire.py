"""What one root's connection carries, as bytes in and out, without doing any I/O.

Each request is one control frame, by the host, and its answer one control frame, by the agent;
lists and contents go before them in *bulk* frames, so that neither is ever held back by the
size of a frame. Requests do not overlap. The messages are in :mod:`wherry_wire.messages`.

A bulk frame of :data:`ROWS` is a list of rows, each a fixed number of fields, each with its
length before it. What the fields are belongs to the request:

=============== ============================================ ==========================
request         rows before it                               rows before its answer
=============== ============================================ ==========================
SyncScan                                                     changes, then paths
SyncMissing     leaves                                       numbers of leaves
SyncRead        paths                                        (contents)
SyncSums                                                     pieces of the sums
SyncReadBlocks  numbers of blocks                            (contents)
SyncStage       leaves, then contents                        numbers of leaves
SyncStageLocal  leaves and paths                             numbers of the absent
SyncStageBlocks numbers of blocks, then contents
SyncApply       operations, then contents                    results
SyncBuild       operations, then contents                    results
SyncRescued                                                  name, path, leaf
=============== ============================================ ==========================

A bulk frame of :data:`CONTENTS` is a piece of a row of files: each begins with a key, which is
its number in the list that was asked for or the leaf that it shall be, and its time of
modification; then come its bytes and its end. To SyncApply the key is the operation's number
and how many bytes the file has already, if what comes is only the rest of it. Small files share
a frame, and no file is announced with a size, as files change. Who finds half-way that a file
has changed says so, and its bytes are for nothing. A bulk frame of :data:`PACKED` is the same,
compressed by zstd (RFC 8878), after the length that it has then; the host makes such frames if
the agent can read them, and the agent if its system has the library.

What comes from the guest is hostile until checked: the checks are here, and what fails them is
a :class:`~wherry_wire.frames.WireError`, which ends the connection.
"""

from __future__ import annotations

import itertools
import struct

from wherry_sync.entry import (
    DIGEST_BYTES,
    EMPTY,
    FILE,
    LINK,
    MAX_DEPTH,
    MAX_NAME_BYTES,
    PROBLEM,
    UNTRACKED,
    Directory,
    Leaf,
    name_problem,
)
from wherry_sync.operation import Arrival
from wherry_sync.stage import Damaged
from wherry_wire.frames import MAX_PAYLOAD_BYTES, Frame, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from wherry_sync.entry import Entry

ROWS = 0x80
CONTENTS = 0x81
PACKED = 0x82

MAX_ROWS = 4_000_000
"""Entries of one tree, and rows of one list."""

MAX_ROWS_BYTES = 1 << 29
"""All rows of one list."""

CHUNK_BYTES = 128 * 1024
"""Of a file's contents, at most, in one piece."""

# A frame with so much in it is sent: one more row, with the deepest path and the longest links,
# or one more piece of a file still fits into it.
_ROWS_FULL_BYTES = MAX_PAYLOAD_BYTES - 96 * 1024
_CONTENTS_FULL_BYTES = MAX_PAYLOAD_BYTES - CHUNK_BYTES - 64

_PIECE_BYTES = 64 * 1024
_LENGTH = struct.Struct(">I")
_BEGIN = struct.Struct(">cBqI")
_DATA = struct.Struct(">cI")
_ARRIVAL = struct.Struct(">IQ")
_DIRECTORY = b"D"
_FILE_BYTES = 10 + DIGEST_BYTES


def rows(items: Iterable[tuple[bytes, ...]]) -> Iterator[bytes]:
    """Yield the bulk frames of a list of rows."""
    buffer = bytearray()
    for row in items:
        for field in row:
            buffer += _LENGTH.pack(len(field))
            buffer += field
        if len(buffer) >= _ROWS_FULL_BYTES:
            yield Frame(ROWS, 0, bytes(buffer)).encode()
            buffer.clear()
    if buffer:
        yield Frame(ROWS, 0, bytes(buffer)).encode()


def parse_rows(payload: bytes, width: int) -> Iterator[tuple[bytes, ...]]:
    """Yield the rows of one bulk frame.

    :raises WireError: it does not hold whole rows.
    """
    position, end = 0, len(payload)
    while position < end:
        row = []
        for _ in range(width):
            start = position + 4
            if start > end:
                raise WireError("a row is cut off")
            (length,) = _LENGTH.unpack_from(payload, position)
            position = start + length
            if position > end:
                raise WireError("a row is cut off")
            row.append(payload[start:position])
        yield tuple(row)


def all_rows(payloads: list[bytes], width: int) -> Iterator[tuple[bytes, ...]]:
    """Yield the rows of all bulk frames of a list, which is empty afterwards.

    :raises WireError: one does not hold whole rows, or there are too many.
    """
    count = 0
    payloads.reverse()
    while payloads:
        for row in parse_rows(payloads.pop(), width):
            count += 1
            if count > MAX_ROWS:
                raise WireError("the list is too long")
            yield row


def pack_entry(entry: Entry | None) -> bytes:
    """Return an entry without its children; nothing is no bytes."""
    if isinstance(entry, Directory):
        return _DIRECTORY
    return entry or b""


def parse_entry(data: bytes) -> Entry | None:
    """Return the entry in bytes from the other end.

    :raises WireError: they are none.
    """
    if not data:
        return None
    if data == _DIRECTORY:
        return EMPTY
    return parse_leaf(data)


def parse_leaf(data: bytes) -> Leaf:
    """Return the leaf in bytes from the other end.

    :raises WireError: they are none.
    """
    kind = data[0] if data else 0
    if kind == FILE:
        if len(data) != _FILE_BYTES or data[1] > 1 or data[2] & 0x80:
            raise WireError("a file's entry is malformed")
    elif kind == LINK:
        if b"\0" in data or not 1 < len(data) <= 4096:
            raise WireError("a link's entry is malformed")
    elif kind not in (UNTRACKED, PROBLEM) or len(data) > 4096:
        raise WireError("an entry is of no known kind")
    return Leaf(data)


def parse_path(data: bytes, *, shown: bool = False) -> str:
    """Return a path from the other end; every name in it may be one in a tree.

    :param shown: the last name need not, as its entry is a problem and nothing is done there.
    :raises WireError: it is none.
    """
    try:
        path = data.decode()
    except UnicodeDecodeError as error:
        raise WireError("a path is not UTF-8") from error
    if path:
        names = path.split("/")
        if len(names) > MAX_DEPTH + 1 or len(names[-1]) > 8 * MAX_NAME_BYTES:
            raise WireError("a path is too deep")
        if shown and names[-1] not in {"", ".", ".."}:
            names.pop()
        for name in names:
            if name_problem(name) is not None:
                raise WireError(f"{path[:200]!r} is no path")
    return path


def parse_number(data: bytes, limit: int) -> int:
    """Return a number below ``limit``.

    :raises WireError: it is none.
    """
    number = int.from_bytes(data, "big")
    if len(data) != 4 or number >= limit:
        raise WireError("a number is out of range")
    return number


def pack_arrival(number: int, start: int) -> bytes:
    """Return the key of what comes for an operation; see :class:`Arrival`."""
    return _ARRIVAL.pack(number, start)


def parse_arrival(key: bytes, mtime_ns: int, chunks: Iterable[bytes], limit: int) -> Arrival:
    """Return what comes for one of ``limit`` operations.

    :raises WireError: the key is none.
    """
    if len(key) != _ARRIVAL.size:
        raise WireError("a key is malformed")
    number, start = _ARRIVAL.unpack(key)
    if number >= limit:
        raise WireError("a number is out of range")
    return Arrival(number, mtime_ns, chunks, start)


def pieces(data: bytes) -> Iterator[tuple[bytes]]:
    """Yield rows that make up some bytes."""
    for start in range(0, len(data), _PIECE_BYTES):
        yield (data[start : start + _PIECE_BYTES],)


def pack_number(number: int) -> bytes:
    """Return the four bytes of a number."""
    return _LENGTH.pack(number)


def plain(payload: bytes) -> bytes:
    """Return the bulk frame of a piece of contents as it is."""
    return Frame(CONTENTS, 0, payload).encode()


def contents(
    files: Iterable[tuple[bytes, int, Iterable[bytes]]],
    frame: Callable[[bytes], bytes] = plain,
) -> Iterator[bytes]:
    """Yield the bulk frames of files.

    :param files: the key, the time of modification in ns, and the contents of each, which may
        raise :class:`~wherry_sync.stage.Damaged` for "not that file, after all".
    :param frame: makes the frame of a piece of contents.
    """
    buffer = bytearray()
    for key, mtime_ns, chunks in files:
        chunk = b""
        first = True
        for following in _whole(chunks):
            if following is None:
                break
            for start in range(0, len(following), CHUNK_BYTES):
                # The last piece comes with the end, so that a small file takes one header.
                if chunk:
                    buffer += (
                        _BEGIN.pack(b"B", len(key), mtime_ns, len(chunk)) + key
                        if first
                        else _DATA.pack(b"D", len(chunk))
                    )
                    buffer += chunk
                    first = False
                    if len(buffer) >= _CONTENTS_FULL_BYTES:
                        yield frame(bytes(buffer))
                        buffer.clear()
                chunk = following[start : start + CHUNK_BYTES]
        else:
            following = b""
        if following is None:
            if not first:
                buffer += _DATA.pack(b"X", 0)
            continue
        buffer += (
            _BEGIN.pack(b"W", len(key), mtime_ns, len(chunk)) + key
            if first
            else _DATA.pack(b"E", len(chunk))
        )
        buffer += chunk
        if len(buffer) >= _CONTENTS_FULL_BYTES:
            yield frame(bytes(buffer))
            buffer.clear()
    if buffer:
        yield frame(bytes(buffer))


def _whole(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield a file's chunks, and None where it turns out not to be that file."""
    try:
        yield from chunks
    except Damaged:
        yield None


class Contents:
    """Files as they arrive.

    :param next_frame: gives one bulk frame's payload after the other, and None after the last.
    :param left_over: so many bytes of a file that nobody wants are passed over; None for all.
    :raises WireError: in the iterators: what arrives is not what :func:`contents` makes.
    """

    def __init__(
        self, next_frame: Callable[[], bytes | None], left_over: int | None = None
    ) -> None:
        self._next_frame = next_frame
        self._left_over = left_over
        self._payload = b""
        self._position = 0

    def __iter__(self) -> Iterator[tuple[bytes, int, Iterator[bytes]]]:
        """Yield the key, the time of modification and the contents of each file.

        What is left of one file's contents is passed over when the next is asked for.
        """
        while (tag := self._tag()) is not None:
            if tag not in (b"B", b"W"):
                raise WireError("contents begin within a file")
            _, key_length, mtime_ns, length = self._unpack(_BEGIN)
            key = self._take(key_length)
            first = self._take(length)
            if tag == b"W":
                yield key, mtime_ns, iter((first,) if first else ())
            else:
                pieces = self._pieces(first)
                # Whoever stops half-way by closing what reads them does not close this.
                yield key, mtime_ns, itertools.chain(pieces)
                passed = 0
                try:
                    for piece in pieces:
                        passed += len(piece)
                        if self._left_over is not None and passed > self._left_over:
                            raise WireError("a file is much longer than it was")
                except Damaged:
                    pass

    def _pieces(self, first: bytes) -> Iterator[bytes]:
        yield first
        while True:
            tag = self._tag()
            if tag not in (b"D", b"E", b"X"):
                raise WireError("contents end within a file")
            _, length = self._unpack(_DATA)
            if tag == b"X":
                raise Damaged("the file has changed")
            yield self._take(length)
            if tag == b"E":
                return

    def _tag(self) -> bytes | None:
        while self._position >= len(self._payload):
            payload = self._next_frame()
            if payload is None:
                return None
            self._payload, self._position = payload, 0
        return self._payload[self._position : self._position + 1]

    def _unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        if self._position + layout.size > len(self._payload):
            raise WireError("contents are cut off")
        found = layout.unpack_from(self._payload, self._position)
        self._position += layout.size
        return found

    def _take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._payload):
            raise WireError("contents are cut off")
        data = self._payload[self._position : end]
        self._position = end
        return data
