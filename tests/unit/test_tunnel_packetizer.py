"""The packet layer against itself and against paramiko's own."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from paramiko.message import Message
from paramiko.packet import NeedRekeyException, Packetizer
from paramiko.ssh_exception import SSHException

from wherry.tunnel.packetizer import FastPacketizer
from wherry.tunnel.packets import SEND_AT_ONCE_BYTES, DataPackets

KEY, NONCE = b"k" * 16, b"n" * 11 + b"\xff"


class Wire:
    """A socket that keeps what is sent, and receives it in pieces of given sizes."""

    def __init__(self, data: bytes = b"", pieces: Callable[[], int] = lambda: 1 << 20) -> None:
        self.sent = bytearray()
        self._data, self._at, self._pieces = data, 0, pieces

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def recv_into(self, view: memoryview) -> int:
        count = min(len(view), self._pieces(), len(self._data) - self._at)
        view[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count

    def recv(self, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    sendmsg = None

    def setsockopt(self, level: int, option: int, value: int) -> None: ...

    def close(self) -> None: ...


def sender(wire: Wire, kind: type[Packetizer] = FastPacketizer) -> Packetizer:
    packetizer = kind(wire)
    packetizer.set_outbound_cipher(AESGCM(KEY), 16, None, 16, None, aead=True, iv_out=NONCE)
    return packetizer


def receiver(wire: Wire, kind: type[Packetizer] = FastPacketizer) -> Packetizer:
    packetizer = kind(wire)
    packetizer.set_inbound_cipher(AESGCM(KEY), 16, None, 16, None, aead=True, iv_in=NONCE)
    return packetizer


def message(content: bytes) -> Message:
    return Message().add_bytes(content)


def test_it_speaks_as_paramiko_does() -> None:
    contents = [bytes([90]) + bytes(n) for n in (0, 1, 11, 12, 13, 28, 29, 30, 5000)]
    for send_kind, receive_kind in ((FastPacketizer, Packetizer), (Packetizer, FastPacketizer)):
        wire = Wire()
        out = sender(wire, send_kind)
        for content in contents:
            out.send_message(message(content))
        into = receiver(Wire(bytes(wire.sent)), receive_kind)
        for content in contents:
            kind, got = into.read_message()
            assert (kind, got.asbytes()) == (90, content[1:])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 70_000)), min_size=1, max_size=25),
    st.lists(st.integers(1, 300_000), min_size=1, max_size=10),
    st.sampled_from([32_000, 32 * 1024]),
)
def test_data_arrives_in_order_whatever_the_pieces(
    writes: list[tuple[int, int]], pieces: list[int], most: int
) -> None:
    wire = Wire()
    out = sender(wire)
    expected: dict[int, bytes] = {}
    for number, (channel, size) in enumerate(writes):
        data = random.Random(number).randbytes(size)
        out.send_data(channel, memoryview(data), most)
        expected[channel] = expected.get(channel, b"") + data
        if number % 5 == 4:
            out.send_message(message(b"\x5a" + bytes([number])))
    turn = itertools.cycle([*pieces, 5_000])
    into = receiver(Wire(bytes(wire.sent), lambda: next(turn)))
    got: dict[int, bytes] = {}
    into.ready_for_data = lambda: True

    def on_data(channel: int, parts: list[memoryview]) -> None:
        got[channel] = got.get(channel, b"") + b"".join(parts)

    into.on_data = on_data
    others = []
    for _ in range(len(writes) // 5):
        others.append(into.read_message()[0])
    with pytest.raises(EOFError):
        into.read_message()
    assert {c: d for c, d in got.items() if d} == {c: d for c, d in expected.items() if d}
    assert others == [90] * (len(writes) // 5)


class Sealer:
    """A cipher of a release that cannot encrypt into a buffer."""

    def __init__(self) -> None:
        aes = AESGCM(KEY)
        self.encrypt, self.decrypt = aes.encrypt, aes.decrypt


@pytest.mark.parametrize("engine", [lambda: AESGCM(KEY), Sealer], ids=["new", "old"])
@pytest.mark.parametrize("kind", [FastPacketizer, Packetizer])
def test_data_is_sealed_where_it_lies(engine: Callable[[], Any], kind: type[Packetizer]) -> None:
    """Of any length after any other, which may leave its own bytes behind in the room."""
    wire = Wire()
    out = FastPacketizer(wire)
    out.set_outbound_cipher(engine(), 16, None, 16, None, aead=True, iv_out=NONCE)
    packets = DataPackets()
    counts = [
        SEND_AT_ONCE_BYTES,
        1,
        33,
        32 * 1024,
        SEND_AT_ONCE_BYTES,
        100_000,
        33,
        16,
        17,
        32 * 1024 + 1,
        2,
    ]
    expected = [(9, random.Random(9).randbytes(2 * SEND_AT_ONCE_BYTES + 5))]
    out.send_data(9, memoryview(expected[0][1]), 32 * 1024)
    for number, count in enumerate(counts):
        data = random.Random(number).randbytes(count)
        left = memoryview(data)
        for room in packets.room(SEND_AT_ONCE_BYTES):
            room[: len(left[: len(room)])] = left[: len(room)]
            left = left[len(room) :]
        out.send_packets(number % 2, packets, count)
        expected.append((number % 2, data))
    into = receiver(Wire(bytes(wire.sent)), kind)
    for channel, data in expected:
        got = b""
        while len(got) < len(data):
            _, packet = into.read_message()
            assert packet.get_int() == channel
            got += packet.get_binary()
        assert got == data
    assert out._packets_out == sum(-(-len(data) // (32 * 1024)) for _, data in expected)


def test_the_room_is_as_large_as_the_window_lets_it_be() -> None:
    packets = DataPackets()
    for most, sizes in (
        (5, [5]),
        (32 * 1024 - 1, [32 * 1024 - 1]),
        (32 * 1024, [32 * 1024]),
        (100_000, [32 * 1024] * 3),
        (SEND_AT_ONCE_BYTES, [32 * 1024] * 8),
    ):
        assert [len(part) for part in packets.room(most)] == sizes


def test_padding_shows_nothing_of_what_was_there_before() -> None:
    packets = DataPackets()
    for _ in range(2):
        packets.data[0][:] = b"x" * len(packets.data[0])
        plain = packets.plain(0, 1, 5)
        assert plain[10:].tobytes() == b"xxxxx" + bytes(plain[0])


def test_a_changed_byte_is_noticed() -> None:
    wire = Wire()
    sender(wire).send_message(message(b"\x5ahello"))
    wire.sent[10] ^= 1
    with pytest.raises(InvalidTag):
        receiver(Wire(bytes(wire.sent))).read_message()


@pytest.mark.parametrize("size", [0, 15, 17, 1 << 20, 0xFFFF_FFF0])
def test_a_senseless_length_is_refused(size: int) -> None:
    with pytest.raises(Exception, match="length"):
        receiver(Wire(size.to_bytes(4, "big") + bytes(100))).read_message()
    wire = Wire()
    sender(wire).send_data(7, memoryview(b"x"), 100)
    into = receiver(Wire(bytes(wire.sent) + size.to_bytes(4, "big") + bytes(400_000)))
    into.ready_for_data = lambda: True
    with pytest.raises(SSHException, match="length"):
        into.read_message()


def test_data_waits_for_paramiko_during_a_key_exchange() -> None:
    wire = Wire()
    sender(wire).send_data(7, memoryview(b"x"), 100)
    kind, got = receiver(Wire(bytes(wire.sent))).read_message()
    assert kind == 94
    assert (got.get_int(), got.get_binary()) == (7, b"x")


def test_new_keys_are_wanted_after_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastPacketizer, "REKEY_BYTES", 10_000)
    wire = Wire()
    out = sender(wire)
    out.send_data(1, memoryview(bytes(9_000)), 1000)
    assert not out.need_rekey()
    out.send_data(1, memoryview(bytes(2_000)), 1000)
    assert out.need_rekey()
    into = receiver(Wire(bytes(wire.sent)))
    into.ready_for_data = lambda: True
    with pytest.raises(NeedRekeyException):
        into.read_message()


def test_parsing_costs_little(record_property: Callable[[str, object], None]) -> None:
    """A guard against an accidental copy of everything: 64 MB in well under a second."""
    wire = Wire()
    out = sender(wire)
    for _ in range(512):
        out.send_data(1, memoryview(bytes(128 * 1024)), 32 * 1024)
    into = receiver(Wire(bytes(wire.sent)))
    into.ready_for_data = lambda: True
    start = time.perf_counter()
    with pytest.raises(EOFError):
        into.read_message()
    elapsed = time.perf_counter() - start
    record_property("MB/s", 64 / elapsed)
    assert elapsed < 5
