"""Streams of messages in any pieces: the bytes that go on are the bytes that came."""

from __future__ import annotations

import h11
from http_messages import Message, answers, last_answers, requests, split_up
from hypothesis import given
from hypothesis import strategies as st

from wherry.api.exchange import Exchange, Outcome
from wherry.api.hooks import LINE_LIMIT_BYTES, Watch
from wherry.api.http import RequestHead, ResponseHead, parse_request
from wherry.api.messages import AnswerReader, Piece, RequestReader


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


def exchange_of(watch: Watch) -> Exchange:
    request = parse_request(b"POST /containers/a/wait HTTP/1.1\r\nHost: x\r\n\r\n")
    return Exchange(request, [watch])


@given(st.data())
def test_watched_answers_that_the_stream_ends(data: st.DataObject) -> None:
    """Raw ones have no lines; else the last line is shown before anything of it goes on."""
    answer = data.draw(last_answers())
    passed, shown = bytearray(), list[bytes]()

    def line(text: bytes) -> None:
        # What of it is there already is from before: the bytes of the line are not.
        assert len(passed) <= len(answer.wire) - len(answer.content) + sum(map(len, seen))
        shown.append(text)
        seen.append(lines.pop(0))

    lines, seen = [each + b"\n" for each in answer.content.split(b"\n")], list[bytes]()
    exchange = Exchange(answer.request, [Watch(line=line)])
    for part in data.draw(split_up(answer.wire)):
        for piece in exchange.release(memoryview(part)):
            passed += piece
        if exchange.outcome is Outcome.RAW:
            assert answer.wire.startswith(passed)
            assert not exchange._held
    passed += exchange.rest()
    assert bytes(passed) == answer.wire
    wanted = [each.rstrip(b"\r").removeprefix(b"\x1e") for each in answer.content.split(b"\n")]
    if not answer.content or answer.content.endswith(b"\n"):
        wanted.pop()
    assert shown == ([] if exchange.outcome is Outcome.RAW else wanted)


def test_a_first_line_without_an_end_is_not_held() -> None:
    exchange = exchange_of(Watch(line=lambda line: None))
    size, passed = 30 << 20, 0
    wire = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (size + 4)
    for fed in range(30):
        for data in exchange.release(memoryview(wire if not fed else bytes(1 << 20))):
            passed += len(data)
        assert passed >= (fed - 3) << 20
    assert len(exchange._held) <= 2 << 20


def test_a_long_line_after_one_that_was_replaced_arrives_whole() -> None:
    """And the line after a first one that is too long to be seen is not taken for the first."""
    shown: list[bytes] = []

    def line(text: bytes) -> bytes | None:
        shown.append(text)
        return b"other" if text in (b"first", b"second") else None

    begin = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    long = b"x" * (LINE_LIMIT_BYTES * 3)
    for lines, wanted in (
        ([b"first", long, b"end"], [b"other", long, b"end"]),
        ([long, b"second", b"end"], [long, b"second", b"end"]),
    ):
        content = b"\n".join(lines)
        wire = begin
        for at in range(0, len(content), 100_000):
            part = content[at : at + 100_000]
            wire += b"%x\r\n%b\r\n" % (len(part), part)
        wire += b"0\r\n\r\n"
        exchange, passed = exchange_of(Watch(line=line)), bytearray()
        for at in range(0, len(wire), 65536):
            for data in exchange.release(memoryview(wire)[at : at + 65536]):
                passed += data
        reader, got = AnswerReader(exchange.request, want_content=True), bytearray()
        reader.receive(memoryview(passed))
        while (item := reader.next()) is not None:
            if isinstance(item, Piece):
                for start, stop in item.content or ():
                    got += item.data[start:stop]
        assert reader.done
        assert got.split(b"\n") == wanted
    assert shown == [b"first", b"end", b"second", b"end"]


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
