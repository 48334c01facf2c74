"""The host's end of :mod:`wherry_sync.packing`, with a library of its own."""

from __future__ import annotations

import zstandard

from wherry_sync.packing import Packer, split
from wherry_wire.frames import WireError

_LEVEL = 1


def packer() -> Packer:
    """Return what makes the bulk frames of contents for one connection to the guest."""
    return Packer(zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress)


def unpack(payload: bytes) -> bytes:
    """Return the piece of contents in a packed frame's payload, from a guest that is not trusted.

    :raises WireError: there is none.
    """
    length, data = split(payload)
    try:
        # What the frame says of its size is believed by the library, and would be allocated.
        if zstandard.frame_content_size(data) != length:
            raise WireError("contents are packed wrongly")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError("contents are packed wrongly") from error
