"""Answers through the endpoint's own threads: the client gets each byte once and in order."""

from __future__ import annotations

import pytest
from http_messages import Answer, answers, last_answers, split_up
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import EXAMPLES, KINDS, served

from wherry.api.hooks import Hooks, Watch


@pytest.mark.parametrize("watched", ["", "end", "line"])
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(st.data())
def test_any_split_of_any_answers(kind: str, watched: str, data: st.DataObject) -> None:
    """Passed on by the tunnel's thread, by a worker, or by both in turn."""
    expected: list[Answer] = data.draw(st.lists(answers(), max_size=3))
    last = data.draw(st.none() | last_answers())
    polled = kind == "socket"
    room = data.draw(st.lists(st.integers(0, 40), max_size=3)) if polled else []
    hooks = Hooks()
    if watched:
        watch = Watch(line=lambda line: None) if watched == "line" else Watch(end=lambda done: None)
        for method in ("GET", "HEAD", "POST"):
            hooks.on(method, "{any}", lambda request: watch)
    with served(hooks, kind, room=room) as (client, stream):
        for answer in [*expected, *([last] if last else [])]:
            client.send(answer.request.raw)
            stream.expect(answer.request.raw)
            for part in data.draw(split_up(answer.wire)):
                stream.feed(part)
            if answer is last:
                stream.end()
                assert client.rest() == answer.wire
            else:
                assert client.take(len(answer.wire)) == answer.wire
                assert not client.buffer
