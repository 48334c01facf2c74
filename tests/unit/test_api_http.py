"""Heads and bodies of HTTP/1.1: what is understood, and what is refused."""

from __future__ import annotations

import time
from datetime import timedelta

import h11
import pytest
from http_messages import LONG_FILLERS, LONG_HEADS, read, split_up
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from wherry.api.http import (
    ESCAPE_LIMIT,
    HEAD_LIMIT_BYTES,
    HEADER_LIMIT,
    MARK_LIMIT,
    PATH_LIMIT_BYTES,
    MalformedAnswer,
    MalformedRequest,
    RequestHead,
    parse_answer,
    parse_request,
)
from wherry.api.messages import AnswerReader, RequestReader

GET = parse_request(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def read_answer(data: bytes) -> None:
    reader = AnswerReader(GET)
    reader.receive(memoryview(data))
    while reader.next() is not None:
        pass


# -- what is understood ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "path", "version"),
    [
        ("/_ping", "/_ping", ""),
        ("/v1.51/containers/create?name=a", "/containers/create", "1.51"),
        ("/v1.24/images/a/b:c/json", "/images/a/b:c/json", "1.24"),
        ("/v1.51/containers/%63reate", "/containers/create", "1.51"),
        ("/%761.51/info", "/info", "1.51"),
        ("http://docker/v1.51/info", "/info", "1.51"),
        ("http://docker", "/", ""),
        ("/v1.51", "/v1.51", ""),
        ("/volumes/v1.2/x", "/volumes/v1.2/x", ""),
        ("//v1.51/info", "//v1.51/info", ""),
    ],
)
def test_targets(target: str, path: str, version: str) -> None:
    head = parse_request(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target.encode())
    assert (head.path, head.api_version, head.target) == (path, version, target)


def test_a_request() -> None:
    raw = (
        b"POST /build?t=a%20b&t=c&q HTTP/1.1\r\nHost: x\r\nX-Registry-Config: e30=\r\n"
        b"Expect: 100-Continue\r\nContent-Length: 12\r\n\r\n"
    )
    head = parse_request(raw)
    assert (head.method, head.length, head.raw) == ("POST", 12, raw)
    assert head.query == {"t": ["a b", "c"], "q": [""]}
    assert head.header("X-Registry-Config") == "e30="
    assert head.header("absent") is None
    assert head.expects_continue
    assert head.keep_alive
    assert head.with_body(7) == (
        b"POST /build?t=a%20b&t=c&q HTTP/1.1\r\nHost: x\r\nX-Registry-Config: e30=\r\n"
        b"Content-Length: 7\r\n\r\n"
    )


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Close\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
    ],
)
def test_a_client_that_wants_to_close(raw: bytes) -> None:
    assert not parse_request(raw).keep_alive


