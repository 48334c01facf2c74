"""Hooks over real sockets: what they see, hold, replace and refuse."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable

import pytest
from api_proxy import MakeProxy, Proxy
from stub_engine import Client, eventually, pattern

from wherry.api.downstream import Downstream
from wherry.api.exchange import Exchange, Outcome
from wherry.api.hooks import ClientGone, Hooks, Refusal, Request, Watch
from wherry.api.http import ResponseHead, parse_request
from wherry.api.local import LocalEnd
from wherry.api.messages import AnswerReader, Piece

CREATE = "/containers/create"


def message(client: Client, method: str = "GET") -> tuple[int, str]:
    status, _, body = client.answer(method=method)
    return status, json.loads(body)["message"]


def test_what_a_hook_sees(proxy: Proxy) -> None:
    seen: list[tuple[object, ...]] = []

    def hook(request: Request) -> None:
        assert (b"x-a", b"b") in request.headers
        seen.append((request.method, request.path, request.api_version))
        seen.append((request.params, request.query, request.body))

    proxy.hooks.on("POST", "/containers/{id}/start", hook)
    with proxy.client() as client:
        client.request(
            "POST", "/v1.51/containers/a%2Fb/start?x=1", "X-A: b", "Upgrade: t", body=b""
        )
        client.answer()
    with proxy.client() as client:
        client.request("GET", "/containers/a/start")
        client.request("POST", "/containers/a/stop")
    assert seen == [
        ("POST", "/containers/a/b/start", "1.51"),
        ({"id": "a/b"}, {"x": ["1"]}, None),
    ]


@pytest.mark.parametrize("form", ["length", "chunked", "expect"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_hook_reads_and_replaces_the_body(proxy: Proxy, form: str, replace: bool) -> None:
    def rewrite(request: Request) -> None:
        assert request.body == b'{"Image":"a"}'
        if replace:
            request.replace_body(b'{"Image":"a","More":1}')

    def again(request: Request) -> None:
        assert request.body == wanted

    wanted = b'{"Image":"a","More":1}' if replace else b'{"Image":"a"}'
    proxy.hooks.on("POST", "/echo", rewrite, body_limit=100)
    proxy.hooks.on("POST", "/echo", again)
    with proxy.client() as client:
        if form == "chunked":
            raw = (
                b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                b'5\r\n{"Ima\r\n8\r\nge":"a"}\r\n0\r\n\r\n'
            )
            client.send(raw)
        else:
            raw = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n"
            if form == "expect":
                client.send(raw + b"Expect: 100-continue\r\n\r\n")
                assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
                client.send(b'{"Image":"a"}')
            else:
                raw += b'\r\n{"Image":"a"}'
                client.send(raw)
        assert client.answer()[2] == wanted
        client.request("GET", "/_ping")
        assert client.answer()[2] == b"OK"
    if not replace and form != "expect":
        assert proxy.engine.wire[0].startswith(raw)


def test_a_body_beyond_the_bound(proxy: Proxy) -> None:
    proxy.hooks.on("POST", "/echo", lambda request: None, body_limit=1000)
    with proxy.client() as client:
        client.request("POST", "/echo", body=bytes(1000))
        assert client.answer()[0] == 200
        client.request("POST", "/echo", body=bytes(1001))
        assert message(client) == (413, "wherry: the body is longer than 1000 bytes")
        assert client.rest() == b""
    # More content than the bound, and much more framing than content.
    for chunk in (b"3e9\r\n%s\r\n" % bytes(1001), b"1;%s\r\na\r\n" % (b"x" * 900) * 40):
        with proxy.client() as client:
            client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.send(chunk)
            assert client.answer()[0] == 413
    assert len(proxy.engine.said) == 1


def test_a_refusal_keeps_the_connection(proxy: Proxy) -> None:
    def refuse(request: Request) -> None:
        raise Refusal(409, "port 80 is taken by nginx")

    proxy.hooks.on("POST", "/containers/{id}/start", refuse)
    proxy.hooks.on("POST", CREATE, refuse, body_limit=1000)
    with proxy.client() as client:
        for _ in range(2):
            client.request("POST", "/containers/a/start")
            assert message(client) == (409, "port 80 is taken by nginx")
            client.request("POST", CREATE, body=b"{}")
            assert message(client)[0] == 409
            client.request("GET", "/_ping")
            assert client.answer()[2] == b"OK"
        # Its body was not read, so nothing can follow.
        client.request("POST", "/containers/a/start", body=bytes(1_000_000))
        assert message(client)[0] == 409
        assert client.rest() == b""
    assert [target for _, target in proxy.engine.said] == ["/_ping"] * 2


def test_a_hook_that_fails(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[bool] = []

    def fail(request: Request) -> None:
        raise ValueError("oops")

    proxy.hooks.on("GET", "/bytes", lambda request: Watch(end=ended.append))
    proxy.hooks.on("GET", "/bytes", fail)
    with proxy.client() as client:
        client.request("GET", "/bytes?n=1")
        assert message(client) == (500, "wherry: an internal error: ValueError('oops')")
        client.request("GET", "/_ping")
        assert client.answer()[2] == b"OK"
    assert ended == [False]
    assert len(proxy.engine.said) == 1


def test_a_hook_that_waits_holds_its_own_connection_alone(proxy: Proxy) -> None:
    ready = threading.Event()
    waited: list[bool] = []

    def hold(request: Request) -> None:
        waited.append(request.wait(ready, 10))

    proxy.hooks.on("GET", "/bytes", hold)
    proxy.hooks.on("GET", "/chunked", lambda request: waited.append(request.wait(ready, 0.1)))  # type: ignore[func-returns-value]
    with proxy.client() as client:
        client.request("GET", "/chunked?n=1")
        assert client.answer()[2] == pattern(1)
        assert waited == [False]
        client.request("GET", "/bytes?n=10")
        time.sleep(0.1)
        assert len(proxy.engine.said) == 1
        proxy.ping()
        ready.set()
        assert client.answer()[2] == pattern(10)
    assert waited == [False, True]


def test_a_client_that_leaves_while_a_hook_waits(proxy: Proxy) -> None:
    gone = threading.Event()

    def hold(request: Request) -> None:
        try:
            request.wait(threading.Event(), 30)
        except ClientGone:
            gone.set()
            raise

    proxy.hooks.on("GET", "/bytes", hold)
    client = proxy.client()
    client.request("GET", "/bytes?n=1")
    time.sleep(0.05)
    client.sock.close()
    assert gone.wait(2)
    eventually(lambda: proxy.endpoint.counters.active == 0)
    assert not proxy.engine.said


class Held:
    """A watch's part that waits until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.calls: list[object] = []

    def __call__(self, value: object) -> None:
        self.calls.append(value)
        assert self.let_go.wait(10)


