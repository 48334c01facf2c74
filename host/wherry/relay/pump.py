"""Moving bytes between a program on the host and one in the guest.

Each direction ends on its own: when one side sends no more, the other is told
(``shutdown``), and bytes the other way go on. Only when both have ended, or one
side is gone, is everything closed.

Towards the guest a thread reads the local stream and sends. From the guest, bytes
are written to a local *socket* in the thread that decrypted them (see
:meth:`wherry.tunnel.stream.Stream.deliver_to`), and by a worker only while the
reader is slower than the guest. A local stream that cannot be polled (a named pipe)
has a second thread instead.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext

from wherry.core.errors import TunnelError
from wherry.platform.base import LocalStream
from wherry.platform.hangup import hangs_up
from wherry.tunnel.inbox import rest_of
from wherry.tunnel.stream import Stream

Spawn = Callable[[Callable[[], None]], None]
"""Runs a job in another thread; see :meth:`wherry.relay.workers.Workers.spawn`."""

_FIRST_BUFFER_BYTES = 16 * 1024
_FULL_BUFFER_BYTES = 128 * 1024
_LOOK_AGAIN_S = 1.0
_NOW = getattr(socket, "MSG_DONTWAIT", 0)
"""Makes one call not wait. The socket itself blocks: its reader then wakes with its bytes."""

SEND_BUFFER_BYTES = 256 * 1024
"""Of a local program's socket: one read's worth of packets. With less (macOS: 8 KiB) a
worker is woken for each read."""


class LocalReader:
    """Reads a local stream; see :class:`wherry.tunnel.stream.Read`.

    :param local: a socket is a blocking one.
    """

    def __init__(self, local: LocalStream) -> None:
        self._local = local
        self.socket: socket.socket | None = None
        """The stream, if it can be polled. Then several parts are filled at once, else one."""
        self._poller: select.poll | None = None
        if isinstance(local, socket.socket) and hasattr(select, "poll"):
            # A thread that waits in recv(2) is woken whenever the program has read some of what
            # is sent to it; one that polls for input is not (unix_write_space in Linux).
            self.socket = local
            self._poller = _poller(local, select.POLLIN)

    def __call__(self, parts: list[memoryview]) -> int:
        """Wait for bytes.

        :raises OSError: the other side is gone.
        """
        if self._poller is None or self.socket is None:
            return self._local.recv_into(parts[0])
        self._poller.poll()
        return self.socket.recvmsg_into(parts)[0]


class Ending:
    """Ends a local stream, which may happen in one thread while another one closes it."""

    def __init__(self, local: LocalStream) -> None:
        self._local = local
        self._closed = False
        # A socket's descriptor may be another connection's once it is closed. Others look after
        # that themselves, and may wait in shutdown() until another thread's ends that.
        self._lock = threading.Lock() if isinstance(local, socket.socket) else nullcontext()

    def shut(self, how: int) -> None:
        """Shut down one direction, or both; again and again, and after the end, to no effect."""
        with self._lock:
            if self._closed:
                return
            try:
                self._local.shutdown(how)
            except OSError:
                pass  # the other side was faster

    def close(self) -> None:
        """Give the stream back."""
        with self._lock:
            self._closed = True
            self._local.close()


class Pump:
    """One relayed connection.

    :param local: the host's side; a socket is a blocking one.
    :param remote: the guest's side; need not be confirmed yet.
    :param spawn: runs helpers in other threads.
    :param head: bytes already read from ``local``, sent before all others.
    """

    def __init__(
        self, local: LocalStream, remote: Stream, spawn: Spawn, *, head: bytes = b""
    ) -> None:
        self._local = local
        self._remote = remote
        self._spawn = spawn
        self._head = head
        self._down_done = threading.Event()
        self._aborted = False
        self._draining = threading.Lock()
        self._ending = Ending(local)
        self._read = LocalReader(local)
        self._socket = self._read.socket
        self.bytes_up = 0
        """Bytes sent to the guest; written by one thread."""
        self.bytes_down = 0
        """Bytes received from the guest; written by one thread at a time."""

    def run(self) -> None:
        """Relay until both directions have ended or one side is gone; close both sides."""
        try:
            if self._socket is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                self._remote.deliver_to(self)
            else:
                self._spawn(self._copy_down)
            try:
                if self._head:
                    self._remote.sendall(self._head)
                    self.bytes_up += len(self._head)
                self._copy_up()
            except TunnelError:
                # The guest's side takes no more; what it sent is still delivered.
                pass
            else:
                self._remote.shutdown_write()
            self._await_down()
        except OSError:
            pass  # the local side is gone
        finally:
            self.abort()
            with self._draining:
                self._ending.close()

    def abort(self) -> None:
        """End both directions at once; from any thread; :meth:`run` then returns soon."""
        self._aborted = True
        self._remote.close()
        self._ending.shut(socket.SHUT_RDWR)

    # -- towards the guest ---------------------------------------------------------------

    def _copy_up(self) -> None:
        """Send what the local side sends until it ends."""
        read, remote = self._read, self._remote
        buffer = memoryview(bytearray(_FIRST_BUFFER_BYTES))
        while count := read([buffer]):
            remote.sendall(buffer[:count])
            self.bytes_up += count
            # Most connections never send this much at once, so they do not pay for more room.
            if count == len(buffer) < _FULL_BUFFER_BYTES:
                if read.socket is not None:
                    break
                buffer = memoryview(bytearray(_FULL_BUFFER_BYTES))
        while count and (count := remote.send_from(read)):
            self.bytes_up += count

    def _await_down(self) -> None:
        """Wait for the end of the other direction, or for the local side to be gone."""
        if self._socket is None:
            self._down_done.wait()
            return
        while not (self._down_done.is_set() or self._aborted):
            if hangs_up(self._socket, _LOOK_AGAIN_S):
                return

    # -- from the guest: the Sink ----------------------------------------------------------

    def write(self, parts: list[memoryview]) -> int:
        """Write as much as the local socket has room for; never waits."""
        assert self._socket is not None
        try:
            count = self._socket.sendmsg(parts, (), _NOW)
        except BlockingIOError:
            return 0
        except OSError:
            # Not closed here: the thread that calls this holds the stream's lock.
            self._spawn_quietly(self.abort)
            raise
        self.bytes_down += count
        return count

    def stalled(self) -> None:
        """Have a worker write what the local socket had no room for."""
        self._spawn_quietly(self._drain)

    def ended(self, error: TunnelError | None) -> None:
        """Pass the end on to the local side."""
        self._down_done.set()
        self._ending.shut(socket.SHUT_WR if error is None else socket.SHUT_RDWR)

    def hung_up(self) -> None:
        """Wake the thread that reads the local side: nobody wants it any more."""
        self._ending.shut(socket.SHUT_RDWR)

    def _spawn_quietly(self, job: Callable[[], None]) -> None:
        try:
            self._spawn(job)
        except RuntimeError:
            # The relay is being closed, or the system has no more threads: so this ends.
            self._aborted = True
            self.hung_up()

    def _drain(self) -> None:
        with self._draining:
            try:
                self._remote.drain(self._write_waiting)
            except OSError:
                self.abort()

    def _write_waiting(self, parts: list[memoryview]) -> None:
        assert self._socket is not None
        poller = None
        while parts:
            try:
                count = self._socket.sendmsg(parts, (), _NOW)
            except BlockingIOError:
                if poller is None:
                    poller = _poller(self._socket, select.POLLOUT)
                poller.poll()
                continue
            self.bytes_down += count
            parts = rest_of(parts, count)

    # -- from the guest: a thread ------------------------------------------------------------

    def _copy_down(self) -> None:
        """Write what the guest sends to a local stream that cannot be polled."""
        error: TunnelError | None = None
        buffer = memoryview(bytearray(_FIRST_BUFFER_BYTES))
        try:
            while count := self._remote.recv_into(buffer):
                self._local.sendall(buffer[:count])
                self.bytes_down += count
                if count == len(buffer) < _FULL_BUFFER_BYTES:
                    buffer = memoryview(bytearray(_FULL_BUFFER_BYTES))
        except TunnelError as failure:
            error = failure
        except OSError:
            self.abort()
        self.ended(error)


def _poller(stream: LocalStream, events: int) -> select.poll:
    poller = select.poll()
    poller.register(stream.fileno(), events)
    return poller
