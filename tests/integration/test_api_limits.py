"""The endpoint under stress: malformed requests, slow readers, pipes without a descriptor."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from api_proxy import MakeProxy, PipeListener, Proxy
from fake_pipes import FakePipes
from scripted_engine import served
from stub_engine import Client, eventually, pattern

from wherry.api import refusals, server
from wherry.api.hooks import Hooks, Request, Watch
from wherry.api.http import HEAD_LIMIT_BYTES
from wherry.api.local import LocalEnd
from wherry.api.server import CONNECTION_LIMIT, Endpoint
from wherry.platform import current
from wherry.platform.windows import pipes

BAD = [
    b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0",
    b"GET /a HTTP/1.1\nHost: x\n\n",
    b"GET /_ping HTTP/1.1\r\nHost: x\n\n",
    b"GET /_ping HTTP/1.1\r\nHost: x\r\n\n",
    b"GET /\0 HTTP/1.1\r\nHost: x\n\n",
    b"GET /a HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: x\r\nX: " + b"y" * HEAD_LIMIT_BYTES,
    b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    b"G@T /a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /a HTTP/3.0\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("data", BAD)
def test_a_malformed_request_reaches_no_engine(proxy: Proxy, data: bytes) -> None:
    with proxy.client() as client:
        client.request("GET", "/_ping")
        client.answer()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(data)
        status, headers, body = client.answer()
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(body)["message"].startswith("wherry: bad request: ")
        assert client.rest() == b""
    eventually(lambda: proxy.engine.connections == 0)
    assert len(proxy.engine.said) == 1
    assert proxy.engine.wire[0].count(b"\r\n\r\n") == 1


def test_a_malformed_request_after_head_gets_a_whole_answer(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("HEAD", "/_ping")
        assert client.answer(method="HEAD")[0] == 200
        client.send(b"GET /a HTTP/1.1\nHost: x\n\n")
        status, _, body = client.answer()
        assert status == 400
        assert json.loads(body)


def test_a_long_head_goes_through_and_is_not_kept(proxy: Proxy) -> None:
    """X-Registry-Config has the credentials for all registries of a user."""
    with proxy.client() as client:
        client.request("POST", "/echo", "X-Registry-Config: " + "e" * 1_000_000, body=b"context")
        assert client.answer()[::2] == (200, b"context")
        assert b"e" * 1_000_000 + b"\r\n" in proxy.engine.wire[0]
        for connection in proxy.endpoint._connections:
            eventually(lambda down=connection._down: down._exchange is None)


MUCH = bytes(1_000_000)
HALF = b"GET /_ping HTTP/1.1\r\nHost: x\r\nX-Registry-Config: "


@pytest.mark.parametrize("earlier", [0, 4])
def test_a_head_has_a_time_by_which_it_is_whole(make_proxy: MakeProxy, earlier: int) -> None:
    """From its first byte on; a client that asks nothing has all the time."""
    proxy = make_proxy(head_timeout_s=1.0)
    with proxy.client() as client, proxy.client() as idle:
        for _ in range(earlier):
            client.send(HALF)
            time.sleep(0.3)
            client.send(b"e\r\n\r\n")
            assert client.answer()[0] == 200
        begun = time.monotonic()
        client.send(HALF)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(2):
                time.sleep(0.3)
                client.send(b"e")
        assert client.rest() == b""
        assert 0.9 < time.monotonic() - begun < 5
        eventually(lambda: proxy.endpoint.counters.active == 1)
        idle.request("GET", "/_ping")
        assert idle.answer()[0] == 200


def test_the_time_of_a_head_on_a_pipe(proxy: Proxy, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    endpoint = Endpoint(PipeListener(path), proxy.open_stream, head_timeout_s=1.0)
    endpoint.start()
    try:
        with Client(path) as client:
            client.request("GET", "/_ping")
            assert client.answer()[0] == 200
            client.send(HALF)
            time.sleep(0.1)
            client.send(b"e\r\n\r\n")
            assert client.answer()[0] == 200
            time.sleep(1.2)
            client.send(HALF)
            assert client.rest() == b""
        eventually(lambda: endpoint.counters.active == 0)
    finally:
        endpoint.close()


def test_long_heads_that_are_not_whole_share_a_room(proxy: Proxy) -> None:
    """Who finds none is told so; what is whole gives its room back, as does who leaves."""
    size = 1_000_000
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(proxy.client()) for _ in range(30)]
            for client in clients:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.send(HALF + b"e" * size)
            eventually(lambda: proxy.endpoint._room._left < 1 << 20)
            eventually(lambda: proxy.endpoint.counters.active <= 17)
            held = sum(each._reader.held for each in list(proxy.endpoint._connections))
            assert held <= (16 << 20) + 30 * (64 << 10)
            proxy.ping()
            told = [each for each in clients if select.select([each.sock], [], [], 0.01)[0]]
            assert 12 <= len(told) <= 16
            for client in told:
                status, headers, body = client.answer()
                assert (status, headers["connection"]) == (503, "close")
                assert "not gone on" in json.loads(body)["message"]
        eventually(lambda: proxy.endpoint.counters.active == 0)
        assert proxy.endpoint._room._left == 16 << 20
    with proxy.client() as client:
        for _ in range(20):
            client.send(HALF + b"e" * size)
            client.send(b"\r\n\r\n")
            assert client.answer()[0] == 200
            eventually(lambda: proxy.endpoint._room._left == 16 << 20)


@pytest.mark.parametrize(
    ("wire", "least", "most"),
    [
        (HALF + b"e" * 1_000_000 + b"\r\n\r\n", 12, 18),
        # Its body is held as it came, and as it is read.
        (b"GET /_ping HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + MUCH, 7, 9),
    ],
    ids=["heads", "bodies"],
)
def test_long_requests_that_wait_for_a_hook_share_the_room(
    proxy: Proxy, wire: bytes, least: int, most: int
) -> None:
    ready, waiting = threading.Event(), list[Request]()

    def hook(request: Request) -> None:
        waiting.append(request)
        request.wait(ready, 20)

    proxy.hooks.on("GET", "/_ping", hook, body_limit=len(MUCH))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(30)]
        for client in clients:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.send(wire)
        eventually(lambda: proxy.endpoint.counters.connections == 30)
        eventually(lambda: proxy.endpoint.counters.active == len(waiting))
        number = len(waiting)
        assert least <= number <= most
        ready.set()
        answered = [client.answer()[0] for client in clients]
        assert (answered.count(200), answered.count(503)) == (number, 30 - number)
    eventually(lambda: proxy.endpoint._room._left == 16 << 20)


@pytest.mark.parametrize(
    ("hooked", "ahead", "raw"),
    [
        (False, b"", False),
        (True, b"", False),
        (False, b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n", False),
        (False, b"", True),
        (True, b"input", True),
    ],
    ids=["alone", "watched", "more-sent-ahead", "raw", "raw-and-watched"],
)
def test_long_heads_that_have_gone_on_are_let_go_of(hooked: bool, ahead: bytes, raw: bool) -> None:
    """While the engine thinks about them, whoever watches that; nor while a raw stream is open."""
    number = 32
    head = b"POST /exec/e/start HTTP/1.1\r\nHost: x\r\nUpgrade: tcp\r\nX-Registry-Config: "
    head += b"e" * 1_000_000 + b"\r\n\r\n"
    upgraded = b"HTTP/1.1 101 UPGRADED\r\n\r\n"
    hooks = Hooks()

    def hook(request: Request) -> Watch:
        assert len(request.headers) == 3
        return Watch(end=lambda complete: request.wait(threading.Event(), 0.0) and None)

    if hooked:
        hooks.on("POST", "{any}", hook, body_limit=100)
    tracemalloc.start()
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(number):
                client, stream = stack.enter_context(served(hooks))
                client.send(head + ahead)
                stream.expect(head)
                if raw:
                    stream.feed(upgraded)
                    assert client.take(len(upgraded)) == upgraded
                    stream.expect(ahead)
            eventually(lambda: tracemalloc.get_traced_memory()[0] < number * len(head) / 10)
    finally:
        tracemalloc.stop()


def test_a_malformed_chunk(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.send(b"5\r\nhello\r\n")
        eventually(lambda: proxy.engine.wire and proxy.engine.wire[0].endswith(b"hello\r\n"))
        client.send(b"5\nworld\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.answer()[0] == 400
        assert client.rest() == b""
    eventually(lambda: proxy.engine.connections == 0)
    assert b"smuggled" not in proxy.engine.wire[0]


def test_the_last_connection_within_the_limit_and_a_burst_beyond_it(make_proxy: MakeProxy) -> None:
    """Many more than are answered at once, and nobody is only hung up on."""
    if current().raise_descriptor_limit(6 * CONNECTION_LIMIT) < 6 * CONNECTION_LIMIT:
        pytest.skip("both ends and the engine's are in this process")
    proxy = make_proxy(limit=CONNECTION_LIMIT)
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(proxy.client()) for _ in range(CONNECTION_LIMIT)]
        for client in kept:
            client.request("GET", "/_ping")
        assert [client.answer()[0] for client in kept] == [200] * CONNECTION_LIMIT
        burst = [stack.enter_context(proxy.client()) for _ in range(300)]
        for client in burst:
            client.request("GET", "/_ping")
        for client in burst:
            status, headers, body = client.answer()
            assert (status, headers["connection"]) == (503, "close")
            assert "512 connections" in json.loads(body)["message"]
            assert client.rest() == b""
            client.sock.close()
        assert proxy.endpoint.counters.refused == 300
        kept.pop().sock.close()
        eventually(lambda: proxy.endpoint.counters.active == CONNECTION_LIMIT - 1)
        proxy.ping()
        kept[0].request("GET", "/_ping")
        assert kept[0].answer()[0] == 200


def test_clients_beyond_the_limit_that_ask_nothing_delay_nobody(make_proxy: MakeProxy) -> None:
    """They are answered when a moment has passed, or too many others have come after them."""
    number = refusals.MOST + 200
    if current().raise_descriptor_limit(4 * number) < 4 * number:
        pytest.skip("both ends are in this process")
    proxy = make_proxy(limit=1)
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(proxy.client())
        kept.request("GET", "/_ping")
        kept.answer()
        silent = []
        for _ in range(number):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(proxy.path))  # which waits for room in the system's queue
            silent.append(client)
        eventually(lambda: proxy.endpoint.counters.refused == number)
        assert len(proxy.endpoint._refusals._clients) <= refusals.MOST
        last = stack.enter_context(proxy.client())
        begun = time.monotonic()
        last.request("GET", "/_ping")
        assert last.answer()[0] == 503
        assert time.monotonic() - begun < 1
        threads = [each for each in threading.enumerate() if each.name.startswith("endpoint")]
        assert len(threads) <= 6
        for client in silent:
            client.settimeout(5)
            assert Client(client).answer()[0] == 503
        assert time.monotonic() - begun < 10
        eventually(lambda: not proxy.endpoint._refusals._clients)
        assert proxy.endpoint.counters.refused == number + 1
        # These are still being refused when the endpoint closes.
        late = [stack.enter_context(proxy.client()) for _ in range(50)]
        eventually(lambda: proxy.endpoint.counters.refused == number + 51)
        assert proxy.endpoint._refusals._clients
        begun = time.monotonic()
        proxy.endpoint.close()
        assert time.monotonic() - begun < 2
        for each in late:
            with contextlib.suppress(ConnectionResetError):
                each.rest()


def test_one_that_cannot_be_refused_is_in_nobody_s_way(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a system sets no option of a socket whose client has left."""
    proxy = make_proxy(limit=0)

    class Gone(LocalEnd):
        def __init__(self, local: Any) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(server, "LocalEnd", Gone)
            with proxy.client() as client:
                assert client.rest() == b""
    with proxy.client() as client:
        client.request("GET", "/_ping")
        assert client.answer()[0] == 503


