"""The endpoint when something fails midway: nobody waits for ever, each gets one answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from api_proxy import MakeProxy, Proxy
from loopback_sshd import LoopbackSshd
from stub_engine import Client, StubEngine, eventually, pattern

from wherry.api.answers import Refusal
from wherry.api.hooks import Request, Watch
from wherry.api.http import ResponseHead
from wherry.api.server import Endpoint
from wherry.core.errors import TunnelError
from wherry.platform import current
from wherry.tunnel.inbox import Inbox
from wherry.tunnel.tunnel import Tunnel

OPEN_S = 1.0
OUTAGE_S = 2.0
CHUNKED = "Transfer-Encoding: chunked"
BAD_CHUNK = b"5\nbad\r\n"


@pytest.fixture
def through_ssh(tmp_path: Path, sshd: LoopbackSshd) -> Iterator[Path]:
    """An endpoint over a real sshd, whose streams may take a second to open; its path."""
    engine = StubEngine(tmp_path / "engine.sock")
    tunnel = Tunnel(sshd.connect)
    tunnel.start()
    tunnel.wait(20)
    path = tmp_path / "docker.sock"
    endpoint = Endpoint(
        current().listen_local(path),
        lambda: tunnel.begin_unix(str(engine.path), timeout_s=OPEN_S),
    )
    endpoint.start()
    yield path
    endpoint.close()
    tunnel.close()
    engine.stop()


def test_a_guest_that_is_silent_for_longer_than_opening_may_take(
    through_ssh: Path, sshd: LoopbackSshd
) -> None:
    sshd.signal_sessions(signal.SIGSTOP)
    try:
        with Client(through_ssh) as client:
            client.request("GET", "/_ping")
            status, _, body = client.answer()
            assert status == 503
            assert "in time" in json.loads(body)["message"]
            assert client.rest() == b""
    finally:
        sshd.signal_sessions(signal.SIGCONT)
    with Client(through_ssh) as client:
        client.request("GET", "/_ping")
        assert client.answer()[0] == 200


def test_a_tunnel_that_stays_down(tmp_path: Path) -> None:
    """Each request gets 503 in time; when the guest is back, the endpoint is, by itself."""
    server, engine = LoopbackSshd(tmp_path / "sshd"), StubEngine(tmp_path / "engine.sock")
    path = tmp_path / "docker.sock"
    tunnel = Tunnel(
        server.connect,
        outage_timeout_s=OUTAGE_S,
        longest_delay_s=OUTAGE_S / 4,
    )
    endpoint = Endpoint(current().listen_local(path), lambda: tunnel.begin_unix(str(engine.path)))

    def refused(client: Client) -> None:
        status, headers, body = client.answer()
        assert (status, headers["content-type"]) == (503, "application/json")
        assert json.loads(body)["message"].startswith("wherry: the engine cannot be reached: ")
        assert client.rest() == b""

    def answers() -> bool:
        with Client(path) as client:
            client.request("GET", "/_ping")
            return client.answer()[0] == 200

    with contextlib.ExitStack() as stack:
        for close in (server.stop, engine.stop, tunnel.close, endpoint.close):
            stack.callback(close)
        tunnel.start()
        tunnel.wait(20)
        endpoint.start()
        assert answers()
        pending, kept, unused = (stack.enter_context(Client(path)) for _ in range(3))
        kept.request("GET", "/_ping")
        assert kept.answer()[0] == 200
        pending.request("GET", "/never")
        eventually(lambda: ("GET", "/never") in engine.said)
        server.stop()
        begun = time.monotonic()
        refused(pending)
        # No request is lost with it: its client sees that it has ended, and makes another one.
        assert kept.rest() == b""
        assert time.monotonic() - begun < OUTAGE_S
        # Streams are told of the end before the tunnel is; who asks in between is refused at once.
        eventually(lambda: tunnel.error)
        for number in (1, 8):
            clients = [stack.enter_context(Client(path)) for _ in range(number)]
            begun = time.monotonic()
            for client in clients:
                client.request("POST", "/echo", body=b"hello")
            for client in clients:
                refused(client)
            # It is waited for once, not by one request after the other, or twice.
            assert 0.8 * OUTAGE_S < time.monotonic() - begun < 1.8 * OUTAGE_S
        waiting = stack.enter_context(Client(path))
        waiting.request("GET", "/_ping")
        server.start()
        assert waiting.answer()[0] == 200
        unused.request("GET", "/_ping")
        assert unused.answer()[0] == 200
        eventually(answers)
        assert tunnel.error is None


def test_a_bad_body_ends_an_answer_that_nobody_reads(through_ssh: Path) -> None:
    with Client(through_ssh) as client:
        client.request("POST", "/bytes?n=30000000", CHUNKED)
        client.until(b"\r\n\r\n")
        time.sleep(0.5)  # the answer fills all buffers, and a worker waits for room
        client.send(BAD_CHUNK)
        assert len(client.rest()) < 30_000_000
    with Client(through_ssh) as client:
        client.request("GET", "/_ping")
        assert client.answer()[0] == 200


def test_a_bad_body_while_the_answer_is_held(proxy: Proxy) -> None:
    def hold(head: ResponseHead) -> None:
        time.sleep(0.5)

    proxy.hooks.on("POST", "/bytes", lambda request: Watch(head=hold))
    with proxy.client() as client:
        client.request("POST", "/bytes?n=30", CHUNKED)
        time.sleep(0.2)
        client.send(BAD_CHUNK)
        assert client.rest().count(b"HTTP/1.1 ") == 1
    proxy.ping()


# -- one answer for each request ---------------------------------------------------------------


def test_a_stream_that_ended_before_it_was_used_is_replaced(proxy: Proxy) -> None:
    with proxy.client() as idle:
        eventually(lambda: len(proxy.streams) == 1)
        proxy.engine.stop()
        proxy.engine.start()
        eventually(lambda: proxy.streams[0]._gone, "the stream's end is not seen")
        proxy.ping()
        idle.request("GET", "/_ping")
        assert idle.answer()[0] == 200
    eventually(lambda: proxy.endpoint.counters.active == 0)
    proxy.problem = TunnelError("an outage")
    with proxy.client() as early:
        eventually(lambda: [each for each in list(proxy.endpoint._connections) if each._down.over])
        proxy.problem = None
        early.request("GET", "/_ping")
        assert early.answer()[0] == 200
    eventually(lambda: proxy.endpoint.counters.active == 0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_stream_that_ended_while_a_hook_took_its_time_is_replaced(
    proxy: Proxy, first: bool, comes_back: bool
) -> None:
    """The engine waits for a first head for five minutes alone."""
    held, ready = threading.Event(), threading.Event()

    def hold(request: Request) -> None:
        held.set()
        request.wait(ready, 10)

    proxy.hooks.on("POST", "/echo", hold, body_limit=100)
    with proxy.client() as client:
        if not first:
            client.request("GET", "/_ping")
            assert client.answer()[0] == 200
        client.request("POST", "/echo", body=b"x")
        assert held.wait(10)
        eventually(lambda: proxy.engine.connections)
        if comes_back:
            proxy.engine.cut_all()
        else:
            proxy.engine.stop()
        eventually(lambda: proxy.streams[0]._gone, "the stream's end is not seen")
        ready.set()
        status, _, body = client.answer()
        assert proxy.streams[0]._closed, "sshd keeps its half"
        assert (status, body == b"x") == ((200, True) if comes_back else (503, False))


def test_a_refused_first_request_keeps_no_dead_stream(proxy: Proxy) -> None:
    def refuse(request: Request) -> None:
        raise Refusal(409, "not now")

    proxy.hooks.on("POST", "/echo", refuse, body_limit=100)
    with proxy.client() as client:
        client.request("POST", "/echo", body=b"x")
        assert client.answer()[0] == 409
        proxy.engine.stop()
        eventually(lambda: proxy.streams[0]._gone, "the stream's end is not seen")
        proxy.engine.start()
        client.request("GET", "/_ping")
        assert client.answer()[0] == 200


def test_hooks_are_not_asked_when_there_is_no_engine(proxy: Proxy) -> None:
    asked = []
    proxy.hooks.on("POST", "/echo", lambda request: asked.append(request), body_limit=100)
    proxy.problem = TunnelError("an outage")
    with proxy.client() as client:
        client.request("POST", "/echo", body=b"x")
        assert client.answer()[0] == 503
    assert not asked


@pytest.mark.parametrize(
    ("spoil", "status"),
    [(lambda proxy, client: client.send(BAD_CHUNK), 400),
     (lambda proxy, client: proxy.engine.cut_all(), 502)],
)  # fmt: skip
def test_a_100_is_no_answer(
    proxy: Proxy, spoil: Callable[[Proxy, Client], None], status: int
) -> None:
    with proxy.client() as client:
        client.request("POST", "/echo", "Expect: 100-continue", CHUNKED)
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        spoil(proxy, client)
        assert client.answer()[0] == status
        assert client.rest() == b""


def test_a_request_that_was_answered_early_gets_no_second_answer(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("POST", "/_ping", CHUNKED)
        assert client.answer()[0] == 200
        client.send(BAD_CHUNK)
        assert client.rest() == b""


def test_a_watch_that_refuses_a_head_sends_no_body(proxy: Proxy) -> None:
    def refuse(head: ResponseHead) -> None:
        raise Refusal(500, "no")

    proxy.hooks.on("HEAD", "/bytes", lambda request: Watch(head=refuse))
    with proxy.client() as client:
        client.request("HEAD", "/bytes?n=3")
        assert client.answer(method="HEAD")[0] == 500
        assert client.rest() == b""


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker CLI")
def test_go_s_client_understands_that_there_are_too_many(make_proxy: MakeProxy) -> None:
    proxy = make_proxy(limit=0)
    env = {**os.environ, "DOCKER_HOST": f"unix://{proxy.path}"}
    for _ in range(5):
        done = subprocess.run(["docker", "ps"], env=env, capture_output=True, text=True)
        assert "there are already 0 connections" in done.stderr
        assert "nsolicited" not in done.stderr


# -- what the system has no more of ---------------------------------------------------------------


def test_without_a_thread_the_client_is_hung_up_on(proxy: Proxy) -> None:
    def full(job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    with proxy.client() as client:
        client.request("GET", "/_ping")
        client.answer()
        for connection in proxy.endpoint._connections:
            connection._down._spawn = full
        client.request("GET", "/bytes?n=30000000")
        # Nobody reads, so a worker would be needed.
        eventually(lambda: proxy.endpoint.counters.active == 0)
        assert len(client.rest()) < 30_000_000
    proxy.ping()


@pytest.mark.parametrize("size", [1, 8, 60, 5000])
def test_a_window_of_small_packets_takes_little_more_than_its_bytes(size: int) -> None:
    window = 2 << 20
    data = pattern(window)
    process = psutil.Process()
    before = process.memory_info().rss
    inbox = Inbox()
    for at in range(0, window, size):
        inbox.feed([memoryview(data)[at : at + size]])
    assert process.memory_info().rss - before < 4 * window
    inbox.close()
    found = bytearray()
    while part := inbox.read(1 << 20):
        found += part
    assert found == data
