"""One client of the endpoint, and the engine's stream that belongs to it.

A thread reads the client and sends to the engine. The engine's bytes are written to the
client in the thread that decrypted them, as :mod:`wherry.relay.pump` does it, and followed
only after that; by a worker while the client is slower than the engine, or while a watch
holds the answer.

Requests are sent one after the other: what a client sends ahead (pipelining, RFC 9112
§9.3.2) waits until the answer before it has ended, since only then is it known to be a
request, and not the input of a program that was attached to. An end of the client's
stream is passed on as it is. The engine takes it as any server of Go's ``net/http`` does:
a pending request is cancelled, a raw stream reads its end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from wherry.api.answers import CONTINUE, Refusal, render
from wherry.api.exchange import Exchange, Outcome
from wherry.api.hooks import ClientGone, Hooks, Match, Request, Watch
from wherry.api.http import MalformedAnswer, MalformedRequest, RequestHead
from wherry.api.local import LocalEnd
from wherry.api.messages import Piece, RequestReader
from wherry.core.errors import TunnelError
from wherry.platform.base import LocalStream
from wherry.relay.pump import Spawn
from wherry.tunnel.stream import Stream

_FIRST_BUFFER_BYTES = 16 * 1024
_FULL_BUFFER_BYTES = 128 * 1024
_JOINED_BYTES = 16 * 1024
"""A head and the beginning of its body go in one packet up to this."""

_LOOK_S = 0.1
"""How often a thread that waits for something else looks whether the client is there."""

_logger = logging.getLogger(__name__)


class _Over(Exception):
    """The engine's stream has ended, and with it the connection."""


