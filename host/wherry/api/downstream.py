"""The engine's bytes on their way to the client.

They are written to the client in the thread that decrypted them, as
:mod:`wherry.relay.pump` does it, and followed only after that; by a worker while the
client is slower than the engine, while a watch holds the answer, and always for a client
that cannot be polled (a named pipe).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from wherry.api.answers import Refusal, render
from wherry.api.exchange import Exchange, Outcome
from wherry.api.hooks import ClientGone
from wherry.api.http import MalformedAnswer
from wherry.api.local import LocalEnd
from wherry.core.errors import TunnelError
from wherry.relay.pump import Spawn
from wherry.tunnel.stream import Stream

LOOK_S = 0.1
"""How often a thread that waits for something else looks whether the client is there."""

_logger = logging.getLogger(__name__)


class Over(Exception):
    """The engine's stream has ended, and with it the connection."""


class Downstream:
    """Passes answers on, and knows what has become of the last request.

    It is the stream's sink: ``write``, ``stalled``, ``ended`` and ``hung_up`` are called in
    the tunnel's thread and do not wait. The other methods are for the thread that reads
    the client.

    :param local: the client.
    :param spawn: runs helpers in other threads.
    :param abort: ends the connection at once.
    :param answered: called by a helper when the first answer has ended, or become raw.
    """

    def __init__(
        self,
        local: LocalEnd,
        spawn: Spawn,
        abort: Callable[[], None],
        answered: Callable[[], None] | None = None,
    ) -> None:
        self._answered = answered
        self._local = local
        self._spawn = spawn
        self._abort = abort
        self._remote: Stream | None = None
        # Guards what follows; the condition is notified at each change of it.
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._exchange: Exchange | None = None
        self._settled = Outcome.DONE
        self._preparing = True
        self._over = False
        self._error: TunnelError | None = None
        self._refusal: Refusal | None = None
        self._told = False
        self._hung_up = False
        self._lost = False
        # Held by whoever writes to the client in place of the sink. Draining may find the
        # end and pass it on, hence the kind of lock.
        self.draining = threading.RLock()
        """Held while a worker writes to the client."""
        self.bytes = 0
        """Bytes of the engine's passed on."""
        self.last_active = time.monotonic()
        """When a byte last passed, on the monotonic clock; not of ``/events``."""
        self.failed = False
        """Whether a request found no engine."""

    # -- for the thread that reads the client ----------------------------------------------------

    def attach(self, remote: Stream) -> None:
        """Take the engine's bytes from now on."""
        self._remote = remote
        remote.deliver_to(self)

    def open_failed(self, error: TunnelError) -> None:
        """Learn that there is no stream at all."""
        with self._news:
            self._over, self._error = True, error

    @property
    def over(self) -> bool:
        """Whether the engine's stream has ended."""
        return self._over

    @property
    def settled(self) -> bool:
        """Whether the last request was answered, and no raw stream was made of it."""
        return self._settled is Outcome.DONE

    @property
    def in_flight(self) -> bool:
        """Whether an answer is pending, or a raw stream open; not of ``/events``."""
        exchange = self._exchange
        return exchange is not None and not self.settled and not exchange.passive

    def settle(self, gone: Callable[[], bool]) -> bool:
        """Wait until the last answer has ended; False if the stream has become raw instead.

        :raises Over: the answer will never end.
        :raises ClientGone: the client left meanwhile.
        """
        if self.settled:
            return True  # as a rule; it stays so until the next request
        with self._news:
            while self._settled is Outcome.PENDING:
                if self._told:
                    raise Over
                if not self._news.wait(LOOK_S) and gone():
                    raise ClientGone
            return self.settled

    def require(self) -> None:
        """Do nothing if there is an engine.

        :raises Refusal: there is none.
        """
        if self._over:
            raise self._no_engine()

    def prepare(self) -> None:
        """Keep the client's connection, should the engine's end: a request is there."""
        with self._news:
            self._preparing = True

    def begin(self, exchange: Exchange) -> None:
        """Expect the answer to a request that is sent after this.

        :raises Refusal: there is no engine to send it to.
        """
        with self._lock:
            self.require()
            self._exchange = exchange
            self._settled = Outcome.PENDING
            self._preparing = False

    def break_off(self, refusal: Refusal) -> None:
        """End the request that is pending; its client gets ``refusal`` if it got nothing yet."""
        assert self._remote is not None
        exchange = self._exchange
        self._refusal = refusal
        self._remote.close()  # which tells us of the end
        if exchange is not None and exchange.answered:
            # A worker may be waiting for the client to take more of what breaks off.
            self._local.hang_up()
        self.await_end()

    def await_end(self) -> None:
        """Wait for the end of the answer, or for the client to be gone."""
        if self._local.socket is not None:
            self._local.await_end(lambda: self._told)
            return
        self._spawn_or(self._watch)
        with self._news:
            self._news.wait_for(lambda: self._told)

    def finish(self) -> None:
        """Tell the watches of a pending answer that nobody waits for it any more."""
        exchange = self._exchange
        # The connection holds this object, and its buffers should not wait for the
        # collector of cycles.
        self._abort = _nothing
        if exchange is not None:
            try:
                exchange.finish(complete=False)
            except ClientGone:
                pass

    # -- the Sink -------------------------------------------------------------------------------

    def write(self, parts: list[memoryview]) -> int:
        """Write as much as the client has room for."""
        exchange, settled = self._exchange, self._settled
        if exchange is None or settled is Outcome.DONE:
            self._give_up("bytes that nobody asked for")
            return sum(map(len, parts))
        raw = settled is Outcome.RAW
        if self._local.socket is None or (exchange.watched and not raw):
            return 0  # a worker does it: it may wait, and shows it to the watches first
        if raw:
            self.last_active = time.monotonic()
        try:
            count = self._local.send_some(parts)
        except OSError:
            # Not closed here: the thread that calls this holds the stream's lock.
            if not self._lost:
                self._lost = True
                self._spawn_or(self._abort)
            raise
        self.bytes += count
        if not raw:
            self._track(exchange, parts, count)
        return count

    def stalled(self) -> None:
        """Have a worker write what :meth:`write` did not take."""
        self._spawn_or(self._drain)

    def ended(self, error: TunnelError | None) -> None:
        """Pass the end on to the client, once those who watch it have seen it."""
        with self._news:
            self._over, self._error = True, error
            exchange = None if self.settled else self._exchange
            if exchange is None and self._preparing:
                # The thread that reads the client answers the request it has, or will
                # have if it is the first one.
                self._told = True
                self._news.notify_all()
                return
        if self._local.socket is None or (exchange is not None and exchange.watched):
            self._spawn_or(lambda: self._end(exchange, error))
        else:
            self._end(exchange, error)

    def hung_up(self) -> None:
        """Wake the thread that reads the client: the engine takes no more."""
        with self._news:
            self._hung_up = True
            if not self._told or self._preparing:
                return
        self._local.hang_up()

    # -- following what was passed on --------------------------------------------------------------

    def _track(self, exchange: Exchange, parts: list[memoryview], count: int) -> None:
        """Follow the first ``count`` bytes of ``parts``, which were passed on."""
        try:
            for part in parts:
                if not count:
                    break
                part = part[:count]
                count -= len(part)
                exchange.track(part)
        except MalformedAnswer as error:
            self._give_up(str(error))
            return
        self._note(exchange)

    def _note(self, exchange: Exchange) -> None:
        """Tell the thread that reads the client what has become of its request."""
        if not exchange.passive:
            self.last_active = time.monotonic()
        outcome = exchange.outcome
        if outcome is not Outcome.PENDING:
            with self._news:
                self._settled = outcome
                if outcome is Outcome.DONE:
                    # With all that watched it, while the client thinks.
                    self._exchange = None
                self._preparing = False
                self._news.notify_all()
            if self._answered is not None:
                answered, self._answered = self._answered, None
                self._spawn_or(answered, needed=False)

    def _give_up(self, reason: str) -> None:
        _logger.warning("the engine's answer is not understood: %s", reason)
        self._spawn_or(self._abort)

    def _spawn_or(self, job: Callable[[], None], *, needed: bool = True) -> None:
        """Have a worker do a job; hang up if there is none, since the system has no more."""
        try:
            self._spawn(job)
        except RuntimeError as error:
            if needed:
                _logger.warning("a connection ends, as there is no thread for it: %s", error)
                self._tell()
                self._local.hang_up()

    def _tell(self) -> bool:
        """Say that the end was dealt with; return whether nothing can be sent any more."""
        with self._news:
            self._told = True
            self._news.notify_all()
            return self._hung_up

    # -- the end -------------------------------------------------------------------------------

    def _end(self, exchange: Exchange | None, error: TunnelError | None) -> None:
        with self.draining:
            if exchange is not None:
                complete = error is None and exchange.ends_with_stream
                try:
                    try:
                        rest = exchange.rest() if complete else b""
                    finally:
                        exchange.finish(complete=complete)
                    if rest:
                        self._local.send_all([rest])
                        self.bytes += len(rest)
                except (ClientGone, OSError):
                    pass
                if not exchange.answered:
                    self._refuse(exchange)
            if error is None and self._settled is Outcome.RAW:
                self._local.end_writing()
            else:
                # No request could be answered any more.
                self._local.hang_up()
        if self._tell():
            self._local.hang_up()

    def _refuse(self, exchange: Exchange) -> None:
        answer = render(self._no_engine(), close=True, body=exchange.request.method != "HEAD")
        try:
            self._local.send_some([memoryview(answer)])
        except OSError:
            pass  # the client was faster

    def _no_engine(self) -> Refusal:
        """Say why there is no engine: no way to it (503), or it hung up (502)."""
        if self._refusal is not None:
            return self._refusal
        self.failed = True
        if self._error is not None:
            return Refusal(503, f"wherry: the engine cannot be reached: {self._error.message}")
        return Refusal(502, "wherry: the engine closed the connection without an answer")

    # -- workers -------------------------------------------------------------------------------

    def _drain(self) -> None:
        assert self._remote is not None
        with self.draining:
            try:
                self._remote.drain(self._pass)
            except OSError:
                self._abort()

    def _watch(self) -> None:
        """Notice that a client which cannot be polled has left."""
        self._local.await_gone()
        self._abort()

    def _pass(self, parts: list[memoryview]) -> None:
        """Pass bytes on, waiting for the client and for those who watch.

        :raises OSError: nobody takes them.
        """
        for part in parts:
            exchange = self._exchange
            if exchange is None or self.settled:
                self._give_up("bytes that nobody asked for")
                return
            if exchange.watched and self._settled is not Outcome.RAW:
                self._release(exchange, part)
                continue
            if self._settled is Outcome.RAW:
                self.last_active = time.monotonic()
            self._local.send_all([part])
            self.bytes += len(part)
            if self._settled is not Outcome.RAW:
                self._track(exchange, [part], len(part))

    def _release(self, exchange: Exchange, part: memoryview) -> None:
        try:
            for data in exchange.release(part):
                self._local.send_all([data])
                self.bytes += len(data)
        except Refusal as refusal:
            body = exchange.request.method != "HEAD"
            self._local.send_all([render(refusal, close=True, body=body)])
            raise ConnectionAbortedError from refusal
        except MalformedAnswer as error:
            _logger.warning("the engine's answer is not understood: %s", error)
            raise ConnectionAbortedError from error
        except ClientGone as error:
            raise ConnectionAbortedError from error
        self._note(exchange)


def _nothing() -> None:
    pass