@pytest.mark.parametrize(
    ("method", "target", "head", "raw"),
    [
        ("POST", "/containers/a/attach", "101 UPGRADED\r\nUpgrade: tcp", True),
        ("POST", "/session", "101 Switching Protocols\r\nUpgrade: h2c", True),
        ("POST", "/v1.24/containers/a/attach?stdin=1", "200 OK\r\nContent-Type: RAW", True),
        ("POST", "/exec/a/start", "200 OK\r\nContent-Type: RAW", True),
        ("POST", "/exec/a/start", "404 Not Found\r\nContent-Type: RAW", False),
        ("POST", "/exec/a/start", "200 OK\r\nContent-Type: RAW\r\nContent-Length: 0", False),
        ("POST", "/exec/a/start", "200 OK", False),
        ("GET", "/containers/a/logs", "200 OK\r\nContent-Type: RAW", False),
        ("GET", "/containers/a/attach", "200 OK\r\nContent-Type: RAW", False),
    ],
)
def test_which_answers_make_a_raw_stream(method: str, target: str, head: str, raw: bool) -> None:
    request = parse_request(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = head.replace("RAW", "application/vnd.docker.raw-stream")
    assert parse_answer(f"HTTP/1.1 {head}\r\n\r\n".encode()).switches(request) is raw


# -- what is refused ---------------------------------------------------------------------------

MALFORMED = {
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "twice the same length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    b"content-length: 5\r\n\r\n",
    "lengths in a list": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\n",
    "a length with a sign": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n",
    "a hexadecimal length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\n",
    "an empty length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n",
    "a huge length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999999999999\r\n\r\n",
    "length and encoding": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "encoding and length": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 5\r\n\r\n",
    "another encoding": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "identity": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n",
    "xchunked": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "encoding twice": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "encoding with a vertical tab": b"POST / HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding: \x0bchunked\r\n\r\n",
    "encoding in 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a space before the colon": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\n",
    "a bare LF": b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n",
    "only bare LF": b"GET / HTTP/1.1\nHost: x\n\n",
    "a bare LF before the end": b"GET / HTTP/1.1\r\nHost: x\n\r\n\r\n",
    "a bare LF and no other end": b"GET /_ping HTTP/1.1\r\nHost: x\n\n",
    "an end with a bare LF": b"GET /_ping HTTP/1.1\r\nHost: x\r\n\n",
    "a NUL and no end but bare LF": b"GET /\0 HTTP/1.1\r\nHost: x\n\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: x\rX: y\r\n\r\n",
    "a folded line": b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
    "a first line that is folded": b"GET / HTTP/1.1\r\n X: y\r\nHost: x\r\n\r\n",
    "a NUL in a header": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
    "a control character in a header": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x01b\r\n\r\n",
    "a NUL in the target": b"GET /a\0b HTTP/1.1\r\nHost: x\r\n\r\n",
    "an escaped NUL": b"GET /a%00b HTTP/1.1\r\nHost: x\r\n\r\n",
    "a bad escape": b"GET /a%0gb HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "a tab in the target": b"GET /a\tb HTTP/1.1\r\nHost: x\r\n\r\n",
    "a DEL in the target": b"GET /a\x7fb HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes beyond ASCII in the target": b"GET /\xc3\xa4 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no path": b"GET docker HTTP/1.1\r\nHost: x\r\n\r\n",
    "a bad method": b"GE(T / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no method": b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    "http/1.1": b"GET / http/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost: x\r\nnothing\r\n\r\n",
    "an empty name": b"GET / HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
    "an empty line first": b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a head that is too long": b"GET / HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n"
    % (b"y" * HEAD_LIMIT_BYTES),
    "a head without an end": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * HEAD_LIMIT_BYTES,
    "too many blanks": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y \ty" * MARK_LIMIT + b"\r\n\r\n",
    "too many commas": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y," * MARK_LIMIT + b",\r\n\r\n",
    "too many parts of a query": b"GET /?" + b"a&" * MARK_LIMIT + b"& HTTP/1.1\r\nHost: x\r\n\r\n",
    "too many escapes": b"GET /?" + b"%41" * ESCAPE_LIMIT + b"%41 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that is too long": b"GET /" + b"a" * PATH_LIMIT_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "too many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * HEADER_LIMIT + b"\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_heads(data: bytes) -> None:
    with pytest.raises(MalformedRequest):
        read(data)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_heads_in_pieces(name: str) -> None:
    data = MALFORMED[name]
    with pytest.raises(MalformedRequest):
        read(data, step=1 if len(data) < 1000 else 5000)


@pytest.mark.parametrize(
    "body",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhelloo\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b"5\rX\nhello\r\n0\r\n\r\n",
        b"5;a\0\r\nhello\r\n0\r\n\r\n",
        b"10000000000000005\r\nhello\r\n0\r\n\r\n",
        b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
        b"0\r\nno trailer\r\n\r\n",
        b"0\r\nX: y\r\n folded\r\n\r\n",
        b"0\r\nX: y\n\r\n",
        b"0\r\n\n",
        b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    ],
)
def test_malformed_chunks(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        read(CHUNKED + body)
    with pytest.raises(MalformedRequest):
        read(CHUNKED + body, step=1)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.1 204 None\r\n\r\nbody",
    ],
)
def test_malformed_answers(data: bytes) -> None:
    with pytest.raises(MalformedAnswer):
        read_answer(data)


