"""The guest's end of :mod:`wherry_sync.packing`, with the system's own library if it has one.

Python has a module for zstd from 3.14 on only. To pack, it is used at one of its fast levels.
zlib, which Python always has, does not pay: in emulation it packs Python's sources at 4.4 MB/s
(level 1, to 1/3.3), zstd at 12 (level 1, to 1/3.6) or 60 (level -3, to 1/2.9). 40 MB of them over
ssh, on a computer that was as busy each time, took 34 s as they are, 33 with zlib, 27 and 18 with
zstd at these levels. Nor does zlib to unpack: it does that more slowly than the cipher works.
"""

from __future__ import annotations

import ctypes

from wherry_sync.packing import split
from wherry_wire.frames import WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LEVEL = -3


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


def compress(data: bytes) -> bytes:
    """Return bytes compressed by the system's library; fits :class:`Packer`."""
    # What does not get smaller need not fit.
    buffer = ctypes.create_string_buffer(len(data))
    size = _library.ZSTD_compress(buffer, len(data), data, len(data), _LEVEL)
    # An error is a number above any size.
    return ctypes.string_at(buffer, size) if size < len(data) else data


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
