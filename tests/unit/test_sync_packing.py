"""Compressed contents: what is packed can be unpacked, and nothing else can."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable

import pytest

from wherry.sync import packing as host
from wherry_guest import packing as guest
from wherry_sync import wire
from wherry_sync.packing import Packer
from wherry_wire.frames import MAX_PAYLOAD_BYTES, Decoder, Frame, WireError

needs_library = pytest.mark.skipif(not guest.available(), reason="needs libzstd.so.1")


ENDS = {
    "to the guest": (host.packer, guest.unpack),
    "from the guest": (lambda: Packer(guest.compress), host.unpack),
}


def frame_of(data: bytes) -> Frame:
    (frame,) = Decoder().feed(data)
    return frame


@needs_library
@pytest.mark.parametrize("size", [1, 1000, MAX_PAYLOAD_BYTES])
@pytest.mark.parametrize("way", ENDS)
def test_what_is_packed_can_be_unpacked(way: str, size: int) -> None:
    packer, unpack = ENDS[way]
    payload = (b"some text that comes again " * 10_000)[:size]
    frame = frame_of(packer()(payload))
    found = unpack(frame.payload) if frame.type == wire.PACKED else frame.payload
    assert found == payload
    assert size < 1000 or len(frame.payload) < size / 10


@needs_library
@pytest.mark.parametrize("way", ENDS)
def test_what_does_not_get_smaller_goes_as_it_is(way: str) -> None:
    packer = ENDS[way][0]()
    payload = os.urandom(MAX_PAYLOAD_BYTES)
    assert frame_of(packer(payload)).type == wire.CONTENTS


def test_a_fast_connection_gets_plain_frames_and_a_slow_one_packed_ones() -> None:
    packer = host.packer()
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
        frame_of(host.packer()(bytes(1000))).payload.replace(b"\0\0\x03\xe8", b"\0\0\x03\xe7", 1),
        frame_of(host.packer()(bytes(1000))).payload.replace(b"\0\0\x03\xe8", b"\0\0\x03\xe9", 1),
        frame_of(host.packer()(bytes(1000))).payload[:-2],
    ],
)
@pytest.mark.parametrize("unpack", [guest.unpack, host.unpack])
def test_what_is_not_packed_so_is_refused(unpack: Callable[[bytes], bytes], payload: bytes) -> None:
    with pytest.raises(WireError):
        unpack(payload)


@pytest.mark.parametrize("announced", [5, 1 << 30])
def test_a_guest_that_lies_of_a_size_gets_no_memory_for_it(announced: int) -> None:
    """As a frame of zstd says it, of no matter what (RFC 8878, 3.1.1.1)."""
    frame = struct.pack(">I", announced) + b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            host.unpack(frame + b"\x01\x00\x00")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
