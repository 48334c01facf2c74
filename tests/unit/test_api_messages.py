"""Streams of messages in any pieces: the bytes that go on are the bytes that came."""

from __future__ import annotations

import h11
from http_messages import Message, answers, requests, split_up
from hypothesis import given
from hypothesis import strategies as st

from wherry.api.exchange import Exchange, Outcome
from wherry.api.hooks import Watch
from wherry.api.http import RequestHead, ResponseHead
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
