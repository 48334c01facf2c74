"""Streams of messages in any pieces: the bytes that go on are the bytes that came."""

from __future__ import annotations

from dataclasses import dataclass

import h11
from hypothesis import given
from hypothesis import strategies as st

from wherry.api.exchange import Exchange, Outcome
from wherry.api.hooks import Watch
from wherry.api.http import RequestHead, ResponseHead, parse_request
from wherry.api.messages import AnswerReader, Piece, RequestReader


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
    wire = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]))
    wire += b"HTTP/1.1 %d X\r\n" % status
    body = draw(chunked() | st.binary(max_size=200).map(lambda data: Message(data, data)))
    if body.wire != body.content:
        wire += b"Transfer-Encoding: chunked\r\n"
    else:
        wire += b"Content-Length: %d\r\n" % len(body.wire)
    if method == "HEAD" or status in (204, 304):
        body = Message(b"", b"")
    return Answer(wire + b"\r\n" + body.wire, body.content, request)


def split(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a != b]


split_up = st.composite(split)


@given(st.data())
def test_requests(data: st.DataObject) -> None:
    sent = data.draw(st.lists(requests(), min_size=1, max_size=4))
    reader = RequestReader()
    reader.want_content = True
    wire, contents = [bytearray()], [bytearray()]
    wire.clear(), contents.clear()
    for part in data.draw(split_up(b"".join(each.wire for each in sent))):
        reader.receive(memoryview(part))
        while (item := reader.next()) is not None:
            if isinstance(item, RequestHead):
                wire.append(bytearray(item.raw))
                contents.append(bytearray())
            else:
                wire[-1] += item.data
                for begin, end in item.content or ():
                    contents[-1] += item.data[begin:end]
    assert [bytes(each) for each in wire] == [each.wire for each in sent]
    assert [bytes(each) for each in contents] == [each.content for each in sent]
    assert reader.between
    assert not reader.begun


@given(st.data())
def test_answers(data: st.DataObject) -> None:
    answer = data.draw(answers())
    reader = AnswerReader(answer.request, want_content=True)
    wire, content = bytearray(), bytearray()
    for part in data.draw(split_up(answer.wire)):
        assert not reader.done
        reader.receive(memoryview(part))
        while (item := reader.next()) is not None:
            if isinstance(item, ResponseHead):
                wire += item.raw
                continue
            assert isinstance(item, Piece)
            wire += item.data
            for begin, end in item.content or ():
                content += item.data[begin:end]
            assert item.last == reader.done
    assert bytes(wire) == answer.wire
    assert bytes(content) == answer.content
    assert reader.done


@given(st.data())
def test_watched_answers(data: st.DataObject) -> None:
    """Each byte goes on once, in order; a line after it was shown, the end after ``end``."""
    answer = data.draw(answers())
    passed = bytearray()
    shown: list[bytes] = []
    seen: list[str] = []

    def head(response: ResponseHead) -> None:
        assert response.raw not in passed
        seen.append("head")

    def line(text: bytes) -> None:
        shown.append(text)

    def end(complete: bool) -> None:
        assert complete
        assert len(passed) < len(answer.wire)
        seen.append("end")

    parts = data.draw(split_up(answer.wire))
    watch = Watch(head, line if data.draw(st.booleans()) else None, end)
    exchange = Exchange(answer.request, [watch])
    for part in parts:
        for piece in exchange.release(memoryview(part)):
            passed += piece
    assert bytes(passed) == answer.wire
    assert seen == ["head", "end"]
    assert exchange.outcome is Outcome.DONE
    if watch.line:
        lines = answer.content.split(b"\n")
        wanted = [each.rstrip(b"\r").removeprefix(b"\x1e") for each in lines[:-1]]
        if lines[-1]:
            wanted.append(lines[-1].rstrip(b"\r").removeprefix(b"\x1e"))
        assert shown == wanted
    exchange.finish(complete=False)
    assert seen == ["head", "end"]


@given(requests())
def test_the_generator_makes_what_h11_reads(message: Message) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(message.wire)
    assert isinstance(connection.next_event(), h11.Request)
    content = b""
    while isinstance(event := connection.next_event(), h11.Data):
        content += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert content == message.content
    assert connection.trailing_data == (b"", False)