def test_the_longest_head_and_the_most_headers() -> None:
    begin, end = b"GET / HTTP/1.1\r\nHost: x\r\nX-Registry-Config: ", b"\r\n\r\n"
    longest = begin + b"e" * (HEAD_LIMIT_BYTES - len(begin) - len(end)) + end
    most = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * (HEADER_LIMIT - 1) + b"\r\n"
    for raw in (longest, most):
        for step in (len(raw) + 1, 16 * 1024, 999):
            # What follows it is the next request's.
            assert [each.raw for each in read(raw + GET.raw, step)] == [raw, GET.raw]  # type: ignore[union-attr]
    with pytest.raises(MalformedRequest, match="longer than"):
        read(begin + b"e" + longest[len(begin) :])


def test_what_is_just_within_the_bounds() -> None:
    path, query = b"/" + b"a" * (PATH_LIMIT_BYTES - 1), b"a=%41" + b"&a=%41" * (MARK_LIMIT - 1)
    query += b"%41" * (ESCAPE_LIMIT - MARK_LIMIT)
    head = parse_request(
        b"GET %b?%b HTTP/1.1\r\nHost: x\r\nX: %b\r\n\r\n"
        % (path, query, b"a, " * (MARK_LIMIT - 10))
    )
    assert head.path == path.decode()
    assert len(head.query["a"]) == MARK_LIMIT


def test_a_refusal_does_not_cite_all_of_a_head() -> None:
    with pytest.raises(MalformedRequest) as caught:
        parse_request(b"GET / HTTP/1.1\r\nHost: x\r\nX" + b"\xff" * 1_000_000 + b"\r\n\r\n")
    assert len(str(caught.value)) < 1000


IN_NO_TIME_S = 0.5


def test_credentials_are_not_kept() -> None:
    raw = b"POST /images/create HTTP/1.1\r\nHost: d\r\n%b: secret\r\n\r\n"
    for name in (b"X-Registry-Auth", b"x-registry-config"):
        assert parse_request(raw % name) is not parse_request(raw % name)
    assert parse_request(raw % b"X") is parse_request(raw % b"X")


def read_all(parts: list[bytes]) -> tuple[list[RequestHead], bytes, bool]:
    """The heads, all bytes that go on, and whether what comes then is refused."""
    reader, heads, wire = RequestReader(), list[RequestHead](), bytearray()
    try:
        for part in parts:
            reader.receive(memoryview(part))
            while (item := reader.next()) is not None:
                if isinstance(item, RequestHead):
                    heads.append(item)
                    wire += item.raw
                else:
                    wire += item.data
    except MalformedRequest:
        return heads, bytes(wire), True
    return heads, bytes(wire), False


@pytest.mark.parametrize("step", [1, 7, 40])
def test_a_bare_lf_after_a_head_that_came_in_parts(step: int) -> None:
    bad = b"GET / HTTP/1.1\r\nHost: x\n\n"
    raw = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nX-Long: yes\r\n\r\n"
    for data in (raw + bad, raw + raw + bad):
        heads, wire, refused = read_all([data[at : at + step] for at in range(0, len(data), step)])
        assert refused
        assert wire == data[: -len(bad)] == b"".join(each.raw for each in heads)


@pytest.mark.parametrize("size", [4090, 4096, 4097, 4120, 4140])
def test_the_longest_line_between_chunks_is_so_however_it_comes(size: int) -> None:
    data = CHUNKED + b"5;" + b"a" * (size - 4) + b"\r\nhello\r\n0\r\n\r\n"
    for step in (1, 17, len(data)):
        parts = [data[at : at + step] for at in range(0, len(data), step)]
        assert read_all(parts)[2] is (size > 4096)


