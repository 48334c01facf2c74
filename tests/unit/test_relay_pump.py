"""Pumps between a local stream and a stream of any kind: here both ends are socket pairs."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from api_proxy import PipeLike

from wherry.core.errors import TunnelError
from wherry.relay import workers as workers_module
from wherry.relay.pump import Pump
from wherry.relay.workers import Workers
from wherry.tunnel.inbox import Inbox, rest_of
from wherry.tunnel.stream import CopyingSender, Sink

WAIT_S = 10.0


class PairStream(CopyingSender):
    """A Stream over a socket; what arrives goes through an inbox, as with a channel."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._end.recv(65536):
                self._inbox.feed([memoryview(data)])
        self._inbox.close()
        self._inbox.tell_end(None, gone=False)

    def recv(self, size: int) -> bytes:
        return self._inbox.read(size)

    def recv_into(self, buffer: memoryview) -> int:
        return self._inbox.read_into(buffer)

    def sendall(self, data: memoryview | bytes, waiting: Any = None) -> None:
        try:
            self._end.sendall(data)
        except OSError as error:
            raise TunnelError("the other side takes no more") from error

    def shutdown_write(self) -> None:
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join(WAIT_S)
        self._inbox.detach()
        self._end.close()

    def deliver_to(self, sink: Sink) -> None:
        self._inbox.attach(sink)
        self._inbox.tell_end(None, gone=False)

    def drain(self, sink_write: Any) -> None:
        taken: list[int] = []
        while self._inbox.drain(sink_write, taken):
            pass
        self._inbox.tell_end(None, gone=False)


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers("test")
    yield made
    assert made.close(WAIT_S)


@pytest.fixture(params=["socket", "pipe"])
def ends(
    request: pytest.FixtureRequest, workers: Workers
) -> Iterator[tuple[socket.socket, socket.socket, Pump]]:
    """The client's end, the server's end, and the pump between them, which runs."""
    client, local = socket.socketpair()
    server, remote = socket.socketpair()
    stream: Any = local if request.param == "socket" else PipeLike(local)
    pump = Pump(stream, PairStream(remote), workers.spawn, head=b"head ")
    workers.spawn(pump.run)
    for end in (client, server):
        end.settimeout(WAIT_S)
    yield client, server, pump
    pump.abort()
    client.close()
    server.close()


def read_all(end: socket.socket) -> bytes:
    return b"".join(iter(lambda: end.recv(1 << 20), b""))


Ends = tuple[socket.socket, socket.socket, Pump]


def test_bytes_read_before_are_sent_first(ends: Ends) -> None:
    client, server, pump = ends
    client.sendall(b"and tail")
    client.shutdown(socket.SHUT_WR)
    assert read_all(server) == b"head and tail"
    server.sendall(b"answer after the end")
    server.shutdown(socket.SHUT_WR)
    assert read_all(client) == b"answer after the end"
    assert pump.bytes_up == len(b"head and tail")
    assert pump.bytes_down == len(b"answer after the end")


def test_the_server_may_end_first(ends: Ends) -> None:
    client, server, _ = ends
    server.sendall(b"x" * 1_000_000)
    server.shutdown(socket.SHUT_WR)
    assert read_all(client) == b"x" * 1_000_000
    client.sendall(b"tail")
    client.shutdown(socket.SHUT_WR)
    assert read_all(server) == b"head tail"


def test_much_data_both_ways_with_slow_readers(ends: Ends) -> None:
    client, server, _ = ends
    data = bytes(range(256)) * 20_000

    def send(end: socket.socket) -> None:
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=send, args=(end,)) for end in (client, server)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.05)  # nobody reads: everything stalls
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_all(server)))
    reader.start()
    assert read_all(client) == data
    for thread in (*threads, reader):
        thread.join(WAIT_S)
    assert got == [b"head " + data]


def test_abort_ends_both_sides(ends: Ends) -> None:
    client, server, pump = ends
    assert server.recv(5) == b"head "
    pump.abort()
    assert client.recv(1) == b""
    assert server.recv(1) == b""


def test_rest_of() -> None:
    parts = [memoryview(b"abc"), memoryview(b""), memoryview(b"de")]
    assert b"".join(rest_of(parts, 2)) == b"cde"
    assert b"".join(rest_of(parts, 3)) == b"de"
    assert rest_of(parts, 5) == []


def test_what_waits_for_a_sink_that_goes_is_dropped() -> None:
    """Else a worker that has begun to drain writes to who has broken off."""

    class Full:
        ends = 0

        def write(self, parts: list[memoryview]) -> int:
            return 0

        def stalled(self) -> None:
            pass

        def ended(self, error: object) -> None:
            self.ends += 1

        def hung_up(self) -> None:
            pass

    inbox, sink = Inbox(), Full()
    inbox.attach(sink)
    inbox.feed([memoryview(b"waits")])
    inbox.close()
    inbox.detach()
    written: list[memoryview] = []
    assert not inbox.drain(written.extend, [])
    assert inbox.feed([memoryview(b"late")]) == 4
    inbox.tell_end(None, gone=True)
    assert (written, sink.ends) == ([], 1)


def test_workers_are_reused_and_survive_a_failing_job(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers("reuse")
    names = []
    for _ in range(3):
        done = threading.Event()

        def job(done: threading.Event = done) -> None:
            names.append(threading.current_thread().name)
            done.set()
            raise ValueError("a failing job")

        workers.spawn(job)
        assert done.wait(WAIT_S)
        deadline = 200
        while not workers._idle and deadline:
            threading.Event().wait(0.01)
            deadline -= 1
    assert set(names) == {"reuse-1"}
    assert "a relay's job failed" in caplog.text
    assert workers.close(WAIT_S)
    with pytest.raises(RuntimeError, match="closed"):
        workers.spawn(lambda: None)


def test_close_waits_for_a_thread_that_idled_out_a_moment_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ending, go = threading.Event(), threading.Event()

    class Lingering(Workers):
        def _work(self, job: Any) -> None:
            super()._work(job)
            ending.set()
            assert go.wait(WAIT_S)

    monkeypatch.setattr(workers_module, "_IDLE_S", 0.01)
    workers = Lingering("lingering")
    workers.spawn(lambda: None)
    assert ending.wait(WAIT_S)
    assert not workers.close(0.01)
    go.set()
    assert workers.close(WAIT_S)


def test_close_waits_for_a_thread_that_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    starting, go, ran = threading.Event(), threading.Event(), threading.Event()
    start = threading.Thread.start

    def slow(thread: threading.Thread) -> None:
        if thread.name == "slow-1":
            starting.set()
            assert go.wait(WAIT_S)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slow)
    workers = Workers("slow")
    spawner = threading.Thread(target=workers.spawn, args=(ran.set,))
    spawner.start()
    assert starting.wait(WAIT_S)
    closed: list[bool] = []
    closer = threading.Thread(target=lambda: closed.append(workers.close(WAIT_S)))
    closer.start()
    closer.join(0.05)
    go.set()
    closer.join(WAIT_S)
    spawner.join(WAIT_S)
    assert closed == [True]
    assert ran.is_set()
