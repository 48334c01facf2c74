"""A socket that several threads use, and one of them closes."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class SharedSocket:
    """A socket whose descriptor is given back when no thread is in a call of it any more.

    Python lets one thread close a socket while another one is about to enter the system with its
    number. If that number is another connection's by then, that one gets the bytes, or loses some.

    Has of a socket what the relays and paramiko use, and is none: see
    :class:`wherry.relay.pump.Pump` for what that means.

    :param sock: owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False  # a name that paramiko's transport looks at

    def _call(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call a function that uses the descriptor.

        :raises OSError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            return function(*arguments, **options)
        finally:
            with self._lock:
                self._users -= 1
                if self._closed and not self._users:
                    self._sock.close()

    def close(self) -> None:
        """Wake all that wait in the socket, and close it after the last has left; at once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was faster
            if not self._users:
                self._sock.close()

    def recv(self, size: int) -> bytes:
        """See :meth:`socket.socket.recv`, as for all that follow."""
        return self._call(self._sock.recv, size)

    def recv_into(self, buffer: memoryview) -> int:
        """Read into a buffer."""
        return self._call(self._sock.recv_into, buffer)

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """Send some of the data."""
        return self._call(self._sock.send, data, flags)

    def sendall(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        self._call(self._sock.sendall, data)

    @property
    def sendmsg(self) -> Callable[[Sequence[bytes | memoryview]], int] | None:
        """Sends some of several buffers; None where sockets cannot (Windows)."""
        return self._sendmsg if hasattr(self._sock, "sendmsg") else None

    def _sendmsg(self, buffers: Sequence[bytes | memoryview]) -> int:
        return self._call(self._sock.sendmsg, buffers)

    def shutdown(self, how: int) -> None:
        """End one direction, or both."""
        self._call(self._sock.shutdown, how)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Set an option."""
        self._call(self._sock.setsockopt, level, option, value)

    def settimeout(self, seconds: float | None) -> None:
        """Bound what waits."""
        self._call(self._sock.settimeout, seconds)

    def getpeername(self) -> Any:
        """Return the other side's address."""
        return self._call(self._sock.getpeername)

    def fileno(self) -> int:
        """Return the descriptor; -1 when it is closed."""
        return -1 if self._closed else self._sock.fileno()
