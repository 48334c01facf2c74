"""A connection to the guest's end of a root: frames in and out, and requests with their answers.

What breaks the protocol ends the connection, and so does a guest that says nothing for too long.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from wherry.core.errors import WherryError
from wherry.sync.packing import unpack as unpack_contents
from wherry_sync import wire
from wherry_sync.packing import Packer
from wherry_wire.frames import Decoder, Frame, WireError
from wherry_wire.messages import Done, Failure, Message, SyncBusy, pack, unpack

_RECEIVE_BYTES = 256 * 1024
_SEND_BYTES = 256 * 1024

SILENCE_S = 30.0
"""How long the guest may say nothing; at work on something long it speaks every 2 s."""

BUSY_S = 3600.0
"""How long it may say nothing but that it is at work. A scan after a loss of power reads all
files, at some 60 MB/s in emulation, and begins anew when it is cut off."""

LEFT_OVER_BYTES = 256 << 20
"""How much of contents that nobody wants any more is read to keep the connection."""

M = TypeVar("M", bound=Message)


class Stream(Protocol):
    """What of :class:`wherry.tunnel.stream.Stream` is needed here."""

    def recv(self, size: int, /) -> bytes:
        """Wait for bytes and return up to ``size`` of them; ``b""`` at the end."""

    def sendall(self, data: bytes, /) -> None:
        """Send all of ``data``."""

    def close(self) -> None:
        """End it, and wake whoever waits in :meth:`recv` or :meth:`sendall`."""


class Connection:
    """One connection. One thread at a time, save :meth:`close`.

    :param stream: owned from now on.
    :param progress: called with the bytes of contents that were sent or received.
    :param silence_s: how long the guest may say nothing while it is waited for.
    """

    def __init__(self, stream: Stream, progress: Callable[[int], object], silence_s: float) -> None:
        self._stream = stream
        self._progress = progress
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self._asked_at = 0.0
        self.on_busy: Callable[[str], object] = lambda path: progress(0)
        """Called when the guest says that it is at work, with the path that it looks at."""
        self._guard = _Guard(stream, silence_s)

    def close(self) -> None:
        """End the connection; safe to call twice and from any thread."""
        self._guard.close()
        self._stream.close()

    def _contents(self, request: Message) -> Iterator[tuple[bytes, int, Iterator[bytes]]]:
        """Send a request that is answered by contents, and yield these."""
        self._send((pack(request, 0),))
        ended = False

        def next_frame() -> bytes | None:
            nonlocal ended
            if ended:
                return None
            frame = self._next()
            if frame.type in (wire.CONTENTS, wire.PACKED):
                self._progress(len(frame.payload))
                if frame.type == wire.CONTENTS:
                    return frame.payload
                try:
                    return unpack_contents(frame.payload)
                except WireError as error:
                    raise self._broken(error) from error
            self._expect(frame, Done)
            ended = True
            return None

        with self._guard:
            try:
                yield from wire.Contents(next_frame, LEFT_OVER_BYTES)
            except WireError as error:
                raise self._broken(error) from error
            finally:
                # Whoever stops half-way leaves the rest to be read. When that fails, the connection
                # has ended, which the next request tells.
                with contextlib.suppress(OSError):
                    left_over = 0
                    while not ended and not self._guard.closed:
                        left_over += len(next_frame() or b"")
                        if left_over > LEFT_OVER_BYTES:
                            self.close()

    def _gather(self, take: Callable[[bytes], object]) -> Callable[[bytes], None]:
        """Return what takes the frames of a list of rows, as long as that is not too long."""
        size = 0

        def gather(payload: bytes) -> None:
            nonlocal size
            size += len(payload)
            if size > wire.MAX_ROWS_BYTES:
                raise WireError("the list is too long")
            take(payload)

        return gather

    def _collect(self, rows: list[tuple[bytes, ...]], width: int) -> Callable[[bytes], None]:
        """Return what takes the rows of a list, likewise."""

        def collect(payload: bytes) -> None:
            rows.extend(wire.parse_rows(payload, width))
            if len(rows) > wire.MAX_ROWS:
                raise WireError("the list is too long")

        return self._gather(collect)

    def _call(
        self, request: Message, kind: type[M], take: Callable[[bytes], None] | None = None
    ) -> M:
        """Send a request and return its answer; rows before it go to ``take``."""
        self._send((pack(request, 0),))
        return self._answer(kind, take)

    def _answer(self, kind: type[M], take: Callable[[bytes], None] | None = None) -> M:
        with self._guard:
            while True:
                frame = self._next()
                if frame.type != wire.ROWS:
                    return self._expect(frame, kind)
                try:
                    if take is None:
                        raise WireError("rows that nobody asked for")
                    take(frame.payload)
                except WireError as error:
                    raise self._broken(error) from error

    def _expect(self, frame: Frame, kind: type[M]) -> M:
        try:
            reply = unpack(frame)
            if isinstance(reply, Failure):
                raise OSError(f"in the guest: {reply.message[:500]}")
            if not isinstance(reply, kind):
                raise WireError(f"{type(reply).__name__} instead of {kind.__name__}")
        except WireError as error:
            raise self._broken(error) from error
        return reply

    def _next(self) -> Frame:
        while True:
            while not self._frames:
                try:
                    data = self._stream.recv(_RECEIVE_BYTES)
                except (OSError, WherryError) as error:
                    raise self._lost(error) from error
                if not data:
                    raise self._lost(None)
                self._guard.heard()
                try:
                    self._frames = self._decoder.feed(data)
                except WireError as error:
                    raise self._broken(error) from error
                self._frames.reverse()
            frame = self._frames.pop()
            if frame.type != SyncBusy.TYPE:
                self._asked_at = time.monotonic()
                self._progress(0)
                return frame
            try:
                busy = unpack(frame)
                assert isinstance(busy, SyncBusy)
                path = wire.parse_path(busy.path.encode(), shown=True)
            except WireError as error:
                raise self._broken(error) from error
            self.on_busy(path)
            if time.monotonic() > self._asked_at + BUSY_S:
                raise self._lost(OSError(f"the guest is busy for more than {BUSY_S:g} s"))

    def _send(
        self,
        frames: Iterable[bytes],
        progress: Callable[[int], object] = lambda size: None,
        packer: Packer | None = None,
    ) -> None:
        """Send frames, several at once where they are small."""
        buffer = bytearray()
        with self._guard:
            for frame in frames:
                buffer += frame
                progress(len(frame))
                if len(buffer) >= _SEND_BYTES:
                    begun = time.perf_counter()
                    self._send_now(buffer)
                    if packer is not None:
                        packer.sent(len(buffer), time.perf_counter() - begun)
                    buffer = bytearray()
            if buffer:
                self._send_now(buffer)

    def _send_now(self, data: bytearray) -> None:
        self._asked_at = time.monotonic()
        try:
            self._stream.sendall(bytes(data))
        except (OSError, WherryError) as error:
            raise self._lost(error) from error
        self._guard.heard()

    def _lost(self, error: Exception | None) -> OSError:
        reason = self._guard.reason or (str(error) if error is not None else "it was closed")
        self.close()
        return OSError(f"the connection to the guest was lost: {reason}")

    def _broken(self, error: WireError) -> OSError:
        self.close()
        return OSError(f"the agent in the guest broke the protocol: {error}")


class _Guard:
    """Closes the stream when the guest says nothing for too long while it is waited for."""

    def __init__(self, stream: Stream, silence_s: float) -> None:
        self._stream = stream
        self._silence_s = silence_s
        self._changed = threading.Condition()
        self._depth = 0
        self._deadline = 0.0
        self.closed = False
        self.reason = ""
        threading.Thread(target=self._run, name="sync guard", daemon=True).start()

    def __enter__(self) -> None:
        with self._changed:
            self._depth += 1
            self._deadline = time.monotonic() + self._silence_s
            if self._depth == 1:
                self._changed.notify()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1

    def heard(self) -> None:
        """Begin to count anew."""
        self._deadline = time.monotonic() + self._silence_s

    def close(self) -> None:
        """End the thread; safe to call twice."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self.closed:
                if not self._depth:
                    self._changed.wait()
                    continue
                left = self._deadline - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self.reason = f"the guest said nothing for {self._silence_s:g} s"
                self._stream.close()
                return
