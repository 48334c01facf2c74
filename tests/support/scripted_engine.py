"""One connection of the endpoint, between a client and an engine that say what a test says.

Nothing is left to the time at which something is done: how many bytes the endpoint reads and
writes at once is said as well.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from api_proxy import PipeLike
from fake_pipes import FakePipes
from hypothesis import Phase, settings
from stub_engine import WAIT_S, Client

from wherry.api.connection import Connection
from wherry.api.hooks import Hooks
from wherry.core.errors import TunnelError
from wherry.platform.windows import pipes
from wherry.relay.workers import Workers
from wherry.tunnel.inbox import Inbox
from wherry.tunnel.stream import CopyingSender, DrainWrite, Sink

KINDS = ["socket", "unpolled", "pipe"]
"""What a client's end can be: the last one is what stands in for a named pipe of Windows."""

EXAMPLES = settings(
    deadline=None, max_examples=60, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
"""Nothing is made smaller that fails: what is missing is waited for again each time."""


class ScriptedStream(CopyingSender):
    """The engine's side, whose bytes come in the parts that a test says."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._gone = False
        self._news = threading.Condition()
        self._sent = bytearray()
        self._sent_all = False

    def expect(self, data: bytes) -> None:
        """Wait until the endpoint has sent this and no more since the last time."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._sent) >= len(data), WAIT_S)
            assert self._sent == data
            self._sent.clear()

    def expect_end(self) -> None:
        """Wait until the endpoint has ended its direction, and sent nothing before that."""
        with self._news:
            assert self._news.wait_for(lambda: self._sent_all, WAIT_S)
            assert not self._sent

    def feed(self, part: bytes) -> None:
        self._inbox.feed([memoryview(part)])

    def end(self) -> None:
        self._inbox.close()
        self._inbox.tell_end(None, gone=self._gone)

    def recv(self, size: int) -> bytes:
        raise NotImplementedError

    recv_into = recv

    def sendall(self, data: memoryview | bytes, waiting: Callable[[], None] | None = None) -> None:
        with self._news:
            if self._gone or self._sent_all:
                raise TunnelError("the stream was closed")
            self._sent += data
            self._news.notify_all()

    def shutdown_write(self) -> None:
        with self._news:
            self._sent_all = not self._gone
            self._news.notify_all()

    def close(self) -> None:
        with self._news:
            self._gone = True
        self._inbox.close()
        self._inbox.tell_end(None, gone=True)
        self._inbox.detach()

    def deliver_to(self, sink: Sink) -> None:
        self._inbox.attach(sink)
        self._inbox.tell_end(None, gone=self._gone)

    def drain(self, sink_write: DrainWrite) -> None:
        try:
            while self._inbox.drain(sink_write, []):
                pass
        finally:
            self._inbox.tell_end(None, gone=self._gone)


@contextlib.contextmanager
def ends(kind: str) -> Iterator[tuple[Any, Any]]:
    """The client's end and ours; whoever gets them closes them."""
    if kind == "pipe":
        kernel, name = FakePipes(), r"\\.\pipe\wherry"
        listener = pipes.PipeListener(kernel, name, pending=1)
        theirs = pipes.connect(kernel, name, 0.0)
        ours = listener.accept()
        listener.close()
        yield theirs, ours
        assert kernel.open_handles == 0
    else:
        theirs, end = socket.socketpair()
        theirs.settimeout(WAIT_S)
        yield theirs, PipeLike(end) if kind == "unpolled" else end


@contextlib.contextmanager
def served(
    hooks: Hooks, kind: str = "socket", *, reads: Sequence[int] = (), room: Sequence[int] = ()
) -> Iterator[tuple[Client, ScriptedStream]]:
    """A client and the engine's side of its connection, which ends with the client.

    :param reads: how many bytes are read of the client at most, each time.
    :param room: how many bytes the client has room for, each time it is written to.
    """
    with ends(kind) as (theirs, ours):
        stream, workers = ScriptedStream(), Workers("scripted")
        connection = Connection(ours, lambda: stream, hooks, workers.spawn)
        local = connection._local
        if reads:
            read, sizes = local.read, itertools.cycle(reads)
            local.read = lambda parts: read([parts[0][: next(sizes)]])  # type: ignore
        if room:
            rooms, send = itertools.cycle(room), local.send_some

            def send_little(parts: list[memoryview]) -> int:
                size = next(rooms)
                return send([parts[0][:size]]) if size else 0

            local.send_some = send_little  # type: ignore[method-assign]
        done = threading.Event()

        def serve() -> None:
            connection.run()
            done.set()

        workers.spawn(serve)
        try:
            with Client(theirs) as client:
                yield client, stream
        finally:
            assert done.wait(WAIT_S)
            assert workers.close(WAIT_S)
