"""The connection to the guest that is there, or comes back."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from wherry.core.errors import TunnelError
from wherry.tunnel.connection import OPEN_TIMEOUT_S, Completed, Connection, Process, Watcher
from wherry.tunnel.stream import Stream

Connect = Callable[[Watcher], Connection]
"""Makes a connection, or raises TunnelError; passes its argument on as ``watcher``.

It is called for each attempt, so it looks up the address each time.
"""

_FIRST_DELAY_S = 0.1
_JOIN_S = 10.0
"""The thread ends with the connection, or with the attempt at one, that is closed before."""


class State(enum.Enum):
    """What a tunnel is doing."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    LOST = "lost"
    CLOSED = "closed"


@dataclass(frozen=True)
class Counters:
    """What a tunnel has done since it was made."""

    connections: int = 0
    failures: int = 0
    opened: int = 0


class Tunnel:
    """Keeps one connection to the guest; every method may be called from any thread.

    :param connect: makes a connection; called in the tunnel's own thread.
    :param changed: called in that thread with each new state, and the error for LOST
        (a connection ended, or an attempt failed). It must not block.
    :param outage_timeout_s: how long opening a stream waits for a connection.
    :param longest_delay_s: attempts follow each other ever slower, up to this.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        changed: Callable[[State, TunnelError | None], None] = lambda state, error: None,
        outage_timeout_s: float = OPEN_TIMEOUT_S,
        longest_delay_s: float = 2.0,
    ) -> None:
        self._connect = connect
        self._changed = changed
        self._outage_timeout_s = outage_timeout_s
        self._longest_delay_s = longest_delay_s
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._attempt: Connection | None = None
        self._connection: Connection | None = None
        self._error: TunnelError | None = None
        self._closing = False
        self._counters = Counters()
        self._thread = threading.Thread(target=self._keep, name="tunnel-keeper", daemon=True)

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._thread.start()

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._counters

    @property
    def error(self) -> TunnelError | None:
        """Why there is no connection; None while there is one, or before the first attempt."""
        return self._error

    def wait(self, timeout_s: float) -> Connection:
        """Wait for a connection and return it.

        :raises TunnelError: there was none within ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while True:
                if self._closing:
                    raise TunnelError("the connection to the guest is closed")
                connection = self._connection
                if connection is not None and not connection.closed:
                    return connection
                left = deadline - time.monotonic()
                if left <= 0:
                    cause = self._error
                    reason = f": {cause.message}" if cause is not None else ""
                    hint = cause.hint if cause is not None else ""
                    raise TunnelError(
                        f"there is no connection to the guest{reason}", hint=hint
                    ) from cause
                # A connection may be closed before its end was told: then look again soon.
                self._news.wait(left if connection is None else min(left, 0.05))

    def begin_unix(self, path: str, *, timeout_s: float = OPEN_TIMEOUT_S) -> Stream:
        """See :meth:`Connection.begin_unix`; waits for a connection during an outage."""
        return self._count(self.wait(self._outage_timeout_s).begin_unix(path, timeout_s=timeout_s))

    def prepare_unix(self, path: str) -> None:
        """Open a stream ahead for whoever asks for one next; never waits, may do nothing.

        It saves them a round trip to the guest. It is closed if nobody comes for half a
        minute, or with the connection.
        """
        connection = self._connection
        if connection is not None:
            connection.prepare_unix(path)

    def begin_tcp(self, address: str, port: int, *, timeout_s: float = OPEN_TIMEOUT_S) -> Stream:
        """See :meth:`Connection.begin_tcp`; waits for a connection during an outage."""
        connection = self.wait(self._outage_timeout_s)
        return self._count(connection.begin_tcp(address, port, timeout_s=timeout_s))

    def open_unix(self, path: str, *, timeout_s: float = OPEN_TIMEOUT_S) -> Stream:
        """See :meth:`Connection.open_unix`; waits for a connection during an outage."""
        return self._count(self.wait(self._outage_timeout_s).open_unix(path, timeout_s=timeout_s))

    def exec(self, command: str, *, timeout_s: float = OPEN_TIMEOUT_S) -> Process:
        """See :meth:`Connection.exec`; waits for a connection during an outage."""
        return self.wait(self._outage_timeout_s).exec(command, timeout_s=timeout_s)

    def run(self, command: str, input: bytes = b"", *, timeout_s: float) -> Completed:
        """See :meth:`Connection.run`; waits for a connection during an outage."""
        return self.wait(self._outage_timeout_s).run(command, input, timeout_s=timeout_s)

    def reconnect(self) -> None:
        """Give the present connection up and make another, at once."""
        with self._lock:
            connection = self._connection
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """End the connection, all its streams and the tunnel's threads; safe to call twice."""
        with self._lock:
            self._closing = True
            connections = (self._attempt, self._connection)
            self._news.notify_all()
        for connection in connections:
            if connection is not None:
                connection.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def _count(self, stream: Stream) -> Stream:
        with self._lock:
            old = self._counters
            self._counters = Counters(old.connections, old.failures, old.opened + 1)
        return stream

    def _keep(self) -> None:
        """Connect, wait for the end, connect again; the body of the tunnel's thread."""
        delay = _FIRST_DELAY_S
        while not self._closing:
            self._changed(State.CONNECTING, None)
            attempt = _Attempt(self)
            try:
                connection = self._connect(attempt)
            except TunnelError as error:
                if self._closing:
                    break
                self._lost(error, failures=1)
                self._pause(delay)
                delay = min(delay * 2, self._longest_delay_s)
                continue
            delay = _FIRST_DELAY_S
            if not self._adopt(connection):
                connection.close()
                break
            attempt.over.wait()
            connection.close()
            if not self._closing:
                self._lost(attempt.error, failures=0)
        self._changed(State.CLOSED, None)

    def _started(self, connection: Connection) -> None:
        with self._lock:
            self._attempt = connection
            closing = self._closing
        if closing:
            connection.close()

    def _adopt(self, connection: Connection) -> bool:
        with self._lock:
            if self._closing:
                return False
            self._attempt = None
            self._connection = connection
            self._error = None
            old = self._counters
            self._counters = Counters(old.connections + 1, old.failures, old.opened)
            self._news.notify_all()
        self._changed(State.CONNECTED, None)
        return True

    def _lost(self, error: TunnelError | None, *, failures: int) -> None:
        with self._lock:
            self._attempt = self._connection = None
            self._error = error
            old = self._counters
            self._counters = Counters(old.connections, old.failures + failures, old.opened)
            self._news.notify_all()
        self._changed(State.LOST, error)

    def _pause(self, seconds: float) -> None:
        with self._lock:
            self._news.wait_for(lambda: self._closing, seconds)


class _Attempt:
    """One connection of a tunnel, from its first packet to its end."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self.over = threading.Event()
        self.error: TunnelError | None = None

    def started(self, connection: Connection) -> None:
        self._tunnel._started(connection)

    def ended(self, error: TunnelError) -> None:
        self.error = error
        self.over.set()
