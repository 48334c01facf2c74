"""TCP on IPv6, relayed by us: to QEMU's listener for IPv4, or through the tunnel.

One thread accepts for all ports, so that a port that nobody uses costs a descriptor.
"""

from __future__ import annotations

import logging
import queue
import selectors
import socket
import threading
from collections.abc import Callable
from functools import partial

from wherry.core.errors import TunnelError
from wherry.core.sockets import SharedSocket
from wherry.ports.conflicts import open_socket
from wherry.ports.desired import Forward
from wherry.relay.relay import Relays
from wherry.relay.workers import Workers
from wherry.tunnel.stream import CopyingSender, DrainWrite, Sink, Stream

CONNECTION_LIMIT = 1024
"""Connections at once, of all ports; more are closed. Each takes two threads."""

_CONNECT_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 5.0
_PAUSE_S = 0.05

_logger = logging.getLogger(__name__)

OpenStream = Callable[[], Stream]


class StreamRelays:
    """Listens on ports and relays each connection; every method is thread-safe."""

    def __init__(self) -> None:
        self._workers = Workers("port")
        self._relays = Relays(self._workers, limit=CONNECTION_LIMIT)
        self._lock = threading.Lock()
        self._listeners: dict[Forward, socket.socket] = {}
        self._closing = False
        self._begin()

    def _begin(self) -> None:
        """Have a thread that accepts; what an earlier one accepted goes on."""
        self._selector = selectors.DefaultSelector()
        self._wake, self._alarm = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._accepting = True
        self._thread = threading.Thread(target=self._run, name="ports-accept", daemon=True)
        self._thread.start()

    def forwards(self) -> set[Forward]:
        """Return what it listens for; after an error of ours nothing, until the next ``add``."""
        with self._lock:
            return set(self._listeners)

    def add(self, forward: Forward, open_stream: OpenStream, *, pushes: bool) -> None:
        """Listen, and relay each connection to a stream of its own.

        :param open_stream: makes it, in a thread of the connection.
        :param pushes: whether the stream is one of the tunnel's.
        :raises OSError: the port cannot be bound.
        """
        listener = open_socket(forward)
        listener.setblocking(False)
        with self._lock:
            if not self._accepting and not self._closing:
                self._begin()
            self._listeners[forward] = listener
        self._do(
            partial(self._selector.register, listener, selectors.EVENT_READ, (open_stream, pushes))
        )

    def remove(self, forward: Forward) -> None:
        """Listen no more; connections go on until one side ends them."""
        with self._lock:
            listener = self._listeners.pop(forward, None)
        if listener is None:
            return
        closed = threading.Event()

        def close() -> None:
            self._selector.unregister(listener)
            listener.close()
            closed.set()

        self._do(close)
        closed.wait(_CLOSE_TIMEOUT_S)

    def close(self) -> None:
        """End everything; safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._do(lambda: None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._relays.close()

    def _do(self, job: Callable[[], object]) -> None:
        """Have the accepting thread do something, since it alone uses the selector."""
        self._jobs.put(job)
        try:
            self._alarm.send(b"x")
        except OSError:
            pass  # the thread has ended

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select():
                    if key.fileobj is self._wake:
                        self._wake.recv(4096)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._accept(key.fileobj, *key.data)
                while not self._jobs.empty():
                    self._jobs.get()()
        except Exception:
            _logger.exception("the relay of ports failed")
        finally:
            with self._lock:
                self._accepting = False
                listeners = list(self._listeners.values())
                self._listeners.clear()
                selector, ends = self._selector, (self._wake, self._alarm)
            selector.close()
            for each in (*listeners, *ends):
                each.close()

    def _accept(self, listener: socket.socket, open_stream: OpenStream, pushes: bool) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _logger.warning("a connection could not be accepted: %s", error)
            # Out of descriptors, as a rule: one of the connections will end.
            threading.Event().wait(_PAUSE_S)
            return
        try:
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # What is no plain socket the relay reads and writes in two threads.
            local = connection if pushes else SharedSocket(connection)
            self._workers.spawn(partial(self._relays.serve, local, open_stream))
        except (OSError, RuntimeError) as error:
            _logger.warning("a connection could not be relayed: %s", error)
            connection.close()


def to_local(port: int) -> OpenStream:
    """Return what connects to a port of this computer's IPv4 loopback."""
    return lambda: _Connected(("127.0.0.1", port))


class _Connected(CopyingSender):
    """A connection on this computer, as far as a relay in two threads needs a ``Stream``."""

    def __init__(self, address: tuple[str, int]) -> None:
        try:
            sock = socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S)
        except OSError as error:
            raise TunnelError(f"{address[0]}:{address[1]} does not answer: {error}") from error
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = SharedSocket(sock)

    def recv(self, size: int) -> bytes:
        try:
            return self._sock.recv(size)
        except OSError as error:
            raise TunnelError(str(error)) from error

    def recv_into(self, buffer: memoryview) -> int:
        try:
            return self._sock.recv_into(buffer)
        except OSError as error:
            raise TunnelError(str(error)) from error

    def sendall(self, data: memoryview | bytes, waiting: Callable[[], None] | None = None) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise TunnelError(str(error)) from error

    def shutdown_write(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other side was faster

    def close(self) -> None:
        self._sock.close()

    def deliver_to(self, sink: Sink) -> None:
        raise NotImplementedError("only streams of the tunnel push")

    def drain(self, sink_write: DrainWrite) -> None:
        raise NotImplementedError("only streams of the tunnel push")
