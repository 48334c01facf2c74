"""The service's questions to the engine: all have an end."""

from __future__ import annotations

import threading
import time

import pytest

from wherry.api.hooks import ClientGone
from wherry.core.errors import TunnelError, WherryError
from wherry.service import engine

WAIT_S = 10.0


class Stream:
    """A connection to an engine that says so much and then nothing."""

    def __init__(self, said: bytes = b"") -> None:
        self.closed = threading.Event()
        self._said = said

    def sendall(self, data: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        said, self._said = self._said, b""
        if not said:
            assert self.closed.wait(WAIT_S)
            raise TunnelError("the channel was closed here")
        return said

    def close(self) -> None:
        self.closed.set()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + b"[{}, {}"])
def test_an_engine_that_is_stuck_ends_a_question(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ANSWER_S", 0.05)
    stream = Stream(said)
    with pytest.raises(WherryError, match=r"did not answer within 0\.05 s"):
        engine.fetch(stream, "/containers/json")  # type: ignore[arg-type]
    assert stream.closed.is_set()


def test_a_stream_of_events_has_a_bound_for_its_beginning_alone() -> None:
    stream = Stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    answer, events = engine.request(stream, "/events", timeout_s=0.1)  # type: ignore[arg-type]
    assert answer.status_code == 200
    time.sleep(0.15)
    assert not stream.closed.is_set()
    stream.close()
    with pytest.raises(WherryError, match="broke off"):
        next(events)


def test_a_question_ends_with_its_client() -> None:
    stream, asked = Stream(), threading.Event()

    def wait(done: threading.Event, timeout_s: float) -> bool:
        assert asked.wait(WAIT_S)
        raise ClientGone

    def ask(opened: Stream) -> object:
        asked.set()
        return engine.fetch(opened, "/containers/x/json")  # type: ignore[arg-type]

    begun = time.monotonic()
    with pytest.raises(ClientGone):
        engine.while_wanted(wait, lambda: stream, ask)  # type: ignore[arg-type]
    assert stream.closed.is_set()
    assert time.monotonic() - begun < WAIT_S


def test_a_client_that_stays_gets_the_answer() -> None:
    stream = Stream(HEAD + b"[{}, {}, ]"[:9])
    with pytest.raises(WherryError, match="is no JSON"):
        engine.while_wanted(
            threading.Event.wait,
            lambda: stream,  # type: ignore[arg-type, return-value]
            lambda opened: engine.fetch(opened, "/x"),
        )
    good = Stream(HEAD + b"[1, 2, 3]")
    assert engine.while_wanted(
        threading.Event.wait,
        lambda: good,  # type: ignore[arg-type, return-value]
        lambda opened: engine.fetch(opened, "/x"),
    ) == [1, 2, 3]