FRAGMENTS = st.binary(max_size=6) | st.sampled_from(
    [
        *(b"GET", b"POST", b" ", b"/", b"/v1.51/x", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n"),
        *(b"\r", b"Host: x", b"Content-Length: 3", b"Transfer-Encoding: chunked", b":", b"\0"),
        *(b"3\r\nabc\r\n", b"0\r\n\r\n", b"abc", b"\t", b"%", b"Content-Length", b"5", b","),
        *(b"POST / HTTP/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1\r\nHost: x"),
    ]
)


# It takes minutes to make a megabyte smaller that fails.
LONG = settings(deadline=timedelta(seconds=5), phases=(Phase.explicit, Phase.reuse, Phase.generate))


def read_in_no_time(parts: list[bytes]) -> tuple[list[RequestHead], bytes, bool]:
    begun = time.process_time()
    found = read_all(parts)
    assert time.process_time() - begun < IN_NO_TIME_S
    return found


def check(data: st.DataObject, whole: bytes) -> tuple[list[RequestHead], bool]:
    """What is accepted, h11 reads the same way from the raw bytes; all else raises one error."""
    heads, wire, refused = read_in_no_time([whole] if whole else [])
    assert whole.startswith(wire)
    for _ in range(2):
        others, wire_of_other, other_refused = read_in_no_time(data.draw(split_up(whole)))
        # However the bytes are split, with what is refused too; only how much of a malformed body
        # goes on differs.
        assert (others, other_refused) == (heads, refused)
        assert refused or wire_of_other == wire
    for head in heads:
        other = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT_BYTES)
        other.receive_data(head.raw)
        request = other.next_event()
        assert isinstance(request, h11.Request)
        assert request.method.decode() == head.method
        assert head.http_version in ("1.0", "1.1")
        assert head.raw.count(b"\n") == head.raw.count(b"\r\n") == head.raw.count(b"\r")
    return heads, refused


@settings(max_examples=4 * settings().max_examples, deadline=timedelta(seconds=5))
@given(st.data())
def test_any_bytes_are_a_request_or_refused_or_begun(data: st.DataObject) -> None:
    check(data, b"".join(data.draw(st.lists(FRAGMENTS, max_size=14))))


@settings(LONG, max_examples=settings().max_examples // 2)
@given(st.data())
def test_any_long_bytes_are_a_request_or_refused_or_begun(data: st.DataObject) -> None:
    """About as long as a head may be, of all that may be in one, and spoilt anywhere."""
    head, filler = data.draw(st.sampled_from(LONG_HEADS)), data.draw(st.sampled_from(LONG_FILLERS))
    longest = (HEAD_LIMIT_BYTES - len(head) + len(b"FILL")) // len(filler)
    count = data.draw(st.sampled_from([longest, HEADER_LIMIT, MARK_LIMIT, ESCAPE_LIMIT]))
    whole = head.replace(b"FILL", filler * (min(longest, count) + data.draw(st.integers(-5, 5))))
    for fragment in data.draw(st.lists(FRAGMENTS, max_size=3)):
        at = data.draw(st.integers(0, len(whole)))
        whole = whole[:at] + fragment + whole[at:]
    heads, _ = check(data, whole + data.draw(st.just(GET.raw) | FRAGMENTS))
    assert all(len(each.raw) <= HEAD_LIMIT_BYTES for each in heads)
    assert all(len(each.headers) <= HEADER_LIMIT for each in heads)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize(
    ("head", "filler", "longest"),
    [
        (LONG_HEADS[0], b"e", HEAD_LIMIT_BYTES - len(LONG_HEADS[0]) + len(b"FILL")),
        (b"GET / HTTP/1.1\r\nHost: d\r\nFILL\r\n", b"a: b\r\n", HEADER_LIMIT - 1),
    ],
    ids=["bytes", "headers"],
)
@settings(LONG, max_examples=settings().max_examples // 25)
@given(st.data())
def test_the_bounds_of_a_head_are_so_however_it_comes(
    head: bytes, filler: bytes, longest: int, beyond: int, data: st.DataObject
) -> None:
    raw = head.replace(b"FILL", filler * (longest + beyond))
    heads, refused = check(data, raw + GET.raw)
    assert [each.raw for each in heads] == ([] if beyond > 0 else [raw, GET.raw])
    assert refused is (beyond > 0)
