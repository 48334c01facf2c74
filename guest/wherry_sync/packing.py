"""Contents that go compressed by zstd, where that saves time.

In emulation the guest's cipher lets through some 30 MB/s to it and 17 MB/s from it, and either
end packs and unpacks several times that; with hardware acceleration SSH brings 500 MB/s, and
compression would be the slower of the two. So both are measured under way.

The guest uses the system's own library if it has one, as Python has a module for it from 3.14 on
only, at one of zstd's fast levels. zlib, which Python always has, does not pay there: in emulation
it packs Python's sources at 4.4 MB/s (level 1, to 1/3.3), zstd at 12 (level 1, to 1/3.6) or 60
(level -3, to 1/2.9). 40 MB of them over ssh, on a computer that was as busy each time, took 34 s
as they are, 33 with zlib, 27 and 18 with zstd at these levels.
"""

from __future__ import annotations

import ctypes
import struct
import time

from wherry_sync import wire
from wherry_wire.frames import MAX_PAYLOAD_BYTES, Frame, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_LENGTH = struct.Struct(">I")
_LEVEL = -3
_WEIGHT = 0.2
_TRY_AGAIN = 32
"""Frames that go as they are before one is compressed again to see whether that pays now."""


def _load() -> Any:
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return None
    # zstd.h
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.ZSTD_compress.restype = ctypes.c_size_t
    library.ZSTD_compress.argtypes = [*library.ZSTD_decompress.argtypes, ctypes.c_int]
    return library


_library = _load()


def available() -> bool:
    """Whether this system has the library."""
    return _library is not None


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


def compress(data: bytes) -> bytes:
    """Return bytes compressed by the system's library; fits :class:`Packer`."""
    # What does not get smaller need not fit.
    buffer = ctypes.create_string_buffer(len(data))
    size = _library.ZSTD_compress(buffer, len(data), data, len(data), _LEVEL)
    # An error is a number above any size.
    return ctypes.string_at(buffer, size) if size < len(data) else data


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


def unpack(payload: bytes) -> bytes:
    """Return the piece of contents in a packed frame's payload, by the system's library.

    :raises WireError: there is none.
    """
    if _library is None:
        raise WireError("contents are packed as nobody asked for")
    length, data = split(payload)
    buffer = ctypes.create_string_buffer(length)
    # An error is a number above any size.
    if _library.ZSTD_decompress(buffer, length, data, len(data)) != length:
        raise WireError("contents are packed wrongly")
    return buffer.raw
