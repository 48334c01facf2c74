"""The digest of a file's contents: BLAKE2b with 256 bits.

Chosen by measurement among what ``hashlib`` has on both ends. On a host with SHA instructions
SHA-256 is about twice as fast (1900 against 1300 MB/s), but both are faster than any link to
the guest; what counts is the guest. Under emulation (TCG, ``-cpu max``) SHA-256 makes 62 MB/s,
SHA-1 147, BLAKE2b 154 and BLAKE2s 81; a small file of 4 KiB takes 30 µs instead of 60. MD5
would make 387, but a container chooses contents freely, so collisions must not be findable.
"""

from __future__ import annotations

import os
from hashlib import blake2b

from wherry_sync.entry import DIGEST_BYTES

CHUNK_BYTES = 256 * 1024


def new() -> blake2b:
    """Return an empty hash."""
    return blake2b(digest_size=DIGEST_BYTES)


def digest(data: bytes) -> bytes:
    """Return the digest of some bytes."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


EMPTY_DIGEST = digest(b"")


def read_digest(descriptor: int, size: int) -> tuple[bytes, int]:
    """Return the digest of a file's first bytes, and how many there were.

    :param descriptor: a regular file; its position is neither used nor moved.
    :param size: bytes to read at most.
    :raises OSError: it cannot be read.
    """
    if size <= CHUNK_BYTES:
        data = os.pread(descriptor, size, 0)
        if len(data) == size or not data:
            return digest(data), len(data)
    state = new()
    done = 0
    while done < size:
        data = os.pread(descriptor, min(CHUNK_BYTES, size - done), done)
        if not data:
            break
        state.update(data)
        done += len(data)
    return state.digest(), done
