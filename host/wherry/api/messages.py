"""Where the messages in a stream of bytes begin and end; no sockets, no waiting.

Both readers are fed by ``receive`` and asked by ``next``, until that returns None. They
keep views of what they were fed, so a buffer may be used again once None was returned.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from wherry.api.framing import Body, Chunked, Length, MalformedBody, Ranges, UntilEnd
from wherry.api.http import (
    HEAD_LIMIT_BYTES,
    Asked,
    MalformedAnswer,
    MalformedRequest,
    RequestHead,
    ResponseHead,
    parse_answer,
    parse_request,
)

_ANSWER_HEAD_LIMIT_BYTES = 1 << 20
_WHOLE_HEAD_BYTES = 64 * 1024
"""A head that is longer is put together like one that comes in parts."""

_BARE_LF = re.compile(rb"(?<!\r)\n")

_NOTHING = memoryview(b"")


class Piece(NamedTuple):
    """Bytes of a body, framing included.

    :param last: whether the body ends with them.
    :param tail: how many of them must be kept back to keep the end back.
    :param content: the parts that are content; only when it was asked for.
    """

    data: memoryview
    last: bool
    tail: int = 0
    content: Ranges | None = None


class _Reader:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = _NOTHING
        self._begun = bytearray()

    @property
    def has_data(self) -> bool:
        """Whether bytes wait that were not looked at."""
        return bool(self._data)

    def receive(self, data: memoryview) -> None:
        """Take bytes; only after ``next`` has returned None."""
        self._data = data

    def rest(self) -> memoryview:
        """Take back the bytes that were not looked at."""
        rest, self._data = self._data, _NOTHING
        return rest

    def _take_head(self) -> bytes | None:
        """Take a head; None until it is whole.

        :raises ValueError: it is longer than the limit.
        """
        begun = self._begun
        if not begun:
            # As a rule all of it is there.
            head = bytes(self._data[:_WHOLE_HEAD_BYTES])
            if (end := head.find(b"\r\n\r\n") + 4) >= 4:
                self._data = self._data[end:]
                return head[:end]
        searched = max(0, len(begun) - 3)
        fed = len(begun)
        # Never more than a head's worth is copied from a large buffer.
        begun += self._data[: self._limit + 4 - fed]
        end = begun.find(b"\r\n\r\n", searched) + 4
        if end < 4:
            if len(begun) > self._limit:
                raise ValueError
            self._data = _NOTHING
            return None
        if end > self._limit:
            raise ValueError
        with memoryview(begun) as view:
            head = bytes(view[:end])
        self._data = self._data[end - fed :]
        begun.clear()
        return head

    def _take_piece(self, body: Body, *, content: bool) -> Piece | None:
        if not self._data:
            return None
        ranges: Ranges | None = [] if content else None
        taken = body.feed(self._data, ranges)
        piece = Piece(self._data[:taken], body.done, body.tail, ranges)
        self._data = self._data[taken:]
        return piece


class RequestReader(_Reader):
    """Reads what a client sends: heads and pieces of bodies, in turn.

    A request without a body is its head alone.
    """

    def __init__(self) -> None:
        super().__init__(HEAD_LIMIT_BYTES)
        self._body: Body = Length(0)
        self._looked = 0
        self.want_content = False

    @property
    def between(self) -> bool:
        """Whether the next byte is a head's."""
        return self._body.done

    @property
    def begun(self) -> bool:
        """Whether a request has begun that is not whole."""
        return not self._body.done or bool(self._begun)

    @property
    def held(self) -> int:
        """How many bytes of a head are held that is not whole."""
        return len(self._begun)

    def next(self) -> RequestHead | Piece | None:
        """Return what comes next; None when more bytes are needed.

        :raises MalformedRequest: the client is not to be understood; it stays so.
        """
        if not self._body.done:
            try:
                return self._take_piece(self._body, content=self.want_content)
            except MalformedBody as error:
                raise MalformedRequest(str(error)) from error
        if not self._data:
            return None
        try:
            raw = self._take_head()
        except ValueError:
            raise MalformedRequest(f"the head is longer than {HEAD_LIMIT_BYTES} bytes") from None
        if raw is None:
            self._look_early()
            return None
        self._looked = 0
        head = parse_request(raw)
        self._body = head.body()
        return head

    def _look_early(self) -> None:
        """Refuse what can never become a head, since its sender may wait for an answer.

        Each byte is looked at once, however small the parts are in which it comes.
        """
        begun = self._begun
        if begun[0] <= 0x20:
            raise MalformedRequest("no request line")
        # A CR that came before is seen: the pattern looks behind where the search begins.
        if _BARE_LF.search(begun, self._looked):
            raise MalformedRequest("a line that ends with a bare LF")
        self._looked = len(begun)


class AnswerReader(_Reader):
    """Reads the engine's answer to one request: heads, the last one the answer's, and pieces.

    :param request: what is answered.
    :param want_content: tell in each piece which bytes are content.
    """

    def __init__(self, request: Asked, *, want_content: bool = False) -> None:
        super().__init__(_ANSWER_HEAD_LIMIT_BYTES)
        self._request = request
        self._want_content = want_content
        self._body: Body | None = None
        self.raw = False
        """Whether the connection has become a raw stream, which ``next`` knows no end of."""

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self._body is not None and self._body.done

    @property
    def begun(self) -> bool:
        """Whether any of the answer itself has come."""
        return self._body is not None or bool(self._begun)

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks (RFC 9112 §7.1)."""
        return isinstance(self._body, Chunked)

    @property
    def ends_with_stream(self) -> bool:
        """Whether the end of the stream is the answer's proper end."""
        return self.done or isinstance(self._body, UntilEnd)

    def next(self) -> ResponseHead | Piece | None:
        """Return what comes next; None when more bytes are needed.

        :raises MalformedAnswer: these bytes are not an answer, or more than one.
        """
        body = self._body
        if body is None:
            return self._next_head()
        if not body.done:
            try:
                return self._take_piece(body, content=self._want_content and not self.raw)
            except MalformedBody as error:
                raise MalformedAnswer(str(error)) from error
        if self._data:
            raise MalformedAnswer("bytes that nobody asked for")
        return None

    def follow(self, data: memoryview) -> None:
        """Take bytes that nobody wants to see.

        :raises MalformedAnswer: these bytes are not an answer, or more than one.
        """
        body = self._body
        if body is not None and not body.done:
            try:
                data = data[body.feed(data) :]
            except MalformedBody as error:
                raise MalformedAnswer(str(error)) from error
            if not data:
                return
        self.receive(data)
        while self.next() is not None:
            pass

    def _next_head(self) -> ResponseHead | None:
        if not self._data:
            return None
        try:
            raw = self._take_head()
        except ValueError:
            raise MalformedAnswer("the head has no end") from None
        if raw is None:
            return None
        head = parse_answer(raw)
        if head.interim:
            return head
        self.raw = head.switches(self._request)
        self._body = UntilEnd() if self.raw else head.body(self._request)
        return head
