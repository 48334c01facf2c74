"""A listener whose connections go to a Unix socket in the guest."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from wherry.core.errors import TunnelError
from wherry.platform.base import LocalListener, LocalStream
from wherry.relay.pump import Pump
from wherry.relay.workers import Workers
from wherry.tunnel.stream import Stream

CONNECTION_LIMIT = 512
_CLOSE_TIMEOUT_S = 5.0
_PAUSE_S = 0.05
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR}
)
"""Errors of accept(2) after which the listener is still good."""

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


class Relay:
    """Accepts connections and relays each to a stream of its own.

    :param listener: owned from now on: :meth:`close` closes it.
    :param open_stream: makes the guest's side of a connection; may wait, in a thread
        of that connection; raises TunnelError when there is none.
    :param try_open: the same, in the accepting thread, which saves a change of threads;
        must not wait, and may return None: then ``open_stream`` is called.
    :param limit: connections at once; more are closed at once.
    :param on_limit: called, in the accepting thread, for each of those.
    """

    def __init__(
        self,
        listener: LocalListener,
        open_stream: Callable[[], Stream],
        *,
        try_open: Callable[[], Stream | None] = lambda: None,
        limit: int = CONNECTION_LIMIT,
        on_limit: Callable[[], None] = lambda: None,
        name: str = "relay",
    ) -> None:
        self._listener = listener
        self._open_stream = open_stream
        self._try_open = try_open
        self._limit = limit
        self._on_limit = on_limit
        self._workers = Workers(name)
        self._lock = threading.Lock()
        self._pumps: set[Pump] = set()
        self._active = 0
        self._connections = self._refused = self._failed = 0
        self._bytes_up = self._bytes_down = 0
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

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
        """Stop listening, end every connection and thread; safe to call twice."""
        with self._lock:
            self._closing = True
            pumps = list(self._pumps)
        self._listener.close()
        for pump in pumps:
            pump.abort()
        if self._thread.ident is not None:
            self._thread.join()
        if not self._workers.close(_CLOSE_TIMEOUT_S):
            _logger.warning("a connection did not end within %g s", _CLOSE_TIMEOUT_S)

    def _accept(self) -> None:
        """Accept until the listener is closed; the body of the relay's own thread."""
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
                continue
            remote = self._try_open()
            try:
                self._workers.spawn(partial(self._serve, local, remote))
            except RuntimeError as error:
                _logger.error("no thread for a connection: %s", error)
                local.close()
                if remote is not None:
                    remote.close()
                with self._lock:
                    self._active -= 1

    def _serve(self, local: LocalStream, remote: Stream | None) -> None:
        """Relay one connection; the body of a worker's job."""
        pump: Pump | None = None
        try:
            try:
                remote = remote or self._open_stream()
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
