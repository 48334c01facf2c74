"""Where a message's body ends (RFC 9112 §6 and §7), found without rebuilding the data."""

from __future__ import annotations

import re
from typing import Protocol

Ranges = list[tuple[int, int]]
"""Parts of some bytes, each from its first byte to the one after its last."""

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
"""A chunk's size and extensions (RFC 9112 §7.1); the size fits in 63 bits."""

_NEXT_CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})\r\n")
"""What is between two chunks as Go writes them: 32 KiB each, so it is there often."""

_TRAILER_LINE = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")

_WINDOW_BYTES = 32
_LINE_LIMIT_BYTES = 4096
_TRAILERS_LIMIT_BYTES = 16 * 1024


class MalformedBody(Exception):
    """A body that is not framed as its head said."""


class Body(Protocol):
    """Tells which of the bytes that come belong to a body."""

    done: bool
    """Whether the body has ended."""

    tail: int
    """Once done: how many of the bytes taken last must be kept back to keep the end back."""

    def feed(self, data: memoryview, content: Ranges | None = None) -> int:
        """Return how many of the bytes are the body's; all of them until it is done.

        :param content: the ranges that are content, and not framing, are appended.
        :raises MalformedBody: the bytes cannot be the body's.
        """


class Length:
    """A body of known length (RFC 9112 §6.2).

    :param length: bytes.
    """

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = not length
        self.tail = 0

    def feed(self, data: memoryview, content: Ranges | None = None) -> int:
        """See :meth:`Body.feed`."""
        taken = min(len(data), self._left)
        self._left -= taken
        if not self._left:
            self.done = True
            self.tail = taken
        if content is not None and taken:
            content.append((0, taken))
        return taken


class UntilEnd:
    """A body that ends with the stream (RFC 9112 §6.3, item 8)."""

    done = False
    tail = 0

    def feed(self, data: memoryview, content: Ranges | None = None) -> int:
        """See :meth:`Body.feed`."""
        if content is not None:
            content.append((0, len(data)))
        return len(data)


class Chunked:
    """A body in chunks (RFC 9112 §7.1), its trailers included.

    It takes nothing that two readers could understand differently: no bare LF, no space
    around a size, no folded trailer.
    """

    def __init__(self) -> None:
        self.done = False
        self.tail = 0
        self._left = 0
        self._reads = self._size
        self._line = b""
        self._trailers = 0
        self._last_chunk_at = 0

    def feed(self, data: memoryview, content: Ranges | None = None) -> int:
        """See :meth:`Body.feed`."""
        position, size = 0, len(data)
        self._last_chunk_at = 0
        while position < size and not self.done:
            if self._left:
                step = min(self._left, size - position)
                if content is not None:
                    content.append((position, position + step))
                self._left -= step
                position += step
                continue
            if self._reads == self._data_end and not self._line:
                match = _NEXT_CHUNK.match(data, position)
                if match is not None and (left := int(match[1], 16)):
                    self._left = left
                    position = match.end()
                    continue
            # Between chunks there are only short lines, so a small copy is searched.
            window = bytes(data[position : position + _WINDOW_BYTES])
            end = window.find(b"\n") + 1
            if len(self._line) + (end or len(window)) > _LINE_LIMIT_BYTES:
                raise MalformedBody("a line between the chunks is too long")
            if not end:
                self._line += window
                position += len(window)
                continue
            begin = position if not self._line else 0
            line = self._line + window[:end]
            self._line = b""
            position += end
            self._reads(line, begin)
        if self.done:
            self.tail = position - self._last_chunk_at
        return position

    def _size(self, line: bytes, begin: int) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise MalformedBody("a chunk's size is malformed")
        self._left = int(match[1], 16)
        if self._left:
            self._reads = self._data_end
        else:
            self._last_chunk_at = begin
            self._reads = self._trailer

    def _data_end(self, line: bytes, begin: int) -> None:
        if line != b"\r\n":
            raise MalformedBody("a chunk is longer than its size")
        self._reads = self._size

    def _trailer(self, line: bytes, begin: int) -> None:
        if line == b"\r\n":
            self.done = True
            return
        self._trailers += len(line)
        if self._trailers > _TRAILERS_LIMIT_BYTES or not _TRAILER_LINE.fullmatch(line):
            raise MalformedBody("the trailers are too long or malformed")
