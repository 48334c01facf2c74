"""Unpacking contents that come compressed by zstd, with the system's own library if it has one.

Python has a module for it from 3.14 on only. Under emulation it unpacks three to ten times as
fast as SSH's cipher brings the bytes, so to send a quarter of them is what makes a first
synchronisation short; zlib unpacks more slowly than the cipher works.
"""

from __future__ import annotations

import ctypes
import struct

from wherry_wire.frames import MAX_PAYLOAD_BYTES, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LENGTH = struct.Struct(">I")


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
    return library


_library = _load()


def available() -> bool:
    """Whether this system has the library."""
    return _library is not None


def unpack(payload: bytes) -> bytes:
    """Return the piece of contents in a packed frame's payload.

    :raises WireError: there is none.
    """
    if _library is None or len(payload) < _LENGTH.size:
        raise WireError("contents are packed as nobody asked for")
    (length,) = _LENGTH.unpack_from(payload)
    if length > MAX_PAYLOAD_BYTES:
        raise WireError("contents are packed too large")
    data = payload[_LENGTH.size :]
    buffer = ctypes.create_string_buffer(length)
    # An error is a number above any size.
    if _library.ZSTD_decompress(buffer, length, data, len(data)) != length:
        raise WireError("contents are packed wrongly")
    return buffer.raw
