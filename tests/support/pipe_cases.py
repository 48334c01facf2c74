"""What a named pipe does, as tests: on the real thing and on what stands in for it.

A module that imports these has the fixtures ``kernel``, ``name``, ``listener`` and ``pair``.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from stub_engine import pattern

from wherry.platform.windows.pipes import Calls, PipeListener, PipeStream, connect

WAIT_S = 20
MOMENT_S = 0.05
"""Long enough for a thread to begin to wait; a shorter one makes a test easier to pass."""

Pair = tuple[PipeStream, PipeStream]
"""A server's end and a client's."""


def rest(stream: PipeStream) -> bytes:
    """Everything until the other side ends its direction."""
    data = bytearray()
    while part := stream.recv(65536):
        data += part
    return bytes(data)


def waits(running: Future[Any]) -> bool:
    """Whether a job still runs after a moment."""
    return not wait([running], MOMENT_S).done


@contextlib.contextmanager
def in_thread(job: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Run a job beside the block, and see it end without an error."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job)
        yield running
        running.result(WAIT_S)


@pytest.mark.parametrize("size", [1, 200_000, 3_000_000])
def test_bytes_travel_both_ways_until_each_side_ends(pair: Pair, size: int) -> None:
    server, client = pair
    there, back = pattern(size, 1), pattern(size, 2)

    def serve() -> None:
        assert rest(server) == there
        # The reply after the other's end.
        server.sendall(back)
        server.shutdown(socket.SHUT_WR)

    with in_thread(serve):
        client.sendall(there)
        client.shutdown(socket.SHUT_WR)
        assert rest(client) == back
    assert server.recv(1) == b""
    assert client.recv(1) == b""


def test_the_server_may_end_first(pair: Pair) -> None:
    server, client = pair
    with in_thread(lambda: rest(client)) as read:
        server.sendall(b"all")
        server.shutdown(socket.SHUT_WR)
        assert read.result(WAIT_S) == b"all"
    client.sendall(b"still")
    assert server.recv(10) == b"still"
    with pytest.raises(BrokenPipeError):
        server.sendall(b"no more")


def test_the_end_waits_for_what_is_before_it(pair: Pair) -> None:
    """Else who reads late would be given all of it at once."""
    server, client = pair
    server.sendall(b"one")
    server.sendall(b"two")
    with in_thread(lambda: server.shutdown(socket.SHUT_WR)) as ending:
        assert waits(ending)
        assert rest(client) == b"onetwo"


def test_nothing_to_send_is_not_the_end(pair: Pair) -> None:
    server, client = pair
    with in_thread(lambda: server.recv(10)) as reading:
        client.sendall(b"")
        assert waits(reading)
        client.sendall(b"x")
        assert reading.result(WAIT_S) == b"x"


@pytest.mark.parametrize("seed", range(3))
def test_any_pieces_are_one_stream_each_way(pair: Pair, seed: int) -> None:
    def send(stream: PipeStream, data: bytes, choices: random.Random) -> None:
        while data:
            size = choices.choice((0, 1, 7, 1000, 65_536, 200_000))
            stream.sendall(data[:size])
            data = data[size:]
        stream.shutdown(socket.SHUT_WR)

    def receive(stream: PipeStream, choices: random.Random) -> bytes:
        data = bytearray()
        while part := stream.recv(choices.choice((1, 100, 5000, 65_536, 300_000))):
            data += part
        return bytes(data)

    data = [pattern(700_000, seed + number) for number in range(2)]
    one, two, three, four = (random.Random(f"{seed} {number}") for number in range(4))
    with ThreadPoolExecutor(4) as pool:
        received = [pool.submit(receive, *ends) for ends in zip(pair, (one, two), strict=True)]
        sent = [
            pool.submit(send, pair[1], data[0], three),
            pool.submit(send, pair[0], data[1], four),
        ]
        assert [each.result(WAIT_S) for each in received] == data
        for each in sent:
            each.result(WAIT_S)


@pytest.mark.parametrize("from_client", [True, False])
def test_a_message_without_bytes_is_the_end(kernel: Calls, pair: Pair, from_client: bool) -> None:
    """As go-winio has it, which reads and writes here."""
    ours, theirs = pair if from_client else pair[::-1]
    stop, buffer = kernel.make_event(), memoryview(bytearray(100))
    kernel.write(theirs._pipe, memoryview(b"all"), stop)
    assert ours.recv(100) == b"all"
    kernel.write(theirs._pipe, memoryview(b""), stop)
    assert (ours.recv(100), ours.recv(100)) == (b"", b"")
    ours.sendall(b"still")
    assert bytes(buffer[: kernel.read(theirs._pipe, buffer, stop)]) == b"still"
    ours.shutdown(socket.SHUT_WR)
    assert kernel.read(theirs._pipe, buffer, stop) == 0
    kernel.close(stop)


def test_what_is_there_is_read_without_waiting(pair: Pair) -> None:
    server, client = pair
    buffer = memoryview(bytearray(2))
    assert server.recv_ready(buffer) is None
    client.sendall(b"abc")
    assert (server.recv_ready(buffer), bytes(buffer)) == (2, b"ab")
    assert (server.recv_ready(buffer), bytes(buffer)) == (1, b"cb")
    assert server.recv_ready(buffer) is None
    client.sendall(b"d")
    client.close()
    assert server.recv_ready(buffer) == 1
    with pytest.raises(ConnectionResetError):
        server.recv_ready(buffer)


def test_the_end_is_told_without_waiting_once_it_was_read(pair: Pair) -> None:
    server, client = pair
    client.shutdown(socket.SHUT_WR)
    buffer = memoryview(bytearray(2))
    assert server.recv_ready(buffer) is None
    assert server.recv(1) == b""
    assert server.recv_ready(buffer) == 0


def test_both_directions_at_once(pair: Pair) -> None:
    server, client = pair
    there, back = pattern(2_000_000, 1), pattern(2_000_000, 2)
    with in_thread(lambda: server.sendall(back)), in_thread(lambda: client.sendall(there)):
        with in_thread(lambda: read_exactly(server, len(there))) as first:
            assert read_exactly(client, len(back)) == back
        assert first.result() == there


def read_exactly(stream: PipeStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = stream.recv(size - len(data))
        assert part
        data += part
    return bytes(data)


def test_what_was_written_before_the_close_arrives(pair: Pair) -> None:
    server, client = pair
    server.sendall(b"last words")
    server.close()
    assert client.recv(100) == b"last words"
    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_who_has_left_is_no_half_close(pair: Pair) -> None:
    server, client = pair
    client.close()
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    with pytest.raises(BrokenPipeError):
        server.sendall(b"x")


def test_leaving_after_the_half_close_is_noticed(pair: Pair) -> None:
    server, client = pair
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    with in_thread(server.await_gone) as watching:
        assert waits(watching)
        client.close()
        watching.result(WAIT_S)


@pytest.mark.parametrize("operation", ["read", "write", "flush", "await"])
@pytest.mark.parametrize("how", ["shutdown", "close"])
def test_ending_wakes_who_waits(pair: Pair, operation: str, how: str) -> None:
    server, _ = pair
    if operation == "flush":
        server.sendall(b"not read")
    jobs: dict[str, Callable[[], object]] = {
        "read": lambda: server.recv(1),
        "write": lambda: server.sendall(bytes(10_000_000)),
        "flush": lambda: server.shutdown(socket.SHUT_WR),
        "await": server.await_gone,
    }

    def wait() -> None:
        with pytest.raises(OSError):
            jobs[operation]()

    with in_thread(wait) as waiting:
        assert waits(waiting)
        if how == "shutdown":
            server.shutdown(socket.SHUT_RDWR)
        else:
            server.close()
        waiting.result(WAIT_S)
    with pytest.raises(OSError):
        server.recv(1)
    server.close()
    server.close()


def test_closing_wakes_all_who_accept(listener: PipeListener) -> None:
    def accept() -> None:
        with pytest.raises(OSError, match="closed"):
            listener.accept()

    with in_thread(accept), in_thread(accept), in_thread(accept) as last:
        assert waits(last)
        listener.close()
    with pytest.raises(OSError, match="closed"):
        listener.accept()
    listener.close()


def test_after_closing_nobody_connects(kernel: Calls, name: str, listener: PipeListener) -> None:
    listener.close()
    with pytest.raises(FileNotFoundError):
        connect(kernel, name, 1)


def test_clients_that_leave_at_once_do_no_harm(
    kernel: Calls, name: str, listener: PipeListener
) -> None:
    for _ in range(100):
        connect(kernel, name, WAIT_S).close()
        gone = listener.accept()
        with pytest.raises(ConnectionResetError):
            gone.recv(1)
        gone.close()


def test_connecting_where_nobody_listens(kernel: Calls, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        connect(kernel, name, 1)