def test_a_helper_that_fails_is_followed_by_another(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(self: refusals.Refusals) -> bool:
        failed.set()
        raise RuntimeError("a fault of ours")

    proxy = make_proxy(limit=0)
    with proxy.client() as first:
        with monkeypatch.context() as patch:
            patch.setattr(refusals.Refusals, "_look_at_all", fail)
            first.send(b"GET")
            assert failed.wait(5)
        eventually(lambda: not proxy.endpoint._refusals._running)
        with proxy.client() as second:
            second.request("GET", "/_ping")
            assert second.answer()[0] == 503
        assert first.answer()[0] == 503


def test_a_client_beyond_the_limit_that_goes_on_sending_reads_its_answer(
    make_proxy: MakeProxy,
) -> None:
    proxy = make_proxy(limit=0)
    with proxy.client() as client:
        client.request("POST", "/echo", body=bytes(1_200_000))
        assert client.answer()[0] == 503
        assert client.rest() == b""
    with proxy.client() as client:
        client.sock.shutdown(socket.SHUT_WR)
        assert client.answer()[0] == 503
        assert client.rest() == b""


def test_a_client_that_is_given_no_time_reads_its_answer_and_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though it has sent more than was looked at: what is unread would make its read fail."""
    monkeypatch.setattr(refusals, "MOST", 0)
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(5)
        ours.sendall(bytes(150_000))
        refusals.Refusals(b"the answer", lambda job: None).add(LocalEnd(theirs))
        assert ours.recv(100) == b"the answer"
        assert ours.recv(100) == b""


def test_without_a_thread_for_it_a_client_is_refused_all_the_same(make_proxy: MakeProxy) -> None:
    def full(job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    proxy = make_proxy(limit=0)
    proxy.endpoint._refusals._spawn = full
    with proxy.client() as client:
        assert client.answer()[0] == 503
    assert not proxy.endpoint._refusals._clients


def test_clients_of_a_pipe_beyond_the_limit_find_an_instance_each(proxy: Proxy) -> None:
    """Though none of them reads what it is told, or leaves."""
    name = r"\\.\pipe\wherry"
    kernel = FakePipes()
    endpoint = Endpoint(pipes.PipeListener(kernel, name), proxy.open_stream, limit=1)
    endpoint.start()
    clients = []
    try:
        for _ in range(4 * pipes.PENDING):
            clients.append(pipes.connect(kernel, name, 0.0))
            eventually(
                lambda: endpoint.counters.connections + endpoint.counters.refused >= len(clients)
            )
        for stream in clients[1:]:
            with contextlib.suppress(BrokenPipeError):
                stream.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert Client(stream).answer()[0] == 503
        threads = [each for each in threading.enumerate() if each.name.startswith("endpoint")]
        assert len(threads) <= 6
    finally:
        for stream in clients:
            stream.close()
        endpoint.close()
    assert kernel.open_handles == 0


def test_a_client_of_a_pipe_beyond_the_limit_is_told_when_it_has_asked() -> None:
    """An answer that comes before is none to Go's clients."""
    name = r"\\.\pipe\wherry"
    kernel = FakePipes()
    listener = pipes.PipeListener(kernel, name)
    refused = refusals.Refusals(b"the answer", lambda job: None)
    client = pipes.connect(kernel, name, 0.0)
    refused.add(LocalEnd(listener.accept()))
    assert refused._look_at_all()
    assert kernel.available(client._pipe) == 0
    client.sendall(b"GET /_ping")
    assert refused._look_at_all()
    assert client.recv(100) == b"the answer"
    client.close()
    assert not refused._look_at_all()
    listener.close()
    assert kernel.open_handles == 0


def test_a_slow_reader_takes_no_memory(proxy: Proxy) -> None:
    """1 GB each way; the engine is in this process as well."""
    size = 1_000_000_000
    step = bytes(1 << 20)

    with proxy.client() as client:
        client.request("POST", "/exec/e/start", "Upgrade: tcp", body=b"")
        client.answer()
        process = psutil.Process()
        buffer = bytearray(1 << 20)
        before = most = process.memory_info().rss
        # The stub echoes, so the bytes go both ways; only the way back is slow.
        left_up, left_down = size, size

        def up() -> None:
            nonlocal left_up
            while left_up:
                part = memoryview(step)[: min(left_up, len(step))]
                client.sock.sendall(part)
                left_up -= len(part)

        client.sock.settimeout(60)
        thread = threading.Thread(target=up)
        thread.start()
        time.sleep(0.5)  # everything between fills up
        while left_down:
            left_down -= client.sock.recv_into(buffer, min(left_down, len(buffer)))
            most = max(most, process.memory_info().rss)
        thread.join()
    assert most - before <= 32_000_000


def test_a_client_on_a_pipe(proxy: Proxy, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    ended: list[bool] = []
    endpoint = Endpoint(PipeListener(path), proxy.open_stream, hooks=proxy.hooks)
    proxy.hooks.on("GET", "/bytes", lambda request: Watch(end=ended.append))
    endpoint.start()
    try:
        with Client(path) as client:
            for _ in range(3):
                client.request("GET", "/_ping")
                assert client.answer()[2] == b"OK"
                client.request("POST", "/echo", body=pattern(500_000))
                assert client.answer()[2] == pattern(500_000)
                client.request("GET", "/bytes?n=500000")
                assert client.answer()[2] == pattern(500_000)
        with Client(path) as client:
            client.request("POST", "/exec/e/start", "Upgrade: tcp", body=b"{}")
            assert client.answer()[0] == 101
            client.send(b"hi\n")
            client.sock.shutdown(1)
            assert client.rest() == b"hi\n<end>"
        with Client(path) as client:
            client.request("GET", "/never")
            eventually(lambda: ("GET", "/never") in proxy.engine.said)
        assert proxy.engine.cancelled.wait(5)
        with Client(path) as client:
            client.request("POST", "/containers/c/wait")
            client.until(b"\r\n\r\n")
            client.sock.shutdown(socket.SHUT_WR)
        # The engine has nothing to say, and no failing write tells that the client has left.
        eventually(lambda: endpoint.counters.active == 0, timeout_s=10)
        proxy.engine.exit.set()
        proxy.engine.stop()
        with Client(path) as client:
            client.request("GET", "/_ping")
            assert client.answer()[0] == 503
        proxy.engine.start()
    finally:
        endpoint.close()
    assert ended == [True] * 3


def test_a_hook_under_many_clients(proxy: Proxy) -> None:
    seen: list[str] = []

    def hook(request: Request) -> Watch:
        seen.append(request.query["n"][0])
        return Watch(head=lambda head: None, end=lambda complete: seen.append("end"))

    proxy.hooks.on("GET", "/bytes", hook)

    def ask(number: int) -> None:
        with proxy.client() as client:
            for _ in range(5):
                client.request("GET", f"/bytes?n={number * 100}")
                assert client.answer()[2] == pattern(number * 100)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 300
    assert seen.count("end") == 150


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system grants less")
def test_clients_that_do_not_wait_are_queued_as_by_the_engine(tmp_path: Path) -> None:
    """However many come before one is accepted: they would get EAGAIN (connect(2))."""
    path = tmp_path / "docker.sock"
    listener = current().listen_local(path)
    try:
        with contextlib.ExitStack() as clients:
            for _ in range(700):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(os.fspath(path))
    finally:
        listener.close()
