"""Requests and answers of every form, and any pieces of them, for property tests."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from wherry.api.http import RequestHead, parse_request

INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
]

_START = b"POST /v1.24/exec/e/start HTTP/1.1\r\nHost: docker\r\nContent-Length: 0\r\n"
_RAW = b"\r\nContent-Type: application/vnd.docker.raw-stream"
_MULTIPLEXED = b"\r\nContent-Type: application/vnd.docker.multiplexed-stream"
LAST = [
    (_START + b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
     b"HTTP/1.1 101 UPGRADED" + _RAW + b"\r\nConnection: Upgrade\r\nUpgrade: tcp"),
    (b"POST /grpc HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
     b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c"),
    (_START + b"\r\n", b"HTTP/1.1 200 OK" + _RAW),
    (_START + b"\r\n", b"HTTP/1.1 200 OK" + _MULTIPLEXED),
    (b"GET / HTTP/1.1\r\nHost: docker\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close"),
    (b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.0 404 Not Found"),
]  # fmt: skip
"""Heads of requests, and of answers whose end is the stream's."""


@dataclass
class Message:
    wire: bytes
    content: bytes
    """What h11 finds in it is this, so the generator is right."""


@st.composite
def chunked(draw: st.DrawFn) -> Message:
    chunks = draw(st.lists(st.binary(min_size=1, max_size=70), max_size=5))
    wire = b""
    for chunk in chunks:
        size = b"%x" % len(chunk)
        if draw(st.booleans()):
            size = b"00" + size.upper() + draw(st.sampled_from([b";a", b';a="b c"', b";"]))
        wire += size + b"\r\n" + chunk + b"\r\n"
    wire += draw(st.sampled_from([b"0\r\n\r\n", b"000;x\r\n\r\n", b"0\r\nX-Sum: 1\r\nY:\r\n\r\n"]))
    return Message(wire, b"".join(chunks))


@st.composite
def requests(draw: st.DrawFn) -> Message:
    method = draw(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE"]))
    target = draw(st.sampled_from(["/_ping", "/v1.51/containers/create?name=x", "/images/a%2Fb"]))
    lines = [f"{method} {target} HTTP/1.1", "Host: docker"]
    lines += draw(st.lists(st.sampled_from(["X-A: b", "x-odd:  \t", "Accept: */*"]), max_size=3))
    body = Message(b"", b"")
    if method in ("POST", "PUT"):
        body = draw(chunked() | st.binary(max_size=200).map(lambda data: Message(data, data)))
        if body.wire == body.content:
            lines.append(f"Content-Length: {len(body.wire)}")
        else:
            lines.append("Transfer-Encoding: chunked")
    return Message("\r\n".join([*lines, "", ""]).encode() + body.wire, body.content)


@dataclass
class Answer(Message):
    request: RequestHead


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    method = draw(st.sampled_from(["GET", "HEAD", "POST"]))
    request = parse_request(f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status = draw(st.sampled_from([200, 201, 204, 304, 404, 500]))
    wire = b"".join(draw(st.lists(st.sampled_from(INTERIM), max_size=2)))
    wire += b"HTTP/1.1 %d X\r\n" % status
    body = draw(chunked() | st.binary(max_size=200).map(lambda data: Message(data, data)))
    if body.wire != body.content:
        wire += b"Transfer-Encoding: chunked\r\n"
    else:
        wire += b"Content-Length: %d\r\n" % len(body.wire)
    if method == "HEAD" or status in (204, 304):
        body = Message(b"", b"")
    return Answer(wire + b"\r\n" + body.wire, body.content, request)


@st.composite
def last_answers(draw: st.DrawFn) -> Answer:
    """One that ends with the stream: raw after an upgrade or without one, or of no length."""
    head, wire = draw(st.sampled_from(LAST))
    content = draw(st.binary(max_size=200))
    interim = b"".join(draw(st.lists(st.sampled_from(INTERIM), max_size=1)))
    return Answer(interim + wire + b"\r\n\r\n" + content, content, parse_request(head))


@st.composite
def split_up(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a != b]
