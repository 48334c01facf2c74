"""The endpoint: where Docker's clients connect."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from wherry.api.answers import Refusal, render
from wherry.api.connection import Connection
from wherry.api.hooks import Hooks
from wherry.api.local import LocalEnd
from wherry.platform.base import LocalListener, LocalStream
from wherry.relay.workers import Workers
from wherry.tunnel.stream import Stream

CONNECTION_LIMIT = 512
"""Connections at once; more are answered with 503. Each takes a thread and a descriptor, of
which a program has 1024 on Linux and 256 on macOS unless it asks for more."""

_REFUSERS = 32
_CLOSE_TIMEOUT_S = 5.0
_PAUSE_S = 0.05
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR}
)
"""Errors of accept(2) after which the listener is still good."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counters:
    """What an endpoint has done; bytes count what was passed on.

    :param active: open connections.
    :param in_flight: of these, the ones that wait for an answer or are raw streams (attach,
        exec, a build's session); open ``/events`` do not count.
    :param requests: that were understood.
    :param refused: connections answered with 503 because there were too many.
    :param failed: connections to which the engine gave no answer.
    """

    active: int
    in_flight: int
    connections: int
    requests: int
    refused: int
    failed: int
    bytes_up: int
    bytes_down: int


class Endpoint:
    """Accepts clients and serves each over an engine's stream of its own.

    :param listener: owned from now on: :meth:`close` closes it.
    :param open_stream: makes the engine's side of a connection, at its start; may wait, in
        a thread of that connection, and is where a sleeping machine is woken; raises
        TunnelError when there is no engine.
    :param try_open: the same, in the accepting thread, which saves a change of threads;
        must not wait, and may return None: then ``open_stream`` is called.
    :param hooks: what other features do with requests.
    :param limit: connections at once; more get 503.
    """

    def __init__(
        self,
        listener: LocalListener,
        open_stream: Callable[[], Stream],
        *,
        try_open: Callable[[], Stream | None] = lambda: None,
        hooks: Hooks | None = None,
        limit: int = CONNECTION_LIMIT,
        name: str = "endpoint",
    ) -> None:
        self.hooks = hooks if hooks is not None else Hooks()
        self._listener = listener
        self._open_stream = open_stream
        self._try_open = try_open
        self._limit = limit
        self._workers = Workers(name)
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._refusing: set[LocalEnd] = set()
        self._last_active = time.monotonic()
        self._ended = Counters(0, 0, 0, 0, 0, 0, 0, 0)
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    @property
    def counters(self) -> Counters:
        """What was done so far, open connections included."""
        with self._lock:
            ended, open_ = self._ended, list(self._connections)
        return Counters(
            active=len(open_),
            in_flight=sum(each.in_flight for each in open_),
            connections=ended.connections + len(open_),
            requests=ended.requests + sum(each.requests for each in open_),
            refused=ended.refused,
            failed=ended.failed + sum(each.failed for each in open_),
            bytes_up=ended.bytes_up + sum(each.bytes_up for each in open_),
            bytes_down=ended.bytes_down + sum(each.bytes_down for each in open_),
        )

    @property
    def idle_s(self) -> float:
        """Seconds since the last request or byte; what ``/events`` tells is neither."""
        with self._lock:
            last = max([self._last_active, *(each.last_active for each in self._connections)])
        return max(0.0, time.monotonic() - last)

    def close(self) -> None:
        """Stop listening, end every connection and thread; safe to call twice."""
        with self._lock:
            self._closing = True
            connections, refusing = list(self._connections), list(self._refusing)
        self._listener.close()
        for connection in connections:
            connection.abort()
        for end in refusing:
            end.hang_up()
        if self._thread.ident is not None:
            self._thread.join()
        if not self._close_workers():
            _logger.warning("a connection did not end within %g s", _CLOSE_TIMEOUT_S)

    def _close_workers(self) -> bool:
        while True:
            try:
                return self._workers.close(_CLOSE_TIMEOUT_S)
            except RuntimeError:
                # A connection is just starting its last thread, which cannot be joined
                # before that.
                threading.Event().wait(_PAUSE_S)

    def _accept(self) -> None:
        """Accept until the listener is closed; the body of the endpoint's own thread."""
        while not self._closing:
            try:
                local = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                if error.errno not in _PASSING:
                    _logger.error("the listener failed: %s", error)
                    return
                # Out of descriptors, as a rule: one of the connections will end.
                threading.Event().wait(_PAUSE_S)
                continue
            try:
                self._admit(local)
            except RuntimeError as error:
                _logger.error("no thread for a connection: %s", error)
                local.close()

    def _admit(self, local: LocalStream) -> None:
        """Have a worker serve the client, or tell it that there are too many."""
        if len(self._connections) >= self._limit:
            self._refuse(LocalEnd(local))
            return
        remote = self._try_open()
        connection = Connection(
            local,
            self._open_stream if remote is None else lambda: remote,
            self.hooks,
            self._workers.spawn,
        )
        with self._lock:
            self._connections.add(connection)
        try:
            self._workers.spawn(lambda: self._serve(connection))
        except RuntimeError:
            if remote is not None:
                remote.close()
            with self._lock:
                self._connections.discard(connection)
            raise

    def _serve(self, connection: Connection) -> None:
        """Serve one client; the body of a worker's job."""
        try:
            if self._closing:
                connection.abort()
            connection.run()
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._last_active = max(self._last_active, connection.last_active)
                ended = self._ended
                self._ended = Counters(
                    active=0,
                    in_flight=0,
                    connections=ended.connections + 1,
                    requests=ended.requests + connection.requests,
                    refused=ended.refused,
                    failed=ended.failed + connection.failed,
                    bytes_up=ended.bytes_up + connection.bytes_up,
                    bytes_down=ended.bytes_down + connection.bytes_down,
                )

    def _refuse(self, end: LocalEnd) -> None:
        """Answer 503 in a worker, or hang up when too many are being refused already."""
        with self._lock:
            self._ended = replace(self._ended, refused=self._ended.refused + 1)
            crowded = len(self._refusing) >= _REFUSERS
            if not crowded:
                self._refusing.add(end)
        if crowded:
            end.close()
            return

        def answer() -> None:
            message = f"wherry: there are already {self._limit} connections to the engine"
            try:
                end.send_all([render(Refusal(503, message), close=True)])
                end.linger()
            except OSError:
                pass  # the client did not wait for it
            finally:
                with self._lock:
                    self._refusing.discard(end)
                end.close()

        self._workers.spawn(answer)
