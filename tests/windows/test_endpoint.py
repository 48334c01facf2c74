"""The endpoint on a named pipe, over a stub of the engine; with a real client of Docker's."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest
from stub_engine import Client, SocketStream, StubEngine, eventually, pattern

from wherry.api.hooks import Hooks, Watch
from wherry.api.server import Endpoint
from wherry.core.errors import TunnelError
from wherry.platform.windows.kernel import Kernel
from wherry.platform.windows.pipes import PENDING, PipeListener, connect
from wherry.tunnel.stream import Stream

from .conftest import WAIT_S

pytestmark = pytest.mark.windows


class Served:
    """An endpoint, and the engine behind it."""

    def __init__(self, kernel: Kernel, name: str, directory: Path, **options: Any) -> None:
        self.engine = StubEngine(directory / "engine")
        self.hooks = Hooks()
        self.streams: list[SocketStream] = []
        self._kernel = kernel
        self._name = name
        self.listener = PipeListener(kernel, name)
        self.endpoint = Endpoint(self.listener, self._open, hooks=self.hooks, **options)
        self.endpoint.start()

    def _open(self) -> Stream:
        try:
            stream = SocketStream(self.engine.connect())
        except OSError as error:
            raise TunnelError(f"nothing answers: {error}") from error
        self.streams.append(stream)
        return stream

    def client(self) -> Client:
        return Client(connect(self._kernel, self._name, WAIT_S))

    def hasty_client(self) -> Client:
        """One that does not wait for an instance of the pipe."""
        return Client(connect(self._kernel, self._name, 0.0))

    def sdk(self) -> docker.APIClient:
        address = self._name.replace("\\", "/")
        return docker.APIClient(base_url=f"npipe://{address}", version="1.47", timeout=WAIT_S)

    def close(self) -> None:
        self.engine.exit.set()
        self.endpoint.close()
        for stream in self.streams:
            stream.close()
        self.engine.stop()


Serve = Callable[..., Served]


@pytest.fixture
def serve(kernel: Kernel, name: str, tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as made:

        def make(**options: Any) -> Served:
            served = Served(kernel, name, tmp_path, **options)
            made.callback(served.close)
            return served

        yield make
    left = [each.name for each in threading.enumerate() if each.name.startswith("endpoint")]
    assert not left


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve()


def test_requests_on_one_connection(served: Served) -> None:
    with served.client() as client:
        for size in (0, 1, 70_000, 3_000_000):
            client.request("GET", "/_ping")
            assert client.answer()[::2] == (200, b"OK")
            client.request("POST", "/echo", body=pattern(size))
            assert client.answer()[2] == pattern(size)
            client.request("GET", f"/chunked?n={size}&size=1000")
            assert client.answer()[2] == pattern(size)
    eventually(lambda: served.endpoint.counters.active == 0)


@pytest.mark.parametrize("seed", range(3))
def test_requests_in_any_pieces(served: Served, seed: int) -> None:
    """And input of a program that was attached to, in as many."""
    choices = random.Random(seed)

    def send(client: Client, data: bytes) -> None:
        while data:
            size = choices.choice((0, 1, 2, 30, 5000, 100_000))
            client.send(data[:size])
            data = data[size:]

    with served.client() as client:
        for number, size in enumerate((0, 1, 3000, 200_000)):
            body = pattern(size, number)
            head = f"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
            send(client, head + body)
            assert client.answer()[::2] == (200, body)
        send(client, b"POST /exec/e/start HTTP/1.1\r\nHost: x\r\nUpgrade: tcp\r\n")
        send(client, b"Connection: Upgrade\r\nContent-Length: 2\r\n\r\n{}")
        assert client.answer()[0] == 101

        def type_in() -> None:
            send(client, pattern(200_000, seed))
            client.sock.shutdown(socket.SHUT_WR)

        with ThreadPoolExecutor(1) as pool:
            typing = pool.submit(type_in)
            assert client.rest() == pattern(200_000, seed) + b"<end>"
            typing.result(WAIT_S)


def test_an_answer_that_ends_with_the_connection(served: Served) -> None:
    with served.client() as client:
        client.request("GET", "/close?n=500000")
        client.until(b"\r\n\r\n")
        assert client.rest() == pattern(500_000)


@pytest.mark.parametrize("headers", [("Upgrade: tcp", "Connection: Upgrade"), ()])
def test_exec_sees_the_end_of_its_input(served: Served, headers: tuple[str, ...]) -> None:
    with served.client() as client:
        client.request("POST", "/exec/e/start?greet=hello", *headers, body=b"{}")
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101" if headers else b"HTTP/1.1 200")
        assert client.take(5) == b"hello"
        client.send(pattern(200_000))
        threading.Timer(0.1, client.sock.shutdown, (socket.SHUT_WR,)).start()
        assert client.rest() == pattern(200_000) + b"<end>"


def test_input_is_read_after_the_output_has_ended(served: Served) -> None:
    with served.client() as client:
        client.request("POST", "/exec/e/start?half=1", "Upgrade: tcp", body=b"{}")
        assert client.answer()[0] == 101
        assert client.rest() == b""
        client.send(b"more")
        client.sock.shutdown(socket.SHUT_WR)
        eventually(lambda: b"more" in served.engine.wire[-1])


def test_a_client_that_leaves_cancels(served: Served) -> None:
    with served.client() as client:
        client.request("GET", "/never")
        eventually(lambda: ("GET", "/never") in served.engine.said)
    assert served.engine.cancelled.wait(WAIT_S)
    eventually(lambda: served.endpoint.counters.active == 0)


def test_a_client_that_leaves_after_its_half_close_is_noticed(served: Served) -> None:
    """Though the engine has nothing to write, so that nobody could fail to."""
    with served.client() as client:
        client.request("POST", "/containers/c/wait")
        client.until(b"\r\n\r\n")
        client.sock.shutdown(socket.SHUT_WR)
    eventually(lambda: served.endpoint.counters.active == 0, timeout_s=WAIT_S / 2)


def test_watched_answers(served: Served) -> None:
    ended: list[bool] = []
    served.hooks.on("GET", "/bytes", lambda request: Watch(end=ended.append))
    with served.client() as client:
        for _ in range(3):
            client.request("GET", "/bytes?n=500000")
            assert client.answer()[2] == pattern(500_000)
    assert ended == [True] * 3


def test_an_engine_that_is_gone(served: Served) -> None:
    served.engine.stop()
    with served.client() as client:
        client.request("GET", "/_ping")
        status, _, body = client.answer()
        assert status == 503
        assert "cannot be reached" in json.loads(body)["message"]
    served.engine.start()


def test_a_bad_request_is_answered_though_the_client_goes_on_sending(served: Served) -> None:
    with served.client() as client:
        client.send(b"GET / HTTP/1.1\nHost: x\n\n" + bytes(30_000))
        assert client.answer()[0] == 400
        assert client.rest() == b""


def test_who_does_not_read_that_is_not_waited_for(served: Served) -> None:
    with served.client() as client:
        client.send(b"GET / HTTP/1.1\nHost: x\n\n")
        counters = lambda: served.endpoint.counters  # noqa: E731
        eventually(lambda: counters().connections == 1 and not counters().active, timeout_s=10)


def test_closing_ends_what_is_open(served: Served) -> None:
    clients = [served.client() for _ in range(20)]
    for client in clients:
        client.request("GET", "/never")
    eventually(lambda: served.endpoint.counters.active == 20)
    begin = time.monotonic()
    served.endpoint.close()
    assert time.monotonic() - begin < 4
    for client in clients:
        client.rest()
        client.sock.close()
    eventually(lambda: served.endpoint.counters.active == 0)


def test_50_clients_at_once(served: Served) -> None:
    def ask(number: int) -> None:
        with served.client() as client:
            for _ in range(3):
                client.request("POST", "/echo", body=pattern(20_000, number))
                assert client.answer()[2] == pattern(20_000, number)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(ask, range(50)))


def test_200_connections_at_once(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.client()) for _ in range(200)]
        for _ in range(2):
            for number, client in enumerate(clients):
                client.request("POST", "/echo", body=pattern(1000, number))
            for number, client in enumerate(clients):
                assert client.answer()[::2] == (200, pattern(1000, number))
            assert served.endpoint.counters.active == 200
            assert len(served.listener._pending) == PENDING
    eventually(lambda: served.endpoint.counters.active == 0)
    assert served.endpoint.counters.connections == 200


def test_clients_beyond_the_limit_are_told_so(serve: Serve) -> None:
    """None of those that come at one moment finds all instances taken, or is hung up on."""
    served = serve(limit=3)
    burst = PENDING - 4
    together = threading.Barrier(burst)

    def ask(number: int) -> tuple[int, str, str]:
        together.wait(WAIT_S)
        with served.hasty_client() as client:
            client.request("POST", "/echo", body=pattern(100_000, number))
            status, headers, body = client.answer()
            assert client.rest() == b""
        return status, headers["connection"], json.loads(body)["message"]

    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(served.client()) for _ in range(3)]
        for client in kept:
            client.request("GET", "/_ping")
            assert client.answer()[0] == 200
        why = "wherry: there are already 3 connections to the engine"
        with ThreadPoolExecutor(burst) as pool:
            for _ in range(3):
                assert set(pool.map(ask, range(burst))) == {(503, "close", why)}
        with pytest.raises(docker.errors.APIError, match=why):
            served.sdk().ping()
        assert served.endpoint.counters.refused == 3 * burst + 1
        assert len(served.listener._pending) == PENDING
        assert len(served.engine.said) == 3
        for client in kept:
            client.request("GET", "/_ping")
            assert client.answer()[0] == 200
    eventually(lambda: served.endpoint.counters.active == 0)
    with served.client() as client:
        client.request("GET", "/_ping")
        assert client.answer()[0] == 200


def test_clients_beyond_the_limit_that_ask_nothing_are_in_nobody_s_way(serve: Serve) -> None:
    served = serve(limit=0)
    with contextlib.ExitStack() as stack:
        silent = []
        for number in range(2 * PENDING):
            silent.append(stack.enter_context(served.hasty_client()))
            eventually(lambda number=number: served.endpoint.counters.refused > number)
        with served.hasty_client() as client:
            client.request("GET", "/_ping")
            assert client.answer()[0] == 503
        threads = [each for each in threading.enumerate() if each.name.startswith("endpoint")]
        assert len(threads) <= 6
        for each in silent:
            assert each.answer()[0] == 503
        eventually(lambda: not served.endpoint._refusals._clients)


def test_a_head_has_a_time_by_which_it_is_whole(serve: Serve) -> None:
    served = serve(head_timeout_s=1.0)
    with served.client() as idle, served.client() as client:
        client.request("GET", "/_ping")
        assert client.answer()[0] == 200
        client.send(b"GET /_ping HTTP/1.1\r\n")
        assert client.rest() == b""
        idle.request("GET", "/_ping")
        assert idle.answer()[0] == 200


def test_dockers_own_library(served: Served) -> None:
    client = served.sdk()
    assert client.ping()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: served.sdk().ping(), range(24)))
    with pytest.raises(docker.errors.NotFound):
        client.inspect_container("nonsense")
    # A hijacked connection, as `docker exec -i` has it.
    stream = client.exec_start("e", socket=True)
    stream.sendall(pattern(100_000))
    got = bytearray()
    while len(got) < 100_000:
        got += stream.recv(65536)
    assert got == pattern(100_000)
    stream.close()
    threading.Timer(0.2, lambda: served.engine.events[0](b'{"status":"start"}\n')).start()
    events = client.events(decode=True)
    assert next(events) == {"status": "start"}
    events.close()
    client.close()
