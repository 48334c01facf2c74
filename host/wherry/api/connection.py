"""One client of the endpoint, and the engine's stream that belongs to it.

A thread reads the client and sends to the engine; :mod:`wherry.api.downstream` has the
other direction.

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
from wherry.api.downstream import LOOK_S, Downstream, Over
from wherry.api.exchange import Exchange
from wherry.api.heads import HEAD_TIMEOUT_S, OWN_BYTES, HeadRoom
from wherry.api.hooks import ClientGone, Hooks, Match, Request, Watch
from wherry.api.http import MalformedRequest, RequestHead
from wherry.api.local import LocalEnd
from wherry.api.messages import Piece, RequestReader
from wherry.core.errors import TunnelError
from wherry.platform.base import AcceptedStream
from wherry.relay.pump import Spawn
from wherry.tunnel.stream import Stream

_FIRST_BUFFER_BYTES = 16 * 1024
_FULL_BUFFER_BYTES = 256 * 1024
_JOINED_BYTES = 16 * 1024
"""A head and the beginning of its body go in one packet up to this."""

_logger = logging.getLogger(__name__)


class Connection:
    """Serves one client.

    :param local: the client.
    :param open_stream: makes the engine's side; called at the start, so that it opens while
        the client's first request is on its way, and again for a request that finds that
        stream ended before anything was sent on it.
    :param hooks: the endpoint's.
    :param spawn: runs helpers in other threads.
    :param prepare: called in one of these when there has been an answer.
    :param room: the endpoint's, for requests that are long.
    :param head_timeout_s: seconds that a head may take from its first byte on.
    """

    def __init__(
        self,
        local: AcceptedStream,
        open_stream: Callable[[], Stream],
        hooks: Hooks,
        spawn: Spawn,
        *,
        prepare: Callable[[], None] = lambda: None,
        room: HeadRoom | None = None,
        head_timeout_s: float = HEAD_TIMEOUT_S,
    ) -> None:
        self._local = LocalEnd(local)
        self._open_stream = open_stream
        self._hooks = hooks
        self._remote: Stream | None = None
        self._spawn = spawn
        self._prepare = prepare
        self._down = self._new_down()
        self._reader = RequestReader()
        self._room = room if room is not None else HeadRoom()
        self._taken = 0
        self._head_timeout_s = head_timeout_s
        self._head_due: float | None = None
        self._method = ""
        self._answered = False
        self._asked_in_vain = False
        self._buffer = memoryview(bytearray(_FIRST_BUFFER_BYTES))
        self._wants_more = False
        self._gone = threading.Event()
        self._last_active = time.monotonic()
        self.requests = 0
        """Requests that were understood."""
        self.bytes_up = 0
        """Bytes sent to the engine."""

    @property
    def bytes_down(self) -> int:
        """Bytes of the engine's passed to the client."""
        return self._down.bytes

    @property
    def last_active(self) -> float:
        """When a request or a byte last passed, on the monotonic clock; not of ``/events``."""
        return max(self._last_active, self._down.last_active)

    @property
    def in_flight(self) -> bool:
        """Whether an answer is pending, or a raw stream open; not of ``/events``."""
        return self._down.in_flight

    @property
    def failed(self) -> bool:
        """Whether a request found no engine."""
        return self._down.failed

    def run(self) -> None:
        """Serve until either side has ended; close both."""
        try:
            self._open()
            self._serve()
        except (OSError, ClientGone, Over):
            pass  # the client or the engine is gone; there is nobody to tell
        except TunnelError:
            # The engine takes no more; what it sent is still delivered.
            self._down.await_end()
        except Refusal as refusal:
            self._answer_and_end(refusal)
        finally:
            self.abort()
            self._give_room_back()
            with self._down.draining:
                self._local.close()
                self._down.finish()

    def abort(self) -> None:
        """End both directions at once; from any thread; :meth:`run` then returns soon."""
        self._gone.set()
        if self._remote is not None:
            self._remote.close()
        self._local.hang_up()

    # -- from the client: requests -------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._remote = remote = self._open_stream()
        except TunnelError as error:
            self._asked_in_vain = self._local.has_input()
            self._down.open_failed(error)
            return
        if self._gone.is_set():
            # Aborted before there was a stream to close.
            remote.close()
        self._down.attach(remote)

    def _open_again(self) -> None:
        """Go on with another stream, as nothing is expected of the one that has ended."""
        self._down.finish()
        if self._remote is not None:
            # sshd keeps its half of a stream until we close ours.
            self._remote.close()
        self._down = self._new_down()
        self._open()

    def _new_down(self) -> Downstream:
        return Downstream(self._local, self._spawn, self.abort, self._prepare)

    def _serve(self) -> None:
        """Read requests and send them on, until the client's stream ends or becomes raw."""
        reader = self._reader
        while True:
            if reader.has_data and not reader.begun and not self._settle():
                self._copy_up(reader.rest())
                break
            if not self._pass_on() and not self._receive():
                break
        if not self._down.settled and self._remote is not None:
            self._remote.shutdown_write()
            self._down.await_end()

    def _pass_on(self) -> bool:
        """Send on what comes next; False when more must be received for that.

        A head may be long, and is let go of when this returns: the wait may be, too.
        """
        item = self._next()
        if item is None:
            return False
        if isinstance(item, RequestHead):
            self._head_due = None
            self._begin(item)
            self._give_room_back()
        else:
            self._send(item.data)
        return True

    def _next(self) -> RequestHead | Piece | None:
        try:
            return self._reader.next()
        except MalformedRequest as error:
            if self._reader.between:
                self._method = ""  # no request's, and what it was before is answered
            raise Refusal(400, f"wherry: bad request: {error}") from error

    def _receive(self) -> bool:
        """Wait for bytes of the client and hand them to the reader; False at their end.

        :raises Refusal: there is no room for more of a head.
        """
        data = self._read_head() if self._reader.held else self._read()
        self._reader.receive(data)
        return bool(data)

    def _read_head(self) -> memoryview:
        """Wait for more of a head that has begun, as :meth:`_read` does.

        :raises OSError: the client takes too long for it.
        """
        if self._head_due is None:
            self._head_due = time.monotonic() + self._head_timeout_s
        self._method = ""
        self._take_room(self._reader.held)
        # The room for much at once is for bodies.
        self._wants_more = False
        buffer = self._buffer[:_FIRST_BUFFER_BYTES]
        return buffer[: self._local.read_by(buffer, self._head_due)]

    def _take_room(self, held: int) -> None:
        """Have room for all that is held of a request which has not gone on.

        :raises Refusal: there is not so much.
        """
        more = held - OWN_BYTES - self._taken
        if more > 0:
            if not self._room.take(more):
                raise Refusal(503, "wherry: too many long requests have begun and not gone on")
            self._taken += more

    def _give_room_back(self) -> None:
        if self._taken:
            self._room.give_back(self._taken)
            self._taken = 0

    def _read(self) -> memoryview:
        """Wait for bytes of the client; none at their end. They are good until the next call."""
        if self._wants_more:
            # Most connections never send this much, so they do not pay for it.
            self._wants_more = False
            self._buffer = memoryview(bytearray(_FULL_BUFFER_BYTES))
        buffer = self._buffer
        count = self._local.read([buffer])
        self._wants_more = count == len(buffer) < _FULL_BUFFER_BYTES
        return buffer[:count]

    def _settle(self) -> bool:
        return self._down.settle(lambda: self._gone.is_set() or self._local.is_gone())

    def _begin(self, head: RequestHead) -> None:
        """Ask the hooks about a request and send its head on."""
        self.requests += 1
        self._method = head.method
        self._answered = False
        if self._down.over and not self.bytes_up and not self._asked_in_vain:
            # It ended while the client had nothing to ask, as when the engine restarts. A
            # request that has waited for it is not made to wait again.
            self._open_again()
        self._last_active = time.monotonic()
        raw, watches = head.raw, list[Watch]()
        match = self._hooks.match(head)
        try:
            self._down.require()
            if match is not None:
                self._down.prepare()
                raw = self._ask(head, match, watches)
                if self._down.over:
                    # The engine waits for a first head for five minutes (ReadHeaderTimeout in
                    # cmd/dockerd), and hooks may take longer.
                    self._open_again()
            self._down.begin(Exchange(head, watches))
        except BaseException as error:
            _end_watches(head, watches)
            if not isinstance(error, Refusal) or not self._can_go_on(head):
                raise
            self._local.send_all([render(error, close=False, body=head.method != "HEAD")])
            return
        self._answered = True
        if head.length != 0 and not self._reader.between and len(raw) < _JOINED_BYTES:
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
            raw = head.with_body(len(request.body)) + request.body
        request.let_go()
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
            self._take_room(len(head.raw) + len(wire) + len(content))
            # Framing may be at most as long as the content, else it is an attack.
            if len(content) > limit or len(wire) > 2 * limit + _JOINED_BYTES:
                raise Refusal(413, f"wherry: the body is longer than {limit} bytes")
        reader.want_content = False
        return bytes(wire), bytes(content)

    def _send(self, data: memoryview | bytes) -> None:
        assert self._remote is not None
        self._last_active = time.monotonic()
        self._remote.sendall(data, self._look)
        self.bytes_up += len(data)

    def _look(self) -> None:
        """Notice, while the engine takes nothing, that the client has left."""
        if self._local.is_gone():
            raise ClientGone

    def _copy_up(self, first: memoryview) -> None:
        """Send what the client sends until it ends."""
        data = first or self._read()
        while data:
            self._send(data)
            if len(data) >= _FIRST_BUFFER_BYTES and self._local.socket is not None:
                data = first = self._buffer = memoryview(b"")  # the stream has its own room
                self._copy_much()
                return
            data = self._read()

    def _copy_much(self) -> None:
        assert self._remote is not None
        while count := self._remote.send_from(self._local.read, self._look):
            self._last_active = time.monotonic()
            self.bytes_up += count

    def _patience(self, event: threading.Event, timeout_s: float) -> bool:
        """See :meth:`Request.wait`."""
        deadline = time.monotonic() + timeout_s
        while not event.wait(max(0.0, min(LOOK_S, deadline - time.monotonic()))):
            if self._gone.is_set() or self._local.is_gone():
                raise ClientGone
            if time.monotonic() >= deadline:
                return False
        return True

    # -- answers of our own ----------------------------------------------------------------------

    def _can_go_on(self, head: RequestHead) -> bool:
        """Whether the client may send another request after one that was refused here."""
        return head.keep_alive and self._reader.between and not self._down.over

    def _answer_and_end(self, refusal: Refusal) -> None:
        """Refuse the request that is being read, and let the client read that."""
        if not self._down.settled:
            # The engine has some of it, and is not to get the rest. The client gets the
            # refusal unless the answer has begun: then that breaks off.
            self._down.break_off(refusal)
            return
        if self._answered and not self._reader.between:
            return  # by the engine, before it had all of the request: one answer is enough
        try:
            self._local.send_all([render(refusal, close=True, body=self._method != "HEAD")])
            self._local.linger()
        except OSError:
            pass  # the client did not wait for it


def _end_watches(head: RequestHead, watches: list[Watch]) -> None:
    try:
        Exchange(head, watches).finish(complete=False)
    except ClientGone:
        pass
