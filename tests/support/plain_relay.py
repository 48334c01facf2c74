"""A listener in front of :class:`wherry.relay.relay.Relays`: bytes in, bytes out, nothing known."""

from __future__ import annotations

from collections.abc import Callable

from wherry.platform.base import LocalListener, LocalStream
from wherry.relay.acceptors import Acceptors
from wherry.relay.relay import CONNECTION_LIMIT, Counters, Relays
from wherry.relay.workers import Workers
from wherry.tunnel.stream import Stream


class Relay:
    """Accepts connections and relays each; parameters as those of an endpoint."""

    def __init__(
        self,
        listener: LocalListener,
        open_stream: Callable[[], Stream],
        *,
        prepare: Callable[[], None] = lambda: None,
        limit: int = CONNECTION_LIMIT,
        on_limit: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_stream = open_stream
        self._prepare = prepare
        workers = Workers("relay")
        self._relays = Relays(workers, limit=limit, on_limit=on_limit)
        self._acceptors = Acceptors(listener, workers, self._serve)
        self.start = self._acceptors.start

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._relays.counters

    def close(self) -> None:
        """Stop listening, end everything; safe to call twice."""
        self._acceptors.close()
        self._relays.close()

    def _serve(self, local: LocalStream) -> None:
        self._relays.serve(local, self._open_stream)
        self._prepare()