FORMS = ["/bytes?n=0", "/bytes?n=100000", "/chunked?n=5000", "/close?n=3000", "/status?code=204"]


@pytest.mark.parametrize("target", FORMS)
def test_the_head_is_held(proxy: Proxy, target: str) -> None:
    held = Held()
    proxy.hooks.on("GET", target.split("?")[0], lambda request: Watch(head=held))
    with proxy.client() as client:
        client.request("GET", target)
        eventually(lambda: bool(held.calls))
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.more()
        client.sock.settimeout(10)
        held.let_go.set()
        assert client.answer()[0] in (200, 204)
    (head,) = held.calls
    assert isinstance(head, ResponseHead)
    assert (b"server", b"Docker/28.5.2 (linux)") in head.headers


@pytest.mark.parametrize("target", FORMS)
def test_the_end_is_held(proxy: Proxy, target: str) -> None:
    held = Held()
    proxy.hooks.on("GET", target.split("?")[0], lambda request: Watch(end=held))
    with proxy.client() as client:
        client.request("GET", target)
        eventually(lambda: bool(held.calls))
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.answer()
        client.sock.settimeout(10)
        assert held.calls == [True]
        held.let_go.set()
        client.rest() if "close" in target else client.more()
        assert held.calls == [True]


def test_an_answer_is_whole_though_its_client_leaves_at_the_last_line(proxy: Proxy) -> None:
    ended, last = list[bool](), pattern(3000).rpartition(b"\n")[2]

    def line(text: bytes) -> None:
        if text == last:
            raise ClientGone

    proxy.hooks.on("GET", "/close", lambda request: Watch(line=line, end=ended.append))
    with proxy.client() as client:
        client.request("GET", "/close?n=3000")
        eventually(lambda: bool(ended))
        assert ended == [True]


def test_the_last_line_is_held_though_only_the_stream_ends_it(proxy: Proxy) -> None:
    """Until ``end`` has returned."""
    held, lines, body = Held(), list[bytes](), pattern(3000)
    proxy.hooks.on("GET", "/close", lambda request: Watch(line=lines.append, end=held))
    with proxy.client() as client:
        client.request("GET", "/close?n=3000")
        eventually(lambda: bool(held.calls))
        last = body.rpartition(b"\n")[2]
        assert lines[-1] == last
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.rest()
        assert client.buffer.endswith(body[: -len(last)])
        client.sock.settimeout(10)
        held.let_go.set()
        client.until(b"\r\n\r\n")
        assert client.rest() == body


