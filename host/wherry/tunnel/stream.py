"""What a channel through the tunnel is to code that does not know SSH."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from wherry.core.errors import TunnelError

_ROOM_BYTES = 128 * 1024


class Sink(Protocol):
    """Takes a stream's bytes in the thread in which they arrive; see :meth:`Stream.deliver_to`.

    No method may block: that thread serves every stream of the connection.
    """

    def write(self, parts: list[memoryview], /) -> int:
        """Take the first bytes of ``parts`` and return how many; 0 when there is no room.

        :raises OSError: the bytes can go nowhere any more.
        """

    def stalled(self) -> None:
        """Learn that bytes wait which :meth:`write` had no room for.

        From now on nothing is written here until a thread of the sink's owner has
        called :meth:`Stream.drain` and that has returned.
        """

    def ended(self, error: TunnelError | None) -> None:
        """Learn, once, that all bytes were taken and no more come.

        :param error: why the stream broke off; None when the other side ended it.
        """

    def hung_up(self) -> None:
        """Learn, once and after :meth:`ended`, that the other side takes no more bytes either."""


class Stream(Protocol):
    """A byte stream to a program in the guest.

    One thread may read while another writes; :meth:`close` may be called from any
    thread, and wakes both. Data not yet read is bounded by the channel's window.
    """

    def recv(self, size: int, /) -> bytes:
        """Wait for bytes and return up to ``size`` of them; ``b""`` at the end of the stream.

        :raises TunnelError: the channel was refused, closed here, or the connection lost.
        """

    def recv_into(self, buffer: memoryview, /) -> int:
        """Like :meth:`recv`, into a buffer; 0 at the end of the stream."""

    def sendall(
        self, data: memoryview | bytes, /, waiting: Callable[[], None] | None = None
    ) -> None:
        """Send all of ``data``; waits while the other side's window is full.

        :param waiting: called again and again meanwhile, under the stream's lock: it must
            not use the stream. What it raises ends the sending.
        :raises TunnelError: the other side takes no more, or the connection was lost.
        """

    def send_from(self, read: Read, /, waiting: Callable[[], None] | None = None) -> int:
        """Read once and send that from where it was read to; return how many bytes, 0 at the end.

        For those who have much to send: it saves a copy, and memory for each packet.

        :param waiting: as for :meth:`sendall`.
        :raises OSError: what ``read`` raised.
        :raises TunnelError: as :meth:`sendall`.
        """

    def shutdown_write(self) -> None:
        """End our direction: the other side reads the end of the stream. Safe to repeat."""

    def close(self) -> None:
        """End both directions at once; safe to call twice and from any thread.

        When this returns, the sink is not written any more, but by its owner's thread in
        :meth:`drain`, which then ends; the sink is told of the end after that.
        """

    def deliver_to(self, sink: Sink, /) -> None:
        """Hand all bytes, the ones waiting first, to ``sink`` instead of :meth:`recv`.

        Bytes then need no thread of their own to pass: they are written in the
        thread that decrypted them.
        """

    def drain(self, sink_write: DrainWrite, /) -> None:
        """Write what a stalled sink left over, until nothing is left.

        :param sink_write: writes all it is given, and may block.
        :raises OSError: what ``sink_write`` raised; the rest is lost.
        """


class CopyingSender:
    """:meth:`Stream.send_from` for a stream that can send from any memory."""

    _sent_from: memoryview | None = None

    def sendall(
        self, data: memoryview | bytes, /, waiting: Callable[[], None] | None = None
    ) -> None:
        """See :meth:`Stream.sendall`."""
        raise NotImplementedError

    def send_from(self, read: Read, /, waiting: Callable[[], None] | None = None) -> int:
        """See :meth:`Stream.send_from`."""
        if self._sent_from is None:
            self._sent_from = memoryview(bytearray(_ROOM_BYTES))
        count = read([self._sent_from])
        self.sendall(self._sent_from[:count], waiting)
        return count


class Read(Protocol):
    """Waits for bytes, fills the first parts first, and returns how many came; 0 at the end."""

    def __call__(self, parts: list[memoryview], /) -> int: ...


class DrainWrite(Protocol):
    """Writes all of some bytes, waiting as long as that takes."""

    def __call__(self, parts: list[memoryview], /) -> None: ...
