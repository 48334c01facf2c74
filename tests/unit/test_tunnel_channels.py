"""A channel over a transport that only notes what is sent."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from paramiko.message import Message

from wherry.core.errors import TunnelError
from wherry.tunnel.channels import StreamChannel

EOF, CLOSE, DATA = 96, 97, 94
WAIT_S = 10.0


class Transport:
    """Notes the kinds of messages; holds the first one until it is let go."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.held = threading.Event()
        self.go = threading.Event()
        self.hold: int | None = None

    def _note(self, kind: int) -> None:
        if kind == self.hold:
            self.held.set()
            assert self.go.wait(WAIT_S)
        self.sent.append(kind)

    def _send_user_message(self, message: Message) -> None:
        self._note(message.asbytes()[0])

    def send_data(self, channel: int, data: memoryview, most: int) -> None:
        self._note(DATA)

    def send_now(self, payload: bytes) -> bool:
        self._note(payload[0])
        return True

    def _sanitize_packet_size(self, size: int) -> int:
        return size

    def _unlink_channel(self, chanid: int) -> None: ...

    def get_log_channel(self) -> str:
        return "test"


def opened(transport: Transport) -> StreamChannel:
    channel = StreamChannel(0, time.monotonic() + WAIT_S, "a socket")
    channel._set_transport(transport)
    channel._set_window(1000, 1000)
    channel._set_remote_channel(5, 1000, 1000)
    return channel


@pytest.mark.parametrize("hold", [EOF, DATA], ids=["eof", "data"])
@pytest.mark.parametrize("by", ["us", "guest"])
def test_nothing_follows_the_close(hold: int, by: str) -> None:
    """A message that another thread is about to send must not come after the close."""
    transport = Transport()
    channel = opened(transport)
    transport.hold = hold

    def other() -> None:
        if hold == EOF:
            channel.shutdown_write()
        else:
            channel.sendall(b"x")

    thread = threading.Thread(target=other)
    thread.start()
    assert transport.held.wait(WAIT_S)
    # Neither of these waits for the thread that is sending.
    if by == "us":
        channel.close()
    else:
        channel._handle_close(Message())
    transport.go.set()
    thread.join(WAIT_S)
    assert transport.sent[0] == hold
    assert transport.sent[-1] == CLOSE
    assert transport.sent.count(CLOSE) == 1
    before = list(transport.sent)
    channel.shutdown_write()
    channel.close()
    channel._acknowledge(1000)
    with pytest.raises(TunnelError):
        channel.sendall(b"x")
    assert transport.sent == before


def test_data_whose_window_was_taken_before_the_close_is_not_sent() -> None:
    transport = Transport()
    channel: Any = opened(transport)
    take = channel._take_window

    def take_and_close(*args: Any) -> int:
        count: int = take(*args)
        channel.close()
        return count

    channel._take_window = take_and_close
    with pytest.raises(TunnelError):
        channel.sendall(b"x")
    assert transport.sent == [EOF, CLOSE]


def test_a_message_decided_on_before_the_close_is_not_sent() -> None:
    transport = Transport()
    channel = opened(transport)
    channel.close()
    channel._post(Message().add_byte(bytes([93])))
    assert transport.sent == [EOF, CLOSE]


def test_first_bytes_go_with_the_confirmation() -> None:
    transport = Transport()
    channel = StreamChannel(0, time.monotonic() + WAIT_S, "a socket")
    channel._set_transport(transport)
    thread = threading.Thread(target=channel.sendall, args=(b"hello",))
    thread.start()
    while channel._parked is None:
        threading.Event().wait(0.001)
    channel._set_remote_channel(5, 1000, 1000)
    assert transport.sent == [DATA]
    thread.join(WAIT_S)
    assert transport.sent == [DATA]
    assert channel.out_window_size == 995


def test_a_channel_closed_before_it_was_open_is_closed_once() -> None:
    transport = Transport()
    channel = StreamChannel(0, time.monotonic() + WAIT_S, "a socket")
    channel._set_transport(transport)
    channel.close()
    assert transport.sent == []
    channel._set_remote_channel(5, 1000, 1000)
    channel.confirmed()
    channel.close()
    assert transport.sent == [CLOSE]


def test_garbage_sends_nothing() -> None:
    transport = Transport()
    channel: Any = opened(transport)
    channel.__del__()
    assert transport.sent == []


def test_a_sender_without_window_asks_whether_it_should_wait() -> None:
    transport = Transport()
    channel = opened(transport)
    asked: list[int] = []

    def waiting() -> None:
        asked.append(channel.out_window_size)
        raise InterruptedError

    channel.sendall(bytes(1000), waiting)
    assert not asked, "it did not have to wait"
    with pytest.raises(InterruptedError):
        channel.sendall(b"x", waiting)
    assert asked == [0]
    channel.more_window(1)
    channel.sendall(b"x", waiting)
    assert transport.sent == [DATA, DATA]
