"""The client's end of a connection: a socket that is polled, or a stream that cannot be."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable

from wherry.platform.base import AcceptedStream, LocalStream
from wherry.platform.hangup import hangs_up
from wherry.relay.pump import SEND_BUFFER_BYTES, Ending, LocalReader
from wherry.tunnel.inbox import rest_of

_LOOK_AGAIN_S = 1.0
_LINGER_S = 1.0
_LINGER_BYTES = 64 * 1024
_NOW = getattr(socket, "MSG_DONTWAIT", 0)
"""Makes one call not wait. The socket itself blocks: its reader then wakes with its bytes."""


class LocalEnd:
    """Reads and writes one client; one thread may read while another writes.

    :param stream: owned from now on; a socket is a blocking one.
    """

    def __init__(self, stream: AcceptedStream) -> None:
        self._stream = stream
        self._hung_up = False
        self._ending = Ending(stream)
        self.read = LocalReader(stream)
        """Waits for bytes of the client."""
        self.socket = self.read.socket
        """The stream, if it can be polled (a named pipe cannot)."""
        if self.socket is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def read_by(self, buffer: memoryview, deadline: float) -> int:
        """Wait for bytes until a time on the monotonic clock.

        :raises OSError: the client is gone, or sent none until then.
        """
        left = max(0.0, deadline - time.monotonic())
        if self.socket is not None:
            if not _poll(self.socket, select.POLLIN, left * 1000):
                raise TimeoutError
            return self.read([buffer])
        timer = threading.Timer(left, self.hang_up)
        timer.start()
        try:
            return self.read([buffer])
        finally:
            timer.cancel()

    def read_some(self, buffer: bytearray) -> int | None:
        """Read without waiting; None when there is nothing.

        :raises OSError: the client is gone.
        """
        if self.socket is None:
            assert not isinstance(self._stream, socket.socket)
            return self._stream.recv_ready(memoryview(buffer))
        try:
            return self.socket.recv_into(buffer, 0, _NOW)
        except BlockingIOError:
            return None

    def send_some(self, parts: list[memoryview]) -> int:
        """Write what there is room for and return how many bytes; never waits for a socket.

        :raises OSError: the client is gone.
        """
        if self.socket is None:
            self.send_all(list(parts))
            return sum(map(len, parts))
        try:
            return self.socket.sendmsg(parts, (), _NOW)
        except BlockingIOError:
            return 0

    def send_all(self, parts: list[memoryview | bytes]) -> None:
        """Write all, waiting for room.

        :raises OSError: the client is gone.
        """
        if self.socket is None:
            for part in parts:
                self._stream.sendall(part)
            return
        left = [memoryview(part) for part in parts if part]
        while left:
            try:
                left = rest_of(left, self.socket.sendmsg(left, (), _NOW))
            except BlockingIOError:
                _poll(self.socket, select.POLLOUT, None)

    def is_gone(self) -> bool:
        """Whether the client has closed the connection, and not its own direction alone."""
        return self._hung_up or (self.socket is not None and hangs_up(self.socket, 0.0))

    def has_input(self) -> bool:
        """Whether there is something to read; False of a client that cannot be polled."""
        return self.socket is not None and bool(_poll(self.socket, select.POLLIN, 0))

    def await_end(self, ended: Callable[[], bool]) -> None:
        """Wait until ``ended``, or until a client with a socket is gone."""
        assert self.socket is not None
        while not (ended() or self._hung_up or hangs_up(self.socket, _LOOK_AGAIN_S)):
            pass

    def await_gone(self) -> None:
        """Wait until a client that cannot be polled is gone, or until :meth:`hang_up`."""
        assert not isinstance(self._stream, socket.socket)
        try:
            self._stream.await_gone()
        except OSError:
            pass  # it was closed here

    def end_writing(self) -> None:
        """Let the client read the end of the stream."""
        self._ending.shut(socket.SHUT_WR)

    def hang_up(self) -> None:
        """End both directions and wake whoever waits here; from any thread."""
        self._hung_up = True
        self._ending.shut(socket.SHUT_RDWR)

    def linger(self) -> None:
        """End writing, and read for a moment what the client still sends.

        A client that is cut off while it sends may not read what it was told (RFC 9112
        §9.6).
        """
        if self.socket is None:
            # Which waits until the client has read it, or wants no more than to send.
            timer = threading.Timer(_LINGER_S, self.hang_up)
            timer.start()
            self.end_writing()
            timer.cancel()
            return
        self.end_writing()
        deadline = time.monotonic() + _LINGER_S
        buffer = bytearray(_LINGER_BYTES)
        while (left := deadline - time.monotonic()) > 0:
            if _poll(self.socket, select.POLLIN, left * 1000) and not self.socket.recv_into(buffer):
                return

    def close(self) -> None:
        """Release the stream."""
        self._ending.close()


def _poll(stream: LocalStream, events: int, timeout_ms: float | None) -> int:
    poller = select.poll()
    poller.register(stream.fileno(), events)
    return sum(found for _, found in poller.poll(timeout_ms))