class Connection:
    """Serves one client.

    :param local: the client; a socket is made non-blocking.
    :param open_stream: makes the engine's side; called once, at the start, so that it
        opens while the client's first request is on its way.
    :param hooks: the endpoint's.
    :param spawn: runs helpers in other threads.
    """

    def __init__(
        self,
        local: LocalStream,
        open_stream: Callable[[], Stream],
        hooks: Hooks,
        spawn: Spawn,
    ) -> None:
        self._local = LocalEnd(local)
        self._open_stream = open_stream
        self._hooks = hooks
        self._spawn = spawn
        self._remote: Stream | None = None
        self._reader = RequestReader()
        self._method = ""
        self._buffer = memoryview(bytearray(_FIRST_BUFFER_BYTES))
        # Guards what follows; notified at each change of it.
        self._news = threading.Condition()
        self._exchange: Exchange | None = None
        self._refusal: Refusal | None = None
        self._settled = Outcome.DONE
        self._preparing = True
        self._over = False
        self._error: TunnelError | None = None
        self._down_done = False
        self._hung_up = False
        # Held by whoever writes to the client in place of the sink. Draining may find the
        # end and pass it on, hence the kind of lock.
        self._draining = threading.RLock()
        self._gone = threading.Event()
        self.requests = 0
        """Requests that were understood."""
        self.bytes_up = 0
        """Bytes sent to the engine."""
        self.bytes_down = 0
        """Bytes of the engine's passed to the client."""
        self.last_active = time.monotonic()
        """When a request or a byte last passed, on the monotonic clock; not of ``/events``."""
        self.failed = False
        """Whether there was no engine to talk to."""

    @property
    def in_flight(self) -> bool:
        """Whether an answer is pending, or a raw stream open; not of ``/events``."""
        exchange = self._exchange
        return exchange is not None and self._settled is not Outcome.DONE and not exchange.passive

    def run(self) -> None:
        """Serve until either side has ended; close both."""
        try:
            self._open()
            self._serve()
        except (OSError, ClientGone, _Over):
            pass  # the client or the engine is gone; there is nobody to tell
        except TunnelError:
            # The engine takes no more; what it sent is still delivered.
            self._await_down()
        except Refusal as refusal:
            self._answer_and_end(refusal)
        finally:
            self.abort()
            with self._draining:
                self._local.close()
            if self._exchange is not None:
                self._finish_quietly(self._exchange)

    def abort(self) -> None:
        """End both directions at once; from any thread; :meth:`run` then returns soon."""
        self._gone.set()
        with self._news:
            self._over = True
            remote = self._remote
            self._news.notify_all()
        if remote is not None:
            remote.close()
        self._local.hang_up()

    # -- from the client: requests -------------------------------------------------------------

    def _open(self) -> None:
        try:
            remote = self._open_stream()
        except TunnelError as error:
            with self._news:
                self._over, self._error = True, error
            return
        with self._news:
            self._remote = remote
        if self._gone.is_set():
            remote.close()
        if self._local.socket is not None:
            remote.deliver_to(self)
        else:
            self._spawn(self._copy_down)

    def _serve(self) -> None:
        """Read requests and send them on, until the client's stream ends or becomes raw."""
        reader = self._reader
        while True:
            if reader.has_data and not reader.begun and not self._settle():
                self._copy_up(reader.rest())
                break
            item = self._next()
            if isinstance(item, RequestHead):
                self._begin(item)
            elif item is not None:
                self._send(item.data)
            elif not self._receive():
                break
        if self._settled is not Outcome.DONE and self._remote is not None:
            self._remote.shutdown_write()
            self._await_down()

    def _next(self) -> RequestHead | Piece | None:
        try:
            return self._reader.next()
        except MalformedRequest as error:
            raise Refusal(400, f"wherry: bad request: {error}") from error

    def _receive(self) -> bool:
        """Wait for bytes of the client and hand them to the reader; False at their end."""
        data = self._read()
        self._reader.receive(data)
        return bool(data)

    def _read(self) -> memoryview:
        """Wait for bytes of the client; none at their end. They are good until the next call."""
        buffer = self._buffer
        count = self._local.receive_into(buffer)
        if count == len(buffer) < _FULL_BUFFER_BYTES:
            # Most connections never send this much, so they do not pay for it.
            self._buffer = memoryview(bytearray(_FULL_BUFFER_BYTES))
        return buffer[:count]

    def _settle(self) -> bool:
        """Wait until the last answer has ended; False if the stream has become raw instead.

        :raises _Over: the answer will never end.
        :raises ClientGone: the client left meanwhile.
        """
        with self._news:
            while self._settled is Outcome.PENDING:
                if self._down_done:
                    raise _Over
                if not self._news.wait(_LOOK_S) and self._local.is_gone():
                    raise ClientGone
            return self._settled is Outcome.DONE

    def _begin(self, head: RequestHead) -> None:
        """Ask the hooks about a request and send its head on."""
        self.requests += 1
        self._method = head.method
        self.last_active = time.monotonic()
        with self._news:
            self._preparing = True
        raw, watches = head.raw, list[Watch]()
        match = self._hooks.match(head)
        try:
            if match is not None:
                raw = self._ask(head, match, watches)
            exchange = Exchange(head, watches)
            with self._news:
                if self._over:
                    raise self._no_engine()
                self._exchange = exchange
                self._settled = Outcome.PENDING
                self._preparing = False
        except BaseException as error:
            self._finish_quietly(Exchange(head, watches))
            if not isinstance(error, Refusal) or not self._can_go_on(head):
                raise
            self._local.send_all([render(error, close=False, body=head.method != "HEAD")])
            return
        if not self._reader.between and len(raw) < _JOINED_BYTES:
            piece = self._next()
            if isinstance(piece, Piece):
                if len(piece.data) <= _JOINED_BYTES:
                    self._send(b"".join((raw, piece.data)))
                    return
                self._send(raw)
                self._send(piece.data)
                return
        self._send(raw)

    def _ask(self, head: RequestHead, match: Match, watches: list[Watch]) -> bytes:
        """Call the hooks; return what is to be sent in place of the head."""
        raw, body = head.raw, None
        if match.body_limit:
            wire, body = self._collect(head, match.body_limit)
            raw = head.with_body(len(body)) + body if head.expects_continue else raw + wire
        request = Request(head, body, self._patience)
        try:
            match.run(request, watches)
        except (Refusal, ClientGone, OSError):
            raise
        except Exception as error:
            _logger.exception("a hook of %s %s failed", head.method, head.path)
            raise Refusal(500, f"wherry: an internal error: {error!r}") from error
        if request.replaced and request.body is not None:
            return head.with_body(len(request.body)) + request.body
        return raw

    def _collect(self, head: RequestHead, limit: int) -> tuple[bytes, bytes]:
        """Read a whole body; return it as it came, and its content."""
        reader = self._reader
        wire, content = bytearray(), bytearray()
        if head.length is not None and head.length > limit:
            raise Refusal(413, f"wherry: the body is longer than {limit} bytes")
        if head.expects_continue and not reader.between:
            self._local.send_all([CONTINUE])
        reader.want_content = True
        while not reader.between:
            piece = self._next()
            if not isinstance(piece, Piece):
                if not self._receive():
                    raise ClientGone
                continue
            wire += piece.data
            for begin, end in piece.content or ():
                content += piece.data[begin:end]
            # Framing may be at most as long as the content, else it is an attack.
            if len(content) > limit or len(wire) > 2 * limit + _JOINED_BYTES:
                raise Refusal(413, f"wherry: the body is longer than {limit} bytes")
        reader.want_content = False
        return bytes(wire), bytes(content)

    def _send(self, data: memoryview | bytes) -> None:
        if self._remote is None:
            raise self._no_engine()
        self._remote.sendall(data)
        self.bytes_up += len(data)
        self.last_active = time.monotonic()

    def _copy_up(self, first: memoryview) -> None:
        """Send what the client sends until it ends."""
        data = first or self._read()
        while data:
            self._send(data)
            data = self._read()

    def _patience(self, event: threading.Event, timeout_s: float) -> bool:
        """See :meth:`Request.wait`."""
        deadline = time.monotonic() + timeout_s
        while not event.wait(max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
            if self._gone.is_set() or self._local.is_gone():
                raise ClientGone
            if time.monotonic() >= deadline:
                return False
        return True

    # -- answers of our own ----------------------------------------------------------------------

    def _no_engine(self) -> Refusal:
        """Say why there is no engine: no way to it (503), or it hung up (502)."""
        if self._refusal is not None:
            return self._refusal
        self.failed = True
        if self._error is not None:
            return Refusal(503, f"wherry: the engine cannot be reached: {self._error.message}")
        return Refusal(502, "wherry: the engine closed the connection without an answer")

    def _can_go_on(self, head: RequestHead) -> bool:
        """Whether the client may send another request after one that was refused here."""
        return head.keep_alive and self._reader.between and not self._over

    def _answer_and_end(self, refusal: Refusal) -> None:
        """Refuse the request that is being read, and let the client read that."""
        if self._settled is not Outcome.DONE and self._remote is not None:
            # The engine has some of it, and is not to get the rest. The end of its stream
            # brings the refusal, unless the answer has begun: then that breaks off.
            self._refusal = refusal
            self._remote.close()
            self._await_down()
            return
        try:
            self._local.send_all([render(refusal, close=True, body=self._method != "HEAD")])
            self._local.linger()
        except OSError:
            pass  # the client did not wait for it

    # -- from the engine: the Sink --------------------------------------------------------------

    def write(self, parts: list[memoryview]) -> int:
        """Write as much as the client has room for; never waits."""
        exchange, settled = self._exchange, self._settled
        raw = settled is Outcome.RAW
        if exchange is None or settled is Outcome.DONE:
            self._give_up("bytes that nobody asked for")
            return sum(map(len, parts))
        if exchange.watched and not raw:
            return 0  # a worker shows it to the watches first
        try:
            count = self._local.send_some(parts)
        except OSError:
            # Not closed here: the thread that calls this holds the stream's lock.
            self._spawn_quietly(self.abort)
            raise
        self.bytes_down += count
        if not raw:
            self._track(exchange, parts, count)
        elif count:
            self.last_active = time.monotonic()
        return count

    def stalled(self) -> None:
        """Have a worker write what :meth:`write` did not take."""
        self._spawn_quietly(self._drain)

    def ended(self, error: TunnelError | None) -> None:
        """Pass the end on to the client, once those who watch it have seen it."""
        with self._news:
            self._over, self._error = True, error
            exchange = None if self._settled is Outcome.DONE else self._exchange
            if exchange is None and self._preparing:
                # The thread that reads the client answers the request it has, or will
                # have if it is the first one.
                self._down_done = True
                self._news.notify_all()
                return
        if exchange is not None and exchange.watched:
            self._spawn_quietly(lambda: self._end_down(exchange, error))
        else:
            self._end_down(exchange, error)

    def hung_up(self) -> None:
        """Wake the thread that reads the client: the engine takes no more."""
        with self._news:
            self._hung_up = True
            if not self._down_done or self._preparing:
                return
        self._local.hang_up()

    def _end_down(self, exchange: Exchange | None, error: TunnelError | None) -> None:
        whole = error is None and (exchange is None or exchange.ends_with_stream)
        with self._draining:
            if exchange is not None:
                try:
                    exchange.finish(complete=whole)
                except ClientGone:
                    pass
                if not exchange.answered:
                    self._refuse_now(exchange)
            if error is None and self._settled is Outcome.RAW:
                self._local.end_writing()
            else:
                # No request could be answered any more.
                self._local.hang_up()
        with self._news:
            self._down_done = True
            hung_up = self._hung_up
            self._news.notify_all()
        if hung_up:
            self._local.hang_up()

    def _refuse_now(self, exchange: Exchange) -> None:
        answer = render(self._no_engine(), close=True, body=exchange.request.method != "HEAD")
        try:
            self._local.send_some([memoryview(answer)])
        except OSError:
            pass  # the client was faster

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
                self._preparing = False
                self._news.notify_all()

    def _give_up(self, reason: str) -> None:
        _logger.warning("the engine's answer is not understood: %s", reason)
        self._spawn_quietly(self.abort)

    def _spawn_quietly(self, job: Callable[[], None]) -> None:
        try:
            self._spawn(job)
        except RuntimeError:
            # The endpoint is being closed, which closes this connection too.
            pass

    # -- from the engine: workers -----------------------------------------------------------------

    def _drain(self) -> None:
        assert self._remote is not None
        with self._draining:
            try:
                self._remote.drain(self._pass)
            except OSError:
                self.abort()

    def _copy_down(self) -> None:
        """Pass on what the engine sends to a client that cannot be polled."""
        assert self._remote is not None
        buffer = memoryview(bytearray(_FULL_BUFFER_BYTES))
        error: TunnelError | None = None
        try:
            while count := self._remote.recv_into(buffer):
                with self._draining:
                    self._pass([buffer[:count]])
        except TunnelError as failure:
            error = failure
        except OSError:
            self.abort()
        self.ended(error)
        self.hung_up()

    def _pass(self, parts: list[memoryview]) -> None:
        """Pass bytes on, waiting for the client and for those who watch.

        :raises OSError: nobody takes them.
        """
        exchange = self._exchange
        if exchange is None or self._settled is Outcome.DONE:
            self._give_up("bytes that nobody asked for")
            return
        for part in parts:
            if self._settled is Outcome.RAW or not exchange.watched:
                self._local.send_all([part])
                self.bytes_down += len(part)
                self.last_active = time.monotonic()
                if self._settled is not Outcome.RAW:
                    self._track(exchange, [part], len(part))
            else:
                self._release(exchange, part)

    def _release(self, exchange: Exchange, part: memoryview) -> None:
        try:
            for data in exchange.release(part):
                self._local.send_all([data])
                self.bytes_down += len(data)
        except Refusal as refusal:
            self._local.send_all([render(refusal, close=True)])
            raise ConnectionAbortedError from refusal
        except (MalformedAnswer, ClientGone) as error:
            raise ConnectionAbortedError from error
        self._note(exchange)

    def _await_down(self) -> None:
        """Wait for the end of the answer, or for the client to be gone."""
        if self._local.socket is not None:
            self._local.await_end(lambda: self._down_done)
            return
        with self._news:
            self._news.wait_for(lambda: self._down_done or self._gone.is_set())

    def _finish_quietly(self, exchange: Exchange) -> None:
        try:
            exchange.finish(complete=False)
        except ClientGone:
            pass
