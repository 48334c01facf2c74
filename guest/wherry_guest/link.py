"""The frames of one root's connection, and what is sent along with a request or an answer.

Which rows and contents those are: :mod:`wherry_sync.wire`.
"""

from __future__ import annotations

import _thread
import time

from wherry_guest import packing
from wherry_sync import wire
from wherry_sync.packing import Packer
from wherry_wire.frames import Decoder, Frame, WireError
from wherry_wire.messages import Message, SyncBusy, SyncEnd, pack, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    T = TypeVar("T")

_READ_BYTES = 256 * 1024
_BUSY_S = 2.0


class Ended(Exception):
    """The host closed the connection."""


class Link:
    """One connection, used by one thread.

    :param connection: stays its owner's, who closes it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self._rows: list[bytes] = []
        self._writing = _thread.allocate_lock()
        self._working_since = 0.0
        self._ended = False
        self._packer = Packer(packing.compress) if packing.available() else None
        self.at: Callable[[], str] = lambda: ""
        """Returns the path that is being looked at."""
        _thread.start_new_thread(self._busy, ())

    def close(self) -> None:
        """Let no thread use the connection any more."""
        self._ended = True

    def request(self) -> Message:
        """Wait for the next request; the rows before it are kept until it is answered.

        :raises Ended: there is none.
        :raises WireError: it is malformed.
        :raises OSError: the connection is broken.
        """
        self._rows.clear()
        while (frame := self._next()).type == wire.ROWS:
            self._rows.append(frame.payload)
        self._working_since = time.monotonic()
        return unpack(frame)

    def answer(self, reply: Message) -> None:
        """End the request."""
        self._working_since = 0.0
        self.say(reply)

    def say(self, message: Message) -> None:
        """Send a control frame."""
        self.send((pack(message, 0),))

    def send(self, frames: Iterable[bytes]) -> None:
        """Send frames as they are made."""
        for frame in frames:
            with self._writing:
                self._connection.sendall(frame)

    def send_contents(self, files: Iterable[tuple[bytes, int, Iterable[bytes]]]) -> None:
        """Send files as they are read."""
        packer = self._packer
        if packer is None:
            self.send(wire.contents(files))
            return
        for frame in wire.contents(files, packer):
            begun = time.perf_counter()
            self.send((frame,))
            packer.sent(len(frame), time.perf_counter() - begun)

    def rows(self, width: int) -> Iterator[tuple[bytes, ...]]:
        """Yield the rows that came before the request."""
        for payload in self._rows:
            yield from wire.parse_rows(payload, width)

    def contents(self) -> Callable[[], bytes | None]:
        """Return what gives one piece of contents after the other, and None after the last."""
        ended = False

        def next_piece() -> bytes | None:
            nonlocal ended
            if not ended:
                frame = self._next()
                if frame.type == wire.CONTENTS:
                    return frame.payload
                if frame.type == wire.PACKED:
                    return packing.unpack(frame.payload)
                if not isinstance(unpack(frame), SyncEnd):
                    raise WireError("contents are cut off")
                ended = True
            return None

        return next_piece

    def _busy(self) -> None:
        """Let the host see that a long request is being worked on."""
        while not self._ended:
            time.sleep(_BUSY_S)
            since = self._working_since
            if since and time.monotonic() - since > _BUSY_S and not self._ended:
                try:
                    self.say(SyncBusy(path=self.at()))
                except OSError:
                    return

    def _next(self) -> Frame:
        while not self._frames:
            data = self._connection.recv(_READ_BYTES)
            if not data:
                raise Ended
            self._frames = self._decoder.feed(data)
            self._frames.reverse()
        return self._frames.pop()


def is_cut(error: OSError) -> bool:
    """Whether the connection is broken, as against something on the disk."""
    return isinstance(error, (BrokenPipeError, ConnectionError))


def to_the_end(next_piece: Callable[[], bytes | None], work: Callable[[], T]) -> T:
    """Do what reads contents; when the disk fails, read them to their end before saying so."""
    try:
        return work()
    except OSError as error:
        if is_cut(error):
            raise
        while next_piece() is not None:
            pass
        raise
