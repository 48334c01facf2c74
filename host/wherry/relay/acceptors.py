"""Threads that wait for connections, of which the one that gets a connection serves it."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable

from wherry.platform.base import AcceptedStream, LocalListener
from wherry.relay.workers import Workers

_WAITING = 2
"""Threads that wait at once: one more than must, so that the next connection's is there
while one is served, and connections in a row wake no other thread."""

_PAUSE_S = 0.05
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR}
)
"""Errors of accept(2) after which the listener is still good."""

_logger = logging.getLogger(__name__)


class Acceptors:
    """Accepts connections until it is closed.

    A thread that accepted a connection serves it itself: to hand it to another one costs
    more than all else that is done for a short connection.

    :param listener: owned from now on: :meth:`close` closes it.
    :param workers: whose threads are used; closed by their owner, after this.
    :param serve: serves one connection to its end, and closes it.
    :param admit: called before another thread is had for the waiting; may keep a connection for
        itself and return False, and must not wait. However many come for that, they take no
        threads, and none waits to be accepted.
    """

    def __init__(
        self,
        listener: LocalListener,
        workers: Workers,
        serve: Callable[[AcceptedStream], None],
        *,
        admit: Callable[[AcceptedStream], bool] = lambda local: True,
    ) -> None:
        self._listener = listener
        self._workers = workers
        self._serve = serve
        self._admit = admit
        self._lock = threading.Lock()
        self._waiting = 0
        self._closing = threading.Event()

    def start(self) -> None:
        """Begin to accept.

        :raises RuntimeError: the system has no more threads.
        """
        self._waiting = 1
        self._workers.spawn(self._run)

    def close(self) -> None:
        """Stop listening; safe to call twice. The threads end with their connections."""
        self._closing.set()
        self._listener.close()

    def _run(self) -> None:
        """Accept and serve, as long as threads are needed that wait; the body of each."""
        while (local := self._accept()) is not None:
            try:
                if not self._admit(local):
                    continue
            except OSError:
                local.close()  # its client has left
                continue
            if not self._replace():
                local.close()
                continue
            self._serve(local)
            with self._lock:
                if self._waiting >= _WAITING:
                    return
                self._waiting += 1

    def _replace(self) -> bool:
        """Leave the waiting to another thread; False when there is none and can be none."""
        with self._lock:
            if self._waiting > 1:
                self._waiting -= 1
                return True
        try:
            self._workers.spawn(self._run)
        except RuntimeError as error:
            if not self._closing.is_set():
                _logger.error("no thread for a connection: %s", error)
            return False
        return True

    def _accept(self) -> AcceptedStream | None:
        """Wait for a connection; None when no more come."""
        while not self._closing.is_set():
            try:
                return self._listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    break
                if error.errno not in _PASSING:
                    _logger.error("the listener failed: %s", error)
                    break
                # Out of descriptors, as a rule: one of the connections will end.
                self._closing.wait(_PAUSE_S)
        return None
