"""The bytes that arrived on a channel and that nobody has taken yet."""

from __future__ import annotations

import threading
from collections import deque

from wherry.core.errors import TunnelError
from wherry.tunnel.stream import DrainWrite, Sink

_PARTS_AT_ONCE = 8
_JOINED_BYTES = 16 * 1024
"""Small parts wait together up to this: a program that writes byte by byte would otherwise
cost four hundred times the window."""


class Inbox:
    """A queue of bytes from the transport's thread to whoever reads the stream.

    It has no bound of its own: the channel's window is the bound, since only bytes
    that were taken are given back to the sender.

    Takes the place of paramiko's BufferedPipe (``feed``, ``close``, ``len``), which
    copies each byte twice and wakes a thread for each packet. With a sink, bytes do
    not stop here while the sink has room. Invariant: the sink is written by the
    transport's thread while ``_draining`` is false, and by the drainer's while it
    is true, so order is kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._chunks: deque[bytes | bytearray | memoryview] = deque()
        self._closed = False
        self._sink: Sink | None = None
        self._detached = False
        self._draining = False
        self._told = 0

    def __len__(self) -> int:
        with self._lock:
            return sum(len(chunk) for chunk in self._chunks)

    def feed(self, parts: list[memoryview]) -> int:
        """Add bytes; return how many of them the sink took at once.

        :param parts: good during the call alone; what stays is copied.
        """
        taken = 0
        stalled: Sink | None = None
        with self._lock:
            if self._detached:
                return sum(map(len, parts))
            sink = self._sink
            if sink is not None and not self._draining:
                try:
                    taken = sink.write(parts)
                except OSError:
                    # Whoever owns the sink learns of it by its own means; these bytes
                    # go nowhere, and taking them keeps the window from closing.
                    return sum(map(len, parts))
                parts = rest_of(parts, taken)
                if not parts:
                    return taken
                self._draining = True
                stalled = sink
            for part in parts:
                self._keep(part)
            if sink is None:
                self._ready.notify()
        if stalled is not None:
            stalled.stalled()
        return taken

    def _keep(self, part: memoryview) -> None:
        tail = self._chunks[-1] if self._chunks else None
        if isinstance(tail, bytearray) and len(tail) + len(part) <= _JOINED_BYTES:
            tail += part
        else:
            self._chunks.append(bytearray(part) if len(part) < _JOINED_BYTES else bytes(part))

    def close(self) -> None:
        """Let readers see the end once the bytes are taken; :meth:`tell_end` tells the sink."""
        with self._lock:
            self._closed = True
            self._ready.notify_all()

    def tell_end(self, error: TunnelError | None, *, gone: bool) -> None:
        """Tell the sink what it has not been told of the end, unless bytes still wait.

        The caller holds no lock of the channel, as the sink may close the channel.

        :param gone: the other side takes nothing more either.
        """
        with self._lock:
            sink, told = self._sink, self._told
            if sink is None or not self._closed or self._draining:
                return
            self._told = 2 if gone else max(told, 1)
            self._forget_sink()
        if told < 1:
            sink.ended(error)
        if gone and told < 2:
            sink.hung_up()

    def detach(self) -> None:
        """Write to no sink any more, and drop what waits for one.

        When this returns no write is under way but a drainer's, whose end the sink is told.
        """
        with self._lock:
            self._detached = True
            if self._sink is not None:
                self._chunks.clear()
                self._forget_sink()

    def _forget_sink(self) -> None:
        """Let go of a sink that needs us no more, whose buffers are large."""
        if self._detached and self._told == 2:
            self._sink = None

    def read_into(self, buffer: memoryview) -> int:
        """Wait for bytes, move them into ``buffer``, return how many; 0 at the end."""
        count = 0
        with self._lock:
            while not self._chunks and not self._closed:
                self._ready.wait()
            while self._chunks and count < len(buffer):
                chunk = self._chunks[0]
                part = memoryview(chunk)[: len(buffer) - count]
                buffer[count : count + len(part)] = part
                count += len(part)
                if len(part) == len(chunk):
                    self._chunks.popleft()
                else:
                    self._chunks[0] = memoryview(chunk)[len(part) :]
        return count

    def read(self, size: int) -> bytes:
        """Wait for bytes and return up to ``size`` of them; ``b""`` at the end."""
        with self._lock:
            while not self._chunks and not self._closed:
                self._ready.wait()
            if not self._chunks:
                return b""
            chunk = self._chunks[0]
            if len(chunk) <= size:
                self._chunks.popleft()
                return bytes(chunk)
            self._chunks[0] = memoryview(chunk)[size:]
            return bytes(memoryview(chunk)[:size])

    def attach(self, sink: Sink) -> None:
        """Write to ``sink`` from now on; it is told to drain first if bytes wait."""
        with self._lock:
            self._sink = sink
            self._draining = waiting = bool(self._chunks)
        if waiting:
            sink.stalled()

    def drain(self, write: DrainWrite, taken: list[int]) -> bool:
        """Write some waiting bytes; return False, and end draining, when there are none.

        :param taken: their number is appended.
        :raises OSError: what ``write`` raised; these and later bytes are dropped.
        """
        with self._lock:
            if not self._chunks:
                self._draining = False
                return False
            parts = [memoryview(self._chunks.popleft())]
            while self._chunks and len(parts) < _PARTS_AT_ONCE:
                parts.append(memoryview(self._chunks.popleft()))
        taken.append(sum(map(len, parts)))
        try:
            write(parts)
        except BaseException:
            with self._lock:
                self._chunks.clear()
                self._draining = False
            raise
        return True


def rest_of(parts: list[memoryview], taken: int) -> list[memoryview]:
    """Return what is left of ``parts`` without their first ``taken`` bytes."""
    for index, part in enumerate(parts):
        if taken < len(part):
            return [part[taken:], *parts[index + 1 :]]
        taken -= len(part)
    return []
