"""Contents that go compressed by zstd, where that saves time.

In emulation the guest's cipher lets through some 30 MB/s to it and 17 MB/s from it, and either
end packs and unpacks several times that; with hardware acceleration SSH brings 500 MB/s, and
compression would be the slower of the two. So both are measured under way.
"""

from __future__ import annotations

import struct
import time

from wherry_sync import wire
from wherry_wire.frames import MAX_PAYLOAD_BYTES, Frame, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LENGTH = struct.Struct(">I")
_WEIGHT = 0.2
_TRY_AGAIN = 32
"""Frames that go as they are before one is compressed again to see whether that pays now."""


class Packer:
    """Makes the bulk frames of contents for one connection. One thread at a time.

    :param compress: returns bytes as a zstd frame that tells their size.
    """

    def __init__(self, compress: Callable[[bytes], bytes]) -> None:
        self._compress = compress
        # Of a byte of contents, in seconds; to begin with such that it is tried.
        self._packing_s = 0.0
        self._link_s = 1e-8
        self._saved = 0.5
        self._plain = 0

    def sent(self, size: int, seconds: float) -> None:
        """Learn how long the connection took for some bytes."""
        self._link_s += _WEIGHT * (seconds / size - self._link_s)

    def __call__(self, payload: bytes) -> bytes:
        """Return the bulk frame of a piece of contents."""
        if self._packing_s > self._link_s * self._saved and self._plain < _TRY_AGAIN:
            self._plain += 1
            return wire.plain(payload)
        self._plain = 0
        begun = time.perf_counter()
        packed = self._compress(payload)
        took = time.perf_counter() - begun
        self._packing_s += _WEIGHT * (took / len(payload) - self._packing_s)
        saved = 1 - len(packed) / len(payload)
        self._saved += _WEIGHT * (saved - self._saved)
        if saved < 0.05:
            return wire.plain(payload)
        return Frame(wire.PACKED, 0, _LENGTH.pack(len(payload)) + packed).encode()


def split(payload: bytes) -> tuple[int, bytes]:
    """Return the length of contents that come in a packed frame's payload, and the zstd frame.

    :raises WireError: it is none.
    """
    if len(payload) < _LENGTH.size:
        raise WireError("contents are packed wrongly")
    (length,) = _LENGTH.unpack_from(payload)
    if length > MAX_PAYLOAD_BYTES:
        raise WireError("contents are packed too large")
    return length, payload[_LENGTH.size :]
