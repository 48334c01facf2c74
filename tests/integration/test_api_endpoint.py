"""The endpoint over real sockets, with a stub of the engine behind it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time

import pytest
from api_proxy import MakeProxy, Proxy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stub_engine import eventually, pattern

from wherry.core.errors import TunnelError

# -- what it carries ---------------------------------------------------------------------------


def test_a_kept_connection_carries_every_form_of_answer(proxy: Proxy) -> None:
    with proxy.client() as client:
        for _ in range(2):
            client.request("GET", "/v1.51/_ping")
            assert client.answer()[::2] == (200, b"OK")
            client.request("HEAD", "/_ping")
            assert client.answer(method="HEAD")[1]["content-length"] == "2"
            client.request("GET", "/chunked?n=100000&size=777")
            assert client.answer()[2] == pattern(100000)
            client.request("GET", "/bytes?n=300000")
            assert client.answer()[2] == pattern(300000)
            client.request("POST", "/status?code=204", body=b"")
            assert client.answer()[0] == 204
            client.request("GET", "/status?code=304")
            assert client.answer()[0] == 304
            client.request("POST", "/echo", body=b"hello")
            assert client.answer()[2] == b"hello"
            client.request("DELETE", "/status?code=409")
            assert client.answer()[::2] == (409, b"{}")
    assert len(proxy.streams) == 1
    assert proxy.endpoint.counters.requests == 16


def test_bytes_arrive_as_they_were_sent(proxy: Proxy) -> None:
    request = (
        b"POST /v1.51/echo?b=%2F&a= HTTP/1.1\r\nhost:docker\r\nX-ODD:  spaced \t\r\n"
        b"Transfer-Encoding: Chunked\r\nTrailer: X-Sum\r\nConnection: close\r\n\r\n"
        b"5;ext=1\r\nhello\r\n00006\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
    )
    with proxy.client() as client:
        client.send(request)
        assert client.answer()[2] == b"hello world"
    assert bytes(proxy.engine.wire[0]) == request


def test_trailers_come_through(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("GET", "/trailers")
        assert client.until(b"X-Sum: 12\r\n\r\n").endswith(
            b"3;a=b\r\nabc\r\n0\r\nX-Sum: 12\r\n\r\n"
        )
        client.request("GET", "/_ping")
        assert client.answer()[2] == b"OK"


def test_requests_sent_ahead_are_answered_in_order(proxy: Proxy) -> None:
    wanted = []
    with proxy.client() as client:
        data = b""
        for number in range(30):
            body = b"%d" % number * 100
            wanted.append(body)
            data += b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
                len(body),
                body,
            )
            data += b"GET /chunked?n=%d HTTP/1.1\r\nHost: x\r\n\r\n" % number
            wanted.append(pattern(number))
        client.send(data)
        assert [client.answer()[2] for _ in wanted] == wanted


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_split_of_any_requests(proxy: Proxy, data: st.DataObject) -> None:
    bodies = data.draw(st.lists(st.binary(max_size=300), min_size=1, max_size=6))
    sent = b""
    for body in bodies:
        sent += b"POST /v1.51/echo HTTP/1.1\r\nHost: x\r\n"
        if data.draw(st.booleans()):
            sent += b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        else:
            sent += b"Transfer-Encoding: chunked\r\n\r\n"
            for at in range(0, len(body), 70):
                part = body[at : at + 70]
                sent += b"%x;e=1\r\n%s\r\n" % (len(part), part)
            sent += b"0\r\nX-T: 1\r\n\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=8)))
    with proxy.client() as client:
        for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            client.send(sent[begin:end])
            time.sleep(0.0005)
        assert [client.answer()[2] for _ in bodies] == bodies
    assert bytes(proxy.engine.wire[-1]) == sent


def test_expect_100_continue(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.send(
            b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        )
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        client.send(b"hello")
        assert client.answer()[2] == b"hello"
        client.request("GET", "/_ping")
        assert client.answer()[2] == b"OK"


def test_http_1_0_and_an_answer_that_ends_with_the_stream(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.send(b"GET /close?n=70000 HTTP/1.0\r\n\r\n")
        assert client.answer()[2] == pattern(70000)
        assert client.rest() == b""


def test_large_bodies_both_ways(proxy: Proxy) -> None:
    size = 20_000_000
    data = pattern(size)
    with proxy.client() as client:
        client.request("POST", "/digest", body=data)
        wanted = hashlib.sha256(data).hexdigest().encode()
        assert client.answer()[2] == wanted
        client.send(b"POST /digest HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, size, 32768):
            part = data[at : at + 32768]
            client.send(b"%x\r\n%s\r\n" % (len(part), part))
        client.send(b"0\r\n\r\n")
        assert client.answer()[2] == wanted
        client.request("GET", f"/bytes?n={size}")
        assert client.answer()[2] == data
        client.request("GET", f"/chunked?n={size}&size=32768")
        assert client.answer()[2] == data
    counters = proxy.endpoint.counters
    assert counters.bytes_up > 2 * size
    # They are counted after they were sent.
    eventually(lambda: counters.bytes_down > 2 * size)


def test_a_stream_is_delivered_as_it_comes(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("GET", "/events")
        client.until(b"\r\n\r\n")
        eventually(lambda: bool(proxy.engine.events))
        for number in range(5):
            line = b'{"n":%d}\n' % number
            proxy.engine.events[0](line)
            assert client.until(line + b"\r\n")


# -- raw streams ---------------------------------------------------------------------------------


UPGRADES = [
    ("POST", "/v1.51/containers/c/attach?stdin=1", "tcp"),
    ("POST", "/exec/e/start", "tcp"),
    ("POST", "/session", "h2c"),
    ("POST", "/grpc", "h2c"),
    ("GET", "/containers/c/attach/ws", "websocket"),
]


@pytest.mark.parametrize(("method", "target", "protocol"), UPGRADES)
def test_an_upgrade_and_the_clients_half_close(
    proxy: Proxy, method: str, target: str, protocol: str
) -> None:
    with proxy.client() as client:
        body = b'{"Detach":false}' if "exec" in target else None
        client.request(method, target, "Connection: Upgrade", f"Upgrade: {protocol}", body=body)
        status, headers, _ = client.answer()
        assert (status, headers["upgrade"]) == (101, protocol)
        client.send(b"GET / HTTP/1.1\nnot a request\0\r\n\r\n")
        assert client.until(b"\0\r\n\r\n")
        client.send(b"hi\n")
        client.sock.shutdown(1)
        # The engine answers after it has read the end.
        assert client.rest() == b"hi\n<end>"
    eventually(lambda: proxy.endpoint.counters.active == 0)


@pytest.mark.parametrize("target", ["/containers/a/b/attach", "/v1.24/exec/e/start"])
def test_a_raw_stream_without_an_upgrade(proxy: Proxy, target: str) -> None:
    with proxy.client() as client:
        # The input follows at once, so that it is there before the answer is.
        client.request("POST", target, body=b"{}")
        client.send(b"input\0\n")
        client.sock.shutdown(1)
        head = client.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert client.rest() == b"input\0\n<end>"


def test_the_engines_half_close(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("POST", "/exec/e/start?half=1&greet=bye", "Upgrade: tcp", body=b"")
        assert client.answer()[0] == 101
        assert client.rest() == b"bye"
        client.send(b"after your end")
        client.sock.shutdown(1)
        eventually(lambda: proxy.engine.wire[0].endswith(b"after your end"))


def test_a_refused_attach_leaves_http(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("POST", "/containers/missing/attach", "Upgrade: tcp", body=b"")
        assert client.answer()[::2] == (404, b"no such\r\n")
        assert client.rest() == b""
    assert len(proxy.engine.said) == 1


def test_what_follows_an_answer_until_the_end_reaches_no_engine(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.send(
            b"GET /close?n=10 HTTP/1.1\r\nHost: x\r\n\r\n"
            b"GET /status?code=200 HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert client.answer()[2] == pattern(10)
    eventually(lambda: proxy.endpoint.counters.active == 0)
    assert len(proxy.engine.said) == 1
    assert b"status" not in proxy.engine.wire[0]


# -- ends ------------------------------------------------------------------------------------------


def test_a_client_that_leaves_an_engine_that_takes_nothing_is_noticed(proxy: Proxy) -> None:
    client = proxy.client()
    client.send(b"POST /stuck HTTP/1.1\r\nHost: docker\r\nContent-Length: 100000000\r\n\r\n")
    eventually(lambda: proxy.engine.said)
    client.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.sock.sendall(bytes(100_000_000))
    assert proxy.endpoint.counters.active == 1
    client.sock.close()
    eventually(lambda: proxy.endpoint.counters.active == 0)
    assert proxy.engine.cancelled.wait(5)
    proxy.ping()


@pytest.mark.parametrize("target", ["/never", "/events"])
def test_a_client_that_goes_away_is_gone_for_the_engine(proxy: Proxy, target: str) -> None:
    client = proxy.client()
    client.request("GET", target)
    eventually(lambda: bool(proxy.engine.said))
    assert not proxy.engine.cancelled.wait(0.05)
    client.sock.close()
    start = time.monotonic()
    assert proxy.engine.cancelled.wait(5)
    assert time.monotonic() - start < 1
    eventually(lambda: proxy.endpoint.counters.active == 0)


def test_a_client_that_goes_away_during_a_download(proxy: Proxy) -> None:
    client = proxy.client()
    client.request("GET", "/bytes?n=50000000")
    client.more()
    client.sock.close()
    eventually(lambda: proxy.engine.connections == 0, timeout_s=3)
    eventually(lambda: proxy.endpoint.counters.active == 0, timeout_s=3)


def test_a_client_that_sent_ahead_and_goes_away(proxy: Proxy) -> None:
    client = proxy.client()
    client.request("GET", "/never")
    client.request("GET", "/_ping")
    eventually(lambda: bool(proxy.engine.said))
    client.sock.close()
    assert proxy.engine.cancelled.wait(5)


def test_a_client_that_ends_its_requests_cancels_what_is_pending(proxy: Proxy) -> None:
    """As a local engine has it: Go's server takes the end for the client's leaving."""
    with proxy.client() as client:
        client.request("GET", "/never")
        eventually(lambda: bool(proxy.engine.said))
        client.sock.shutdown(1)
        assert proxy.engine.cancelled.wait(5)


@pytest.mark.parametrize(("target", "status"), [("/break?n=1000", 200), ("/hangup", 502)])
def test_an_engine_that_breaks_off(proxy: Proxy, target: str, status: int) -> None:
    with proxy.client() as client:
        client.request("GET", target)
        head = client.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        rest = client.rest()
        assert (rest == pattern(500)) if status == 200 else ("message" in json.loads(rest))
    proxy.ping()


def test_an_early_answer_while_the_body_is_sent(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.send(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                client.send(bytes(100000))
        assert client.answer()[::2] == (404, b"no")


def test_an_engine_that_restarts(proxy: Proxy) -> None:
    with proxy.client() as idle, proxy.client() as pending:
        idle.request("GET", "/_ping")
        idle.answer()
        pending.request("GET", "/never")
        eventually(lambda: len(proxy.engine.said) == 2)
        proxy.engine.stop()
        assert pending.answer()[0] == 502
        assert idle.rest() == b""
    with proxy.client() as client:
        client.request("GET", "/_ping")
        status, headers, body = client.answer()
        assert (status, headers["connection"]) == (503, "close")
        assert "nothing answers" in json.loads(body)["message"]
    proxy.engine.start()
    proxy.ping()


def test_without_a_tunnel_each_request_gets_503(proxy: Proxy) -> None:
    proxy.problem = TunnelError("there is no connection to the guest")
    for method in ("GET", "HEAD", "POST"):
        with proxy.client() as client:
            client.request(method, "/_ping", body=b"x" if method == "POST" else None)
            status, _, body = client.answer(method=method)
            assert status == 503
            if method != "HEAD":
                assert json.loads(body)["message"].endswith("there is no connection to the guest")
            assert client.rest() == b""
    assert proxy.endpoint.counters.failed == 3
    proxy.problem = None
    proxy.ping()


def test_a_lost_tunnel(proxy: Proxy) -> None:
    with proxy.client() as pending, proxy.client() as midway, proxy.client() as fresh:
        pending.request("GET", "/never")
        midway.request("GET", "/events")
        midway.until(b"\r\n\r\n")
        eventually(lambda: len(proxy.streams) == 3)
        # Else it had asked for nothing either.
        eventually(lambda: ("GET", "/never") in proxy.engine.said)
        for stream in proxy.streams:
            stream.cut()
        assert pending.answer()[0] == 503
        assert midway.rest() == b""
        # Its stream was lost before it had asked for anything, so it gets another one.
        fresh.request("GET", "/_ping")
        assert fresh.answer()[0] == 200
    proxy.ping()


# -- limits ----------------------------------------------------------------------------------


def test_200_connections_of_which_100_listen(proxy: Proxy) -> None:
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(proxy.client()) for _ in range(100)]
        for client in listening:
            client.request("GET", "/events")
        for client in listening:
            client.until(b"\r\n\r\n")
        asking = [stack.enter_context(proxy.client()) for _ in range(100)]
        for _ in range(2):
            for client in asking:
                client.request("GET", "/chunked?n=5000")
            for client in asking:
                assert client.answer()[2] == pattern(5000)
        assert proxy.endpoint.counters.active == 200
        # It is counted after the last bytes were sent.
        eventually(lambda: proxy.endpoint.counters.in_flight == 0)
        eventually(lambda: len(proxy.engine.events) == 100)
        for tell in proxy.engine.events:
            tell(b"{}\n")
        for client in listening:
            client.until(b"{}\n")
    eventually(lambda: proxy.endpoint.counters.active == 0)


def test_too_many_connections(make_proxy: MakeProxy) -> None:
    proxy = make_proxy(limit=3)
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(proxy.client()) for _ in range(3)]
        for client in kept:
            client.request("GET", "/_ping")
            client.answer()
        for _ in range(3):
            with proxy.client() as client:
                client.request("GET", "/_ping")
                status, _, body = client.answer()
                assert status == 503
                assert "3 connections" in json.loads(body)["message"]
                assert client.rest() == b""
        assert proxy.endpoint.counters.refused == 3
        kept[0].request("GET", "/_ping")
        assert kept[0].answer()[0] == 200
    eventually(lambda: proxy.endpoint.counters.active == 0)
    proxy.ping()


# -- accounting ------------------------------------------------------------------------------------


def test_idle_time_is_not_ended_by_events(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("GET", "/events")
        client.until(b"\r\n\r\n")
        eventually(lambda: bool(proxy.engine.events))
        time.sleep(0.2)
        proxy.engine.events[0](b"{}\n")
        client.until(b"{}\n")
        assert proxy.endpoint.idle_s >= 0.2
        assert proxy.endpoint.counters.in_flight == 0
        begun = time.monotonic()
        proxy.ping()
        assert proxy.endpoint.idle_s < time.monotonic() - begun


def test_a_raw_stream_is_in_flight(proxy: Proxy) -> None:
    with proxy.client() as client:
        client.request("POST", "/exec/e/start", "Upgrade: tcp", body=b"")
        client.answer()
        eventually(lambda: proxy.endpoint.counters.in_flight == 1)
        time.sleep(0.1)
        begun = time.monotonic()
        client.send(b"x")
        client.take(1)
        assert proxy.endpoint.idle_s < time.monotonic() - begun
    eventually(lambda: proxy.endpoint.counters.in_flight == 0)
