"""A channel over a transport that only notes what is sent."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
from paramiko.message import Message

from wherry.core.errors import TunnelError
from wherry.tunnel import channels
from wherry.tunnel.channels import StreamChannel
from wherry.tunnel.packets import DataPackets
from wherry.tunnel.stream import Read
from wherry.tunnel.windows import WINDOW_BYTES, Windows

EOF, CLOSE, DATA, ADJUST = 96, 97, 94, 93
WAIT_S = 10.0


class Transport:
    """Notes the kinds of messages; holds the first one until it is let go."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.data = b""
        self.given: list[int] = []
        self.windows = Windows(lambda: 0.0)
        self.most = 0
        self.held = threading.Event()
        self.go = threading.Event()
        self.hold: int | None = None

    def _note(self, kind: int) -> None:
        if kind == self.hold:
            self.held.set()
            assert self.go.wait(WAIT_S)
        self.sent.append(kind)

    def _send_user_message(self, message: Message) -> None:
        kind = message.asbytes()[0]
        self._note(kind)
        if kind == ADJUST:
            self.given.append(int.from_bytes(message.asbytes()[5:], "big"))

    def send_data(self, channel: int, data: memoryview, most: int) -> None:
        self._note(DATA)
        self.data += data
        self.most = most

    def send_packets(self, channel: int, packets: DataPackets, count: int) -> None:
        self._note(DATA)
        self.data += b"".join(packets.filled(count))

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
    thread = threading.Thread(daemon=True, target=channel.sendall, args=(b"hello",))
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


def test_a_stream_that_nobody_used_is_closed_once() -> None:
    """Though the guest's answer is here before we have noted that it is closed."""
    transport = Transport()
    channel = opened(transport)
    transport.hold = CLOSE
    closes = threading.Thread(target=channel.close_now)
    closes.start()
    assert transport.held.wait(WAIT_S)
    transport.hold = None
    answer = threading.Thread(target=channel._handle_close, args=(Message(),))
    answer.start()
    answer.join(0.1)
    transport.go.set()
    answer.join(WAIT_S)
    closes.join(WAIT_S)
    assert transport.sent == [CLOSE]


def test_garbage_sends_nothing() -> None:
    transport = Transport()
    channel: Any = opened(transport)
    channel.__del__()
    assert transport.sent == []


def test_a_stream_among_others_gets_its_share_of_the_window_and_the_rest_later() -> None:
    transport = Transport()
    transport.windows.give(1, WINDOW_BYTES)
    channel = opened(transport)
    channel._acknowledge(WINDOW_BYTES)
    assert transport.given == [WINDOW_BYTES // 2]
    channel._acknowledge(1)
    assert transport.given == [WINDOW_BYTES // 2], "so little is not worth a packet"
    transport.windows = Windows()  # the other one is quiet
    channel._acknowledge(1)
    assert sum(transport.given) == WINDOW_BYTES + 2


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


# What is sent from where it was read to


def wide(transport: Transport, window: int = 2 << 20) -> StreamChannel:
    channel = StreamChannel(0, time.monotonic() + WAIT_S, "a socket")
    channel._set_transport(transport)
    channel._set_window(1000, 1000)
    channel._set_remote_channel(5, window, 32 * 1024)
    return channel


def reading(data: bytes, asked: list[int] | None = None) -> Read:
    """Return a reader that gives some bytes once, and then the end."""
    left = memoryview(data)

    def read(parts: list[memoryview]) -> int:
        nonlocal left
        if asked is not None:
            asked.append(sum(map(len, parts)))
        before = len(left)
        for part in parts:
            count = min(len(part), len(left))
            part[:count], left = left[:count], left[count:]
        return before - len(left)

    return read


def await_waiter(channel: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not channel.out_buffer_cv._waiters:
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def test_no_more_is_read_than_the_window_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_TOGETHER_S", None)  # a small window is not waited for
    data = random.Random(1).randbytes(300_000)
    transport, asked = Transport(), list[int]()
    channel = wide(transport, 100_000)
    channel.out_window_size = 80_000  # of 100 000
    read = reading(data, asked)
    sent = 0
    while count := channel.send_from(read):
        sent += count
        assert channel.out_window_size == 80_000 - count
        channel.more_window(count)
    assert (sent, transport.data, max(asked)) == (len(data), data, 2 * 32 * 1024)
    assert channel.out_window_size == 80_000, "what was not used was given back"


def test_a_reader_that_fails_costs_no_window() -> None:
    channel = wide(Transport())

    def fail(parts: list[memoryview]) -> int:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        channel.send_from(fail)
    assert channel.out_window_size == 2 << 20


def test_the_end_is_read_also_while_the_guest_takes_nothing() -> None:
    transport = Transport()
    channel = wide(transport, 10)
    assert channel.send_from(reading(b"0123456789")) == 10
    assert channel.out_window_size == 0
    assert channel.send_from(reading(b"")) == 0
    channel.shutdown_write()
    assert transport.sent == [DATA, EOF]


def test_what_is_read_without_room_waits_for_it_and_asks_whether_it_should() -> None:
    transport = Transport()
    channel = wide(transport, 10)
    channel.send_from(reading(b"0123456789"))

    def waiting() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        channel.send_from(reading(b"x"), waiting)
    thread = threading.Thread(daemon=True, target=channel.send_from, args=(reading(b"rest"),))
    thread.start()
    await_waiter(channel)
    channel.more_window(100)
    thread.join(WAIT_S)
    assert transport.data == b"0123456789rest"


def test_much_is_sent_together_though_room_comes_in_little_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels, "_TOGETHER_S", WAIT_S)
    transport, asked = Transport(), list[int]()
    channel = wide(transport)
    channel.out_window_size = 40_000
    thread = threading.Thread(
        daemon=True, target=channel.send_from, args=(reading(bytes(1 << 20), asked),)
    )
    thread.start()
    await_waiter(channel)
    channel.more_window(100_000)
    await_waiter(channel)  # still
    channel.more_window(200_000)
    thread.join(WAIT_S)
    assert asked == [256 * 1024]


def test_a_guest_that_makes_room_only_when_there_is_none_gets_what_fits() -> None:
    transport, asked = Transport(), list[int]()
    channel = wide(transport)
    channel.out_window_size = 40_000
    assert channel.send_from(reading(bytes(1 << 20), asked)) == 32 * 1024
    assert asked == [32 * 1024]
    thread = threading.Thread(
        daemon=True, target=channel.sendall, args=(bytes(40_000 - 32 * 1024 + 1),)
    )
    thread.start()
    await_waiter(channel)
    channel.more_window(1)
    thread.join(WAIT_S)
    assert len(transport.data) == 40_001


def test_a_guest_of_small_packets_gets_small_packets() -> None:
    transport = Transport()
    channel = opened(transport)
    channel.more_window(1 << 20)
    assert channel.send_from(reading(bytes(5000))) == 5000
    assert (len(transport.data), transport.most) == (5000, 1000)


def test_nothing_follows_the_end_of_writing() -> None:
    transport = Transport()
    channel = wide(transport)
    channel.shutdown_write()
    with pytest.raises(TunnelError):
        channel.send_from(reading(b"x"))
    assert transport.sent == [EOF]


def test_a_stream_that_was_closed_meanwhile_sends_nothing() -> None:
    transport = Transport()
    channel = wide(transport)

    def read(parts: list[memoryview]) -> int:
        channel.close()
        return 1

    with pytest.raises(TunnelError, match="was closed"):
        channel.send_from(read)
    assert transport.sent == [EOF, CLOSE]
    with pytest.raises(TunnelError):
        channel.send_from(reading(b"x"))
