"""The endpoint: where Docker's clients connect."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from wherry.api.answers import Refusal, render
from wherry.api.connection import Connection
from wherry.api.heads import HEAD_TIMEOUT_S, HeadRoom
from wherry.api.hooks import Hooks
from wherry.api.local import LocalEnd
from wherry.api.refusals import Refusals
from wherry.platform.base import AcceptedStream, LocalListener
from wherry.relay.acceptors import Acceptors
from wherry.relay.workers import Workers
from wherry.tunnel.stream import Stream

CONNECTION_LIMIT = 512
"""Connections at once; more are answered with 503. Each takes a thread and a descriptor, of
which a program has 1024 on Linux and 256 on macOS unless it asks for more; clients that are being
refused take descriptors too (:data:`refusals.MOST`)."""

_CLOSE_TIMEOUT_S = 5.0

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
    :param prepare: called when a connection has got its first answer, since many clients
        open another one then; must not wait.
    :param hooks: what other features do with requests.
    :param limit: connections at once; more get 503.
    :param head_timeout_s: seconds that a request's head may take; then its client is hung up on.
    """

    def __init__(
        self,
        listener: LocalListener,
        open_stream: Callable[[], Stream],
        *,
        prepare: Callable[[], None] = lambda: None,
        hooks: Hooks | None = None,
        limit: int = CONNECTION_LIMIT,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        name: str = "endpoint",
    ) -> None:
        self.hooks = hooks if hooks is not None else Hooks()
        self._open_stream = open_stream
        self._prepare = prepare
        self._limit = limit
        self._head_timeout_s = head_timeout_s
        self._room = HeadRoom()
        self._workers = Workers(name)
        self._acceptors = Acceptors(listener, self._workers, self._serve, admit=self._admit)
        message = f"wherry: there are already {limit} connections to the engine"
        self._refusals = Refusals(render(Refusal(503, message), close=True), self._workers.spawn)
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._last_active = time.monotonic()
        self._ended = Counters(0, 0, 0, 0, 0, 0, 0, 0)
        self._closing = False

    def start(self) -> None:
        """Begin to accept."""
        self._acceptors.start()

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
            connections = list(self._connections)
        self._acceptors.close()
        for connection in connections:
            connection.abort()
        self._refusals.close()
        if not self._workers.close(_CLOSE_TIMEOUT_S):
            _logger.warning("a connection did not end within %g s", _CLOSE_TIMEOUT_S)

    def _admit(self, local: AcceptedStream) -> bool:
        if len(self._connections) < self._limit:
            return True
        self._refuse(local)
        return False

    def _refuse(self, local: AcceptedStream) -> None:
        with self._lock:
            self._ended = replace(self._ended, refused=self._ended.refused + 1)
        self._refusals.add(LocalEnd(local))

    def _serve(self, local: AcceptedStream) -> None:
        """Serve one client, or tell it that there are too many."""
        connection = Connection(
            local,
            self._open_stream,
            self.hooks,
            self._workers.spawn,
            prepare=self._prepare,
            room=self._room,
            head_timeout_s=self._head_timeout_s,
        )
        with self._lock:
            full = len(self._connections) >= self._limit
            if not full:
                self._connections.add(connection)
        if full:
            # Another one was admitted at the same time.
            self._refuse(local)
            return
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
