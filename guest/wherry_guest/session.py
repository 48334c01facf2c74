"""The agent's end of a session: reading frames, calling handlers, writing replies."""

from __future__ import annotations

import _thread
import os
import select
import sys
import time

from wherry_wire.frames import Decoder, Frame, WireError
from wherry_wire.messages import Failure, Message, pack, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    M = TypeVar("M", bound=Message)

_READ_BYTES = 64 * 1024


def failure(text: str) -> Failure:
    """Return a reply that says what went wrong; a path in it may be no valid UTF-8."""
    return Failure(message=text.encode(errors="backslashreplace").decode())


class Session:
    """A table of handlers, one for each type of frame, and the loop that feeds them.

    A feature registers with :meth:`answer` what it does for a request, or with
    :meth:`on_frame` what it does with a frame whose format is its own.

    :param source: descriptor to read frames from; blocking.
    :param sink: descriptor to write frames to; blocking.
    """

    def __init__(self, source: int, sink: int) -> None:
        self._source = source
        self._sink = sink
        self._writing = _thread.allocate_lock()
        self._handlers: dict[int, Callable[[Frame], None]] = {}
        self._timer: Callable[[], None] | None = None
        self._interval_s = 0.0
        self._due = 0.0

    def on_frame(self, type: int, handler: Callable[[Frame], None]) -> None:
        """Have ``handler`` called, in the loop, with every frame of a type."""
        if type in self._handlers:
            raise ValueError(f"type 0x{type:02x} has a handler")
        self._handlers[type] = handler

    def answer(
        self, kind: type[M], function: Callable[[M], Message], *, slow: bool = False
    ) -> None:
        """Have ``function`` called with each request of a kind, and its result sent back.

        :param slow: it may wait for something, so it gets a thread of its own and must be
            safe to run in several at once.

        What it raises is sent back as a :class:`Failure`.
        """

        def work(frame: Frame, request: M) -> None:
            try:
                reply = function(request)
            except OSError as error:
                reply = failure(str(error))
            except Exception as error:
                # A mistake of ours: the host gets an answer, the log gets the traceback.
                sys.excepthook(*sys.exc_info())
                reply = failure(f"{type(error).__name__}: {error}")
            self.send(reply, frame.id)

        def handle(frame: Frame) -> None:
            request = unpack(frame)
            assert isinstance(request, kind)
            if slow:
                _thread.start_new_thread(work, (frame, request))
            else:
                work(frame, request)

        self.on_frame(kind.TYPE, handle)

    def every(self, interval_s: float, function: Callable[[], None] | None) -> None:
        """Have ``function`` called, in the loop, every ``interval_s`` seconds; None: no more.

        There is one such timer. Without it the loop sleeps until a frame comes.
        """
        self._timer = function
        self._interval_s = interval_s
        self._due = time.monotonic() + interval_s

    def send(self, message: Message, id: int) -> None:
        """Send a message; from any thread.

        When the host is gone it is dropped: the loop is about to see the end of its input.
        """
        data = memoryview(pack(message, id))
        with self._writing:
            try:
                while data:
                    data = data[os.write(self._sink, data) :]
            except OSError:
                pass

    def run(self) -> None:
        """Serve until the host closes its end.

        :raises WireError: the host broke the protocol; it has been told.
        """
        decoder = Decoder()
        try:
            while True:
                if not self._wait():
                    continue
                data = os.read(self._source, _READ_BYTES)
                if not data:
                    return
                for frame in decoder.feed(data):
                    handler = self._handlers.get(frame.type)
                    if handler is None:
                        raise WireError(f"no handler for frames of type 0x{frame.type:02x}")
                    handler(frame)
        except WireError as error:
            self.send(failure(str(error)), 0)
            raise

    def _wait(self) -> bool:
        """Wait for input or the timer; call the latter; tell whether there is input."""
        if self._timer is None:
            return True  # The read itself waits.
        timeout_s = max(0.0, self._due - time.monotonic())
        ready = bool(select.select([self._source], [], [], timeout_s)[0])
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._interval_s
            self._timer()
        return ready