@pytest.mark.parametrize("upgrade", [("Upgrade: tcp",), ()])
def test_the_end_of_a_raw_stream_is_held(proxy: Proxy, upgrade: tuple[str, ...]) -> None:
    held, heads = Held(), []
    proxy.hooks.on("POST", "/exec/{id}/start", lambda request: Watch(head=heads.append, end=held))
    with proxy.client() as client:
        client.request("POST", "/exec/e/start", *upgrade, body=b"{}")
        client.until(b"\r\n\r\n")
        client.send(b"hello")
        assert client.take(5) == b"hello"
        assert not held.calls
        client.sock.shutdown(1)
        # All the output comes, only the end does not.
        assert client.take(5) == b"<end>"
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.more()
        client.sock.settimeout(10)
        held.let_go.set()
        assert client.rest() == b""
    assert held.calls == [True]
    assert [head.status for head in heads] == [101 if upgrade else 200]


def test_events_are_held_one_by_one(proxy: Proxy) -> None:
    ready = threading.Event()
    lines: list[bytes] = []

    def watch(request: Request) -> Watch:
        def line(text: bytes) -> None:
            lines.append(text)
            if json.loads(text)["Action"] == "die":
                request.wait(ready, 10)

        return Watch(line=line)

    proxy.hooks.on("GET", "/events", watch)
    with proxy.client() as client, proxy.client() as other:
        for number, each in enumerate((client, other), start=1):
            each.request("GET", "/v1.51/events")
            each.until(b"\r\n\r\n")
            eventually(lambda number=number: len(proxy.engine.events) == number)
        for tell in proxy.engine.events:
            tell(b'{"Action":"start"}\n')
        assert client.until(b"\n\r\n") == b'13\r\n{"Action":"start"}\n\r\n'
        # Two events in one chunk, the second one cut in two.
        proxy.engine.events[0](b'{"Action":"create"}\n{"Action":"d')
        proxy.engine.events[0](b'ie"}\n')
        assert client.until(b"\n") == b"20\r\n"
        assert client.until(b"\n") == b'{"Action":"create"}\n'
        eventually(lambda: b'{"Action":"die"}' in lines)
        proxy.engine.events[0](b'{"Action":"destroy"}\n')
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.more()
        client.sock.settimeout(10)
        ready.set()
        client.until(b'{"Action":"destroy"}\n')
        assert other.until(b"\n\r\n") == b'13\r\n{"Action":"start"}\n\r\n'
    eventually(lambda: proxy.endpoint.counters.active == 0)


def test_the_result_of_wait_is_held(proxy: Proxy) -> None:
    held, ended = Held(), []
    proxy.hooks.on("POST", "/containers/{id}/wait", lambda _: Watch(line=held, end=ended.append))
    with proxy.client() as client:
        client.request("POST", "/containers/a/wait?condition=next-exit")
        # The head tells the client that the engine watches: that must not be held.
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        proxy.engine.exit.set()
        eventually(lambda: held.calls == [b'{"StatusCode":7}'])
        assert not client.buffer
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.more()
        client.sock.settimeout(10)
        held.let_go.set()
        assert b"".join(client.chunks()) == b'{"StatusCode":7}\n'
    assert ended == [True]


@pytest.mark.parametrize("other", [b'{"StatusCode":7,"Error":{"Message":"lost"}}', b"{}"])
def test_the_result_of_wait_is_replaced(proxy: Proxy, other: bytes) -> None:
    proxy.hooks.on("POST", "/containers/{id}/wait", lambda _: Watch(line=lambda line: other))
    with proxy.client() as client:
        client.request("POST", "/containers/a/wait?condition=next-exit")
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        proxy.engine.exit.set()
        assert b"".join(client.chunks()) == other + b"\n"
        # The connection is as good as before.
        client.request("GET", "/_ping")
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")


