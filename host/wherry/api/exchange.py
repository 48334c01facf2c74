"""One request and its answer: what is watched is held back until it was looked at."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator
from functools import cached_property

from wherry.api.answers import Refusal
from wherry.api.hooks import LINE_LIMIT_BYTES, ClientGone, Watch
from wherry.api.http import Asked, ResponseHead
from wherry.api.messages import AnswerReader, Piece

_logger = logging.getLogger(__name__)

_RECORD_SEPARATOR = b"\x1e"
"""Precedes each line of ``application/json-seq`` (RFC 7464 §2.2), which ``/events`` can be."""


class Outcome(enum.Enum):
    """What became of an exchange."""

    PENDING = "pending"
    DONE = "done"
    RAW = "raw"
    """The connection is a raw stream now."""


class Exchange:
    """A request that goes to the engine, until its answer has ended.

    An answer that nobody watches is followed by :meth:`track`, after it was passed on;
    one that is watched goes through :meth:`release`.

    :param request: its head, of which no more is kept than the answer needs.
    :param watches: what its hooks returned.
    """

    def __init__(self, request: Asked, watches: list[Watch]) -> None:
        self.request = Asked(request.method, request.path)
        self.answered = False
        """Whether the client has got any of the answer itself; a 100 or 102 is none."""
        self._heads = [watch.head for watch in watches if watch.head]
        self._lines = [watch.line for watch in watches if watch.line]
        self._ends = [watch.end for watch in watches if watch.end]
        self.watched = bool(watches)
        self._held = bytearray()
        self._line = bytearray()
        self._too_long = False
        self._begun = False
        self._other: list[bytes] | None = None

    @cached_property
    def _reader(self) -> AnswerReader:
        # Made with the first bytes of the answer: the request does not wait for it.
        return AnswerReader(self.request, want_content=bool(self._lines))

    @property
    def outcome(self) -> Outcome:
        """What has become of it so far."""
        if self._reader.raw:
            return Outcome.RAW
        return Outcome.DONE if self._reader.done else Outcome.PENDING

    @property
    def passive(self) -> bool:
        """Whether the request only listens: an open ``/events`` is no sign of activity."""
        return self.request.path == "/events"

    @property
    def ends_with_stream(self) -> bool:
        """Whether the end of the engine's stream is the answer's proper end."""
        return self._reader.ends_with_stream

    def track(self, data: memoryview) -> None:
        """Follow bytes of the answer that were passed on.

        :raises MalformedAnswer: they are not the answer's.
        """
        self._reader.follow(data)
        self.answered = self._reader.begun

    def release(self, data: memoryview) -> Iterator[memoryview | bytes]:
        """Show bytes of the answer to the watches; yield them when they may be passed on.

        :raises MalformedAnswer: they are not the answer's.
        :raises Refusal: a watch refuses the answer; nothing of it was yielded.
        :raises ClientGone: nobody waits for them any more.
        """
        reader = self._reader
        reader.receive(data)
        while (item := reader.next()) is not None:
            if isinstance(item, Piece):
                yield from self._release_piece(item)
                continue
            if not item.interim:
                self._show_head(item)
                if reader.done:
                    self.finish(complete=True)
                self.answered = True
            yield item.raw

    def rest(self) -> bytes:
        """Show the line that only the engine's stream ends; return what was held back for it.

        :raises ClientGone: nobody waits for it any more.
        """
        if self._line:
            self._show_line()
        return self._take_held()

    def finish(self, *, complete: bool) -> None:
        """Tell the watches that it has ended; safe to repeat.

        :raises ClientGone: nobody waits for the end any more; all were told.
        """
        gone: ClientGone | None = None
        while self._ends:
            try:
                self._ends.pop(0)(complete)
            except ClientGone as error:
                gone = error
            except Exception:
                _logger.exception("a watch of %s failed", self._name)
        if gone is not None:
            raise gone

    @property
    def _name(self) -> str:
        return f"{self.request.method} {self.request.path}"

    def _show_head(self, head: ResponseHead) -> None:
        for show in self._heads:
            try:
                show(head)
            except (Refusal, ClientGone):
                raise
            except Exception as error:
                _logger.exception("a watch of %s failed", self._name)
                raise Refusal(500, f"wherry: an internal error: {error!r}") from error

    def _release_piece(self, piece: Piece) -> Iterator[memoryview | bytes]:
        if self._lines and not self._reader.raw:
            yield from self._release_lines(piece)
        elif piece.last:
            # What comes before the tail need not wait for the end.
            cut = len(piece.data) - piece.tail
            yield piece.data[:cut]
            self._held += piece.data[cut:]
        else:
            yield piece.data
        if piece.last:
            if self._line:
                self._show_line()
            self.finish(complete=True)
            yield self._take_held()

    def _release_lines(self, piece: Piece) -> Iterator[bytes]:
        """Hold bytes until the line that ends in them was shown, and the last ones anyway."""
        released = 0
        for begin, end in piece.content or ():
            content = bytes(piece.data[begin:end])
            at = 0
            while newline := content.find(b"\n", at) + 1:
                self._line += content[at:newline]
                at = newline
                self._show_line()
                if not piece.last:
                    self._held += piece.data[released : begin + at]
                    released = begin + at
                    yield self._take_held()
            self._line += content[at:]
        self._held += piece.data[released:]
        if len(self._line) > LINE_LIMIT_BYTES:
            # It is no first line any more either, which another one could be given for.
            self._too_long = self._begun = True
            if self._other is not None:
                self._other.append(bytes(self._line))
            self._line.clear()
        # Without a begun line only framing is held, which a client may be waiting for; it waits
        # for none before the first line, which may yet get another length.
        if not piece.last and not self._line and self._begun:
            yield self._take_held()

    def _take_held(self) -> bytes:
        held = bytes(self._held)
        self._held.clear()
        if self._other is not None:
            # Framed anew: what the engine's framing says of the length is not so any more.
            text = b"".join(self._other)
            self._other.clear()
            held = b"%x\r\n%b\r\n" % (len(text), text) if text else b""
            if self._reader.done:
                held += b"0\r\n\r\n"
        return held

    def _show_line(self) -> None:
        whole = bytes(self._line)
        self._line.clear()
        first, self._begun = not self._begun, True
        if self._too_long:
            self._too_long = False
        else:
            line = whole.rstrip(b"\r\n").removeprefix(_RECORD_SEPARATOR)
            for show in self._lines:
                other = _quietly(show, line, self._name)
                if other is not None and first and self._reader.chunked:
                    self._other = []
                    whole = other + b"\n"
        if self._other is not None:
            self._other.append(whole)


def _quietly(show: Callable[[bytes], bytes | None], line: bytes, name: str) -> bytes | None:
    try:
        return show(line)
    except ClientGone:
        raise
    except Exception:
        _logger.exception("a watch of %s failed", name)
        return None
