"""Answers through the endpoint's own threads: the client gets each byte once and in order."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from api_proxy import PipeLike
from http_messages import Answer, answers, last_answers, split_up
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_engine import WAIT_S, Client

from wherry.api.connection import Connection
from wherry.api.hooks import Hooks, Watch
from wherry.core.errors import TunnelError
from wherry.relay.workers import Workers
from wherry.tunnel.inbox import Inbox
from wherry.tunnel.stream import CopyingSender, DrainWrite, Sink


class ScriptedStream(CopyingSender):
    """The engine's side, whose bytes come in the parts that a test says."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._gone = False
        self._news = threading.Condition()
        self._sent = bytearray()

    def expect(self, data: bytes) -> None:
        """Wait until the endpoint has sent this and no more since the last time."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._sent) >= len(data), WAIT_S)
            assert self._sent == data
            self._sent.clear()

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
            if self._gone:
                raise TunnelError("the stream was closed")
            self._sent += data
            self._news.notify_all()

    def shutdown_write(self) -> None:
        pass

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
def served(hooks: Hooks, room: list[int], *, pipe: bool) -> Iterator[tuple[Client, ScriptedStream]]:
    """A client and the engine's side of its connection, which ends with the client.

    :param room: how many bytes the client has room for, each time it is written to.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    stream, workers = ScriptedStream(), Workers("answers")
    connection = Connection(
        PipeLike(theirs) if pipe else theirs, lambda: stream, hooks, workers.spawn
    )
    if room:
        sizes, send = itertools.cycle(room), connection._local.send_some

        def send_little(parts: list[memoryview]) -> int:
            size = next(sizes)
            return send([parts[0][:size]]) if size else 0

        connection._local.send_some = send_little  # type: ignore[method-assign]
    done = threading.Event()

    def serve() -> None:
        connection.run()
        done.set()

    workers.spawn(serve)
    try:
        with Client(ours) as client:
            yield client, stream
    finally:
        assert done.wait(WAIT_S)
        assert workers.close(WAIT_S)


@pytest.mark.parametrize("watched", ["", "end", "line"])
@pytest.mark.parametrize("pipe", [False, True], ids=["socket", "pipe"])
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_split_of_any_answers(pipe: bool, watched: str, data: st.DataObject) -> None:
    """Passed on by the tunnel's thread, by a worker, or by both in turn."""
    expected: list[Answer] = data.draw(st.lists(answers(), max_size=3))
    last = data.draw(st.none() | last_answers())
    room = [] if pipe else data.draw(st.lists(st.integers(0, 40), max_size=3))
    hooks = Hooks()
    if watched:
        watch = Watch(line=lambda line: None) if watched == "line" else Watch(end=lambda done: None)
        for method in ("GET", "HEAD", "POST"):
            hooks.on(method, "{any}", lambda request: watch)
    with served(hooks, room, pipe=pipe) as (client, stream):
        for answer in [*expected, *([last] if last else [])]:
            client.send(answer.request.raw)
            stream.expect(answer.request.raw)
            for part in data.draw(split_up(answer.wire)):
                stream.feed(part)
            if answer is last:
                stream.end()
                assert client.rest() == answer.wire
            else:
                assert client.take(len(answer.wire)) == answer.wire
                assert not client.buffer
