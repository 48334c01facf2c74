"""Requests and answers of every form, and any pieces of them, for property tests."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from wherry.api.http import RequestHead, parse_request
from wherry.api.messages import Piece, RequestReader

INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
]

_START = b"POST /v1.24/exec/e/start HTTP/1.1\r\nHost: docker"
_RAW = b"\r\nContent-Type: application/vnd.docker.raw-stream"
_MULTIPLEXED = b"\r\nContent-Type: application/vnd.docker.multiplexed-stream"
_TO_H2C = b" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c"
_H2C = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c"
RAW = [
    (_START + b"\r\nConnection: Upgrade\r\nUpgrade: tcp",
     b"HTTP/1.1 101 UPGRADED" + _RAW + b"\r\nConnection: Upgrade\r\nUpgrade: tcp"),
    (b"POST /grpc" + _TO_H2C, _H2C),
    (b"POST /session" + _TO_H2C, _H2C),
    (b"GET /containers/c/attach/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
     b"Upgrade: websocket\r\nSec-WebSocket-Version: 13",
     b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade"),
    (_START, b"HTTP/1.1 200 OK" + _RAW),
    (_START, b"HTTP/1.1 200 OK" + _MULTIPLEXED),
    (b"POST /containers/c/attach HTTP/1.1\r\nHost: x", b"HTTP/1.1 200 OK" + _RAW),
]  # fmt: skip
"""Of requests and answers that make a raw stream: heads, but for framing and their end."""

LAST = [
    *((request + b"\r\n\r\n", answer) for request, answer in RAW),
    (b"GET / HTTP/1.1\r\nHost: docker\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close"),
    (b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.0 404 Not Found"),
]
"""Heads of requests, and of answers whose end is the stream's."""

INPUT = [
    # The client's preface of HTTP/2 (RFC 9113 §3.4) and its settings: it waits for nothing.
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    # Frames of a websocket (RFC 6455 §5.2): masked bytes, and the one that closes.
    b"\x82\x85\1\2\3\4igoho\x88\x82\1\2\3\4\2\xea",
    b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\nHost: x\0\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    bytes(range(256)) * 200,
]
"""What could be taken for something else in a raw stream, and what is much."""


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


@dataclass
class Asking(Message):
    """A request.

    :param head: its head but for what tells how its body comes, and but for the end.
    :param body: as it is framed.
    :param expects: whether it asks for a word before it sends the body.
    """

    method: str
    head: bytes
    body: bytes
    expects: bool

    def with_body(self, content: bytes) -> bytes:
        """The request with another body, in the plainest form."""
        return self.head + b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content


@st.composite
def requests(draw: st.DrawFn) -> Asking:
    method = draw(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE"]))
    target = draw(st.sampled_from(["/_ping", "/v1.51/containers/create?name=x", "/images/a%2Fb"]))
    lines = [f"{method} {target} HTTP/1.1", "Host: docker"]
    lines += draw(st.lists(st.sampled_from(["X-A: b", "x-odd:  \t", "Accept: */*"]), max_size=3))
    head = "\r\n".join(lines).encode()
    body, framing, expects = Message(b"", b""), b"", False
    if method in ("POST", "PUT"):
        body = draw(chunked() | st.binary(max_size=200).map(lambda data: Message(data, data)))
        framing = framing_of(body)
        expects = draw(st.booleans())
        if expects:
            framing += b"\r\nExpect: 100-continue"
    wire = head + framing + b"\r\n\r\n" + body.wire
    return Asking(wire, body.content, method, head, body.wire, expects)


def framing_of(body: Message) -> bytes:
    """The header that tells how a body comes."""
    if body.wire == body.content:
        return b"\r\nContent-Length: %d" % len(body.wire)
    return b"\r\nTransfer-Encoding: chunked"


@dataclass
class Answer(Message):
    request: RequestHead


@st.composite
def answers(draw: st.DrawFn, methods: tuple[str, ...] = ("GET", "HEAD", "POST")) -> Answer:
    method = draw(st.sampled_from(methods))
    request = parse_request(f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status = draw(st.sampled_from([200, 201, 204, 304, 404, 500]))
    wire = b"".join(draw(st.lists(st.sampled_from(INTERIM), max_size=2)))
    wire += b"HTTP/1.1 %d X" % status
    body = draw(chunked() | st.binary(max_size=200).map(lambda data: Message(data, data)))
    wire += framing_of(body)
    if method == "HEAD" or status in (204, 304):
        body = Message(b"", b"")
    return Answer(wire + b"\r\n\r\n" + body.wire, body.content, request)


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


LONG_FILLERS = [b" ", b"\t", b"0", b",", b"%", b"/", b":", b"%2e", b"a: b\r\n"]
LONG_HEADS = [
    b"GET / HTTP/1.1\r\nHost: d\r\nX: aFILLb\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: d\r\nContent-Length: 1,FILL1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: d\r\nContent-Length:FILL1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: FILLchunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nFILL: x\r\n\r\n",
    b"GET /FILLx HTTP/1.1\r\nHost: d\r\n\r\n",
    b"GET /containers/FILL/attach HTTP/1.1\r\nHost: d\r\n\r\n",
    b"GET xFILL HTTP/1.1\r\nHost: d\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: d\r\nFILL\r\n\r\n",
]
"""Heads, and what is put for FILL in them again and again."""


def read(data: bytes, step: int = 1 << 20) -> list[RequestHead | Piece]:
    """Return what is found in bytes that come so many at a time."""
    reader = RequestReader()
    found = []
    for at in range(0, len(data), step):
        reader.receive(memoryview(data[at : at + step]))
        while (item := reader.next()) is not None:
            found.append(item)
    return found
