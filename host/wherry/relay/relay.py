"""Connections that are relayed, each to a stream of its own; whoever listens hands them over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from wherry.core.errors import TunnelError
from wherry.platform.base import LocalStream
from wherry.relay.pump import Pump
from wherry.relay.workers import Workers
from wherry.tunnel.stream import Stream

CONNECTION_LIMIT = 512
_CLOSE_TIMEOUT_S = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counters:
    """What a relay has done; bytes count what was passed on.

    :param refused: connections closed because there were too many.
    :param failed: connections closed because the guest's side did not open.
    """

    active: int
    connections: int
    refused: int
    failed: int
    bytes_up: int
    bytes_down: int


class Relays:
    """Relays connections, each to a stream of its own.

    :param workers: for the second thread of a connection; closed with this.
    :param limit: connections at once; more are closed at once.
    :param on_limit: called for each of those.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        limit: int = CONNECTION_LIMIT,
        on_limit: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit = limit
        self._on_limit = on_limit
        self._workers = workers
        self._lock = threading.Lock()
        self._pumps: set[Pump] = set()
        self._active = 0
        self._connections = self._refused = self._failed = 0
        self._bytes_up = self._bytes_down = 0
        self._closing = False

    @property
    def counters(self) -> Counters:
        """What was done so far, running connections included."""
        with self._lock:
            return Counters(
                active=self._active,
                connections=self._connections,
                refused=self._refused,
                failed=self._failed,
                bytes_up=self._bytes_up + sum(pump.bytes_up for pump in self._pumps),
                bytes_down=self._bytes_down + sum(pump.bytes_down for pump in self._pumps),
            )

    def close(self) -> None:
        """End every connection and thread; safe to call twice."""
        with self._lock:
            self._closing = True
            pumps = list(self._pumps)
        for pump in pumps:
            pump.abort()
        if not self._workers.close(_CLOSE_TIMEOUT_S):
            _logger.warning("a connection did not end within %g s", _CLOSE_TIMEOUT_S)

    def serve(self, local: LocalStream, open_stream: Callable[[], Stream]) -> None:
        """Relay one connection until it has ended, unless there are too many.

        :param local: owned from now on.
        :param open_stream: makes the other side of it; may wait; raises TunnelError when there
            is none.
        """
        with self._lock:
            full = self._active >= self._limit
            if full:
                self._refused += 1
            else:
                self._active += 1
                self._connections += 1
        if full:
            self._on_limit()
            local.close()
            return
        pump: Pump | None = None
        try:
            try:
                remote = open_stream()
            except TunnelError as error:
                _logger.info("a connection was not relayed: %s", error)
                local.close()
                with self._lock:
                    self._failed += 1
                return
            pump = Pump(local, remote, self._workers.spawn)
            with self._lock:
                self._pumps.add(pump)
                closing = self._closing
            if closing:
                pump.abort()
            pump.run()
        finally:
            with self._lock:
                self._active -= 1
                if pump is not None:
                    self._pumps.discard(pump)
                    self._bytes_up += pump.bytes_up
                    self._bytes_down += pump.bytes_down
