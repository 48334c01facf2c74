"""Requests through the endpoint's own threads: the engine gets each byte once and in order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from http_messages import (
    INPUT,
    INTERIM,
    RAW,
    Asking,
    Message,
    answers,
    chunked,
    framing_of,
    requests,
    split_up,
)
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import EXAMPLES, KINDS, ScriptedStream, served
from stub_engine import WAIT_S, Client

from wherry.api.answers import CONTINUE
from wherry.api.hooks import Hooks, Request, Watch

READS = st.lists(st.integers(1, 40) | st.sampled_from([1000, 16 * 1024, 1 << 20]), max_size=5)
"""How many bytes are read at once; no such list means: all that there is."""


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Asking, list[bytes]]:
    """A request, and the parts in which its answer comes."""
    asked = draw(requests())
    return asked, draw(split_up(draw(answers((asked.method,))).wire))


def answer(client: Client, stream: ScriptedStream, parts: list[bytes]) -> None:
    """Have the engine answer a request that it has got."""
    for part in parts:
        stream.feed(part)
    wire = b"".join(parts)
    assert client.take(len(wire)) == wire


@pytest.mark.parametrize("hooked", ["", "read", "rewritten"])
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(st.data())
def test_any_split_of_any_requests(kind: str, hooked: str, data: st.DataObject) -> None:
    """All sent ahead, and the client's end after them; hooks that read bodies get them whole."""
    sent = data.draw(st.lists(exchanges(), min_size=1, max_size=4))
    other = data.draw(st.binary(max_size=50))
    half_close = data.draw(st.booleans())
    read: list[bytes | None] = []

    def hook(request: Request) -> None:
        read.append(request.body)
        if hooked == "rewritten":
            request.replace_body(other)

    hooks = Hooks()
    if hooked:
        for method in ("POST", "PUT"):
            hooks.on(method, "{any}", hook, body_limit=1000)

    def send() -> None:
        client.send(b"".join(asked.wire for asked, _ in sent))
        if half_close:
            client.sock.shutdown(1)

    reads = data.draw(READS)
    with served(hooks, kind, reads=reads) as (client, stream), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        for number, (asked, parts) in enumerate(sent, start=1):
            wire = asked.wire
            if hooked and asked.method in ("POST", "PUT"):
                if asked.expects and asked.body:
                    assert client.take(len(CONTINUE)) == CONTINUE
                if hooked == "rewritten":
                    wire = asked.with_body(other)
                elif asked.expects:
                    # It was asked for here, so the engine is not to ask again.
                    wire = asked.with_body(asked.content)
            stream.expect(wire)
            if half_close and number == len(sent):
                stream.expect_end()
            answer(client, stream, parts)
        sending.result(WAIT_S)
        assert not client.buffer
        if half_close:
            stream.end()
            assert client.rest() == b""
    assert read == [
        asked.content for asked, _ in sent if hooked and asked.method in ("POST", "PUT")
    ]


@pytest.mark.parametrize("watched", ["", "end", "line"])
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(st.data())
def test_any_split_of_any_raw_stream(kind: str, watched: str, data: st.DataObject) -> None:
    """Input is sent ahead with the request; either side ends first, and the other one goes on."""
    before = data.draw(st.lists(exchanges(), max_size=2))
    head, upgraded = data.draw(st.sampled_from(RAW))
    body = data.draw(chunked() | st.sampled_from([Message(b"", b""), Message(b"{}", b"{}")]))
    request = head + (framing_of(body) if body.wire else b"") + b"\r\n\r\n" + body.wire
    some = st.sampled_from(INPUT) | st.binary(max_size=200)
    early, late = data.draw(st.just(b"") | some), data.draw(some)
    interim = data.draw(st.just(b"") | st.sampled_from(INTERIM))
    greeted = data.draw(split_up(interim + upgraded + b"\r\n\r\n" + data.draw(some)))
    farewell, engine_first = data.draw(split_up(data.draw(some))), data.draw(st.booleans())
    hooks = Hooks()
    if watched:
        watch = Watch(line=lambda line: None) if watched == "line" else Watch(end=lambda done: None)
        for method in ("GET", "POST"):
            hooks.on(method, "{any}", lambda request: watch)
    reads = data.draw(READS)
    with served(hooks, kind, reads=reads) as (client, stream), ThreadPoolExecutor(1) as pool:
        ahead = b"".join(asked.wire for asked, _ in before) + request + early
        sending = pool.submit(client.send, ahead)
        for asked, parts in before:
            stream.expect(asked.wire)
            answer(client, stream, parts)
        # What follows the request goes on only once it is known for what it is.
        stream.expect(request)
        answer(client, stream, greeted)
        stream.expect(early)
        sending.result(WAIT_S)
        if engine_first:
            stream.end()
            assert client.rest() == b""
            client.send(late)
            stream.expect(late)
            client.sock.shutdown(1)
            stream.expect_end()
        else:
            client.send(late)
            client.sock.shutdown(1)
            stream.expect(late)
            stream.expect_end()
            for part in farewell:
                stream.feed(part)
            stream.end()
            assert client.rest() == b"".join(farewell)