def replaced(chunks: list[bytes]) -> bytes:
    """What a client gets of an answer in these pieces when its first line is replaced."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    request = parse_request(b"POST /containers/a/wait HTTP/1.1\r\nHost: docker\r\n\r\n")
    first = iter([b"other"])
    exchange = Exchange(request, [Watch(line=lambda line: next(first, None))])
    found = b""
    for chunk in (head, *chunks):
        for part in exchange.release(memoryview(chunk)):
            found += bytes(part)
    assert found.startswith(head)
    assert exchange.outcome is Outcome.DONE
    return found.removeprefix(head)


def test_a_replaced_line_has_a_framing_of_its_own_however_it_comes() -> None:
    whole = b"3\r\nfir\r\n5\r\nst\nse\r\n6\r\ncond\nt\r\n0\r\n\r\n"
    pieces = [[whole[:cut], whole[cut:]] for cut in range(1, len(whole))]
    for each in (*pieces, [whole], [whole[at : at + 1] for at in range(len(whole))]):
        reader = AnswerReader(
            parse_request(b"POST / HTTP/1.1\r\nHost: docker\r\n\r\n"), want_content=True
        )
        reader.receive(
            memoryview(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + replaced(each))
        )
        content = b""
        while (item := reader.next()) is not None:
            if isinstance(item, Piece):
                content += b"".join(bytes(item.data[a:b]) for a, b in item.content or ())
        assert reader.done
        assert content == b"other\nsecond\nt", each


def test_a_watch_refuses_an_answer(proxy: Proxy) -> None:
    def refuse(head: ResponseHead) -> None:
        if head.status == 200:
            raise Refusal(503, "not with this answer")

    ended: list[bool] = []
    proxy.hooks.on("GET", "/bytes", lambda request: Watch(head=refuse, end=ended.append))
    with proxy.client() as client:
        client.request("GET", "/bytes?n=1000000")
        assert message(client) == (503, "not with this answer")
        assert client.rest() == b""
    eventually(lambda: ended == [False])


def test_watches_that_fail(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object) -> None:
        raise ValueError("oops")

    proxy.hooks.on("GET", "/bytes", lambda request: Watch(head=fail))
    proxy.hooks.on("GET", "/chunked", lambda request: Watch(line=fail, end=fail))
    with proxy.client() as client:
        client.request("GET", "/chunked?n=5000")
        assert client.answer()[2] == pattern(5000)
        client.request("GET", "/bytes?n=5000")
        assert message(client)[0] == 500
    assert "oops" in caplog.text


@pytest.mark.parametrize(
    ("target", "act"),
    [
        ("/never", lambda proxy, client: client.sock.close()),
        ("/never", lambda proxy, client: proxy.engine.cut_all()),
        ("/never", lambda proxy, client: proxy.streams[0].cut()),
        ("/break?n=100000", lambda proxy, client: None),
        ("/hangup", lambda proxy, client: None),
    ],
)
def test_every_watch_learns_of_the_end_once(
    proxy: Proxy, target: str, act: Callable[[Proxy, Client], None]
) -> None:
    ended: list[bool] = []
    proxy.hooks.on("GET", target.split("?")[0], lambda request: Watch(end=ended.append))
    with proxy.client() as client:
        client.request("GET", target)
        eventually(lambda: bool(proxy.engine.said))
        act(proxy, client)
        eventually(lambda: ended == [False])
    eventually(lambda: proxy.endpoint.counters.active == 0)
    assert ended == [False]


def test_a_download_that_is_watched(proxy: Proxy) -> None:
    ended: list[bool] = []
    proxy.hooks.on("GET", "/chunked", lambda request: Watch(end=ended.append))
    with proxy.client() as client:
        for _ in range(3):
            client.request("GET", "/chunked?n=5000000&size=32768")
            assert client.answer()[2] == pattern(5_000_000)
    assert ended == [True] * 3


def test_the_tunnels_thread_does_not_wait_for_a_watch() -> None:
    held = Held()
    ours, theirs = socket.socketpair()
    down = Downstream(LocalEnd(ours), lambda job: threading.Thread(target=job).start(), ours.close)
    head = parse_request(b"POST /exec/e/start HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = memoryview(b"HTTP/1.1 101 UPGRADED\r\n\r\n")
    with ours, theirs:
        down.begin(Exchange(head, [Watch(end=held)]))
        assert down.write([answer]) == 0  # a worker is to show it
        down._pass([answer])
        assert down.write([memoryview(b"raw")]) == 3
        start = time.monotonic()
        down.ended(None)
        down.hung_up()
        assert time.monotonic() - start < 1
        eventually(lambda: bool(held.calls))
        assert theirs.recv(100) == bytes(answer) + b"raw"
        theirs.settimeout(0.1)
        with pytest.raises(TimeoutError):
            theirs.recv(100)
        held.let_go.set()
        theirs.settimeout(10)
        assert theirs.recv(100) == b""


def test_closing_the_endpoint_tells_the_watches(make_proxy: MakeProxy) -> None:
    proxy = make_proxy()
    ended: list[bool] = []
    proxy.hooks.on("GET", "/never", lambda request: Watch(end=ended.append))
    with proxy.client() as client:
        client.request("GET", "/never")
        eventually(lambda: bool(proxy.engine.said))
        proxy.endpoint.close()
        assert ended == [False]


def test_closing_the_endpoint_does_not_wait_for_hooks(make_proxy: MakeProxy) -> None:
    proxy = make_proxy(hooks=Hooks())
    entered = threading.Event()

    def hold(request: Request) -> Watch:
        def wait(_: object) -> None:
            entered.set()
            request.wait(threading.Event(), 30)

        return Watch(head=wait)

    proxy.hooks.on("GET", "/bytes", hold)
    with proxy.client() as client:
        client.request("GET", "/bytes?n=1")
        assert entered.wait(5)
        start = time.monotonic()
        proxy.endpoint.close()
        assert time.monotonic() - start < 2
        client.rest()
