"""Compressed contents: what is packed can be unpacked, and nothing else can."""

from __future__ import annotations

import os

import pytest

from wherry.sync.packing import Packer
from wherry_sync import packing, wire
from wherry_wire.frames import MAX_PAYLOAD_BYTES, Decoder, Frame, WireError

needs_library = pytest.mark.skipif(not packing.available(), reason="needs libzstd.so.1")


def frame_of(data: bytes) -> Frame:
    (frame,) = Decoder().feed(data)
    return frame


@needs_library
@pytest.mark.parametrize("size", [1, 1000, MAX_PAYLOAD_BYTES])
def test_what_is_packed_can_be_unpacked(size: int) -> None:
    payload = (b"some text that comes again " * 10_000)[:size]
    frame = frame_of(Packer()(payload))
    found = packing.unpack(frame.payload) if frame.type == wire.PACKED else frame.payload
    assert found == payload
    assert size < 1000 or len(frame.payload) < size / 10


def test_what_does_not_get_smaller_goes_as_it_is() -> None:
    packer = Packer()
    payload = os.urandom(MAX_PAYLOAD_BYTES)
    assert frame_of(packer(payload)).type == wire.CONTENTS


def test_a_fast_connection_gets_plain_frames_and_a_slow_one_packed_ones() -> None:
    packer = Packer()
    payload = bytes(range(256)) * 512
    for _ in range(40):
        packer(payload)
        packer.sent(1 << 20, 1e-9)
    kinds = [frame_of(packer(payload)).type for _ in range(20)]
    assert kinds.count(wire.CONTENTS) >= 18
    for _ in range(80):
        packer(payload)
        packer.sent(1 << 20, 1.0)
    assert frame_of(packer(payload)).type == wire.PACKED


@needs_library
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0",
        b"\xff\xff\xff\xff" + b"x" * 20,
        b"\0\0\0\x05hello",
        frame_of(Packer()(bytes(1000))).payload.replace(b"\0\0\x03\xe8", b"\0\0\x03\xe7", 1),
        frame_of(Packer()(bytes(1000))).payload.replace(b"\0\0\x03\xe8", b"\0\0\x03\xe9", 1),
        frame_of(Packer()(bytes(1000))).payload[:-2],
    ],
)
def test_what_is_not_packed_so_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        packing.unpack(payload)
