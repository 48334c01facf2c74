"""Reaching what is in a tree by directory descriptors, one name at a time.

Each step is an ``openat`` with ``O_NOFOLLOW``: a directory on the way that was swapped for a
link, by a container or by anyone, makes the step fail. So no path, however it was come by,
leads out of the root. The descriptor that a caller holds stays the directory that was checked,
wherever it is moved to.

This is for POSIX; a system without directory descriptors needs its own version of this module.
Windows is one: it can import what uses this (:data:`POSSIBLE`), and no more.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

POSSIBLE = os.open in os.supports_dir_fd
"""Whether this system has directory descriptors."""


def _flags(*names: str) -> int:
    return sum(getattr(os, name, 0) for name in names)


DIRECTORY_FLAGS = _flags("O_RDONLY", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC")
# A fifo that took a file's place must not block the open.
READ_FLAGS = _flags("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
NEW_FLAGS = _flags("O_RDWR", "O_CREAT", "O_EXCL", "O_NOFOLLOW", "O_CLOEXEC")

HOLE_BYTES = 64 * 1024
"""Zeros that become a hole. Shorter runs save little, and would leave a file in many pieces."""

_ZEROS = bytes(HOLE_BYTES)
_READ_BYTES = 256 * 1024


class Handle:
    """A directory that is kept open; a context manager that closes it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def open_directory(fd: int, path: str) -> Handle:
    """Open a directory below another one.

    :raises OSError: it is missing, or something on the way is not a directory.
    """
    current = os.dup(fd)
    try:
        for name in path.split("/") if path else ():
            following = os.open(name, DIRECTORY_FLAGS, dir_fd=current)
            os.close(current)
            current = following
    except BaseException:
        os.close(current)
        raise
    return Handle(current)


def status(fd: int, name: str) -> os.stat_result | None:
    """Return what is at a name, not following a link; None if there is nothing.

    :raises OSError: it cannot be told.
    """
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def open_regular(fd: int, name: str) -> int:
    """Open a regular file to read it.

    :raises OSError: it is missing, unreadable, or not a regular file.
    """
    descriptor = os.open(name, READ_FLAGS, dir_fd=fd)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return descriptor


def chunks(descriptor: int) -> Iterator[bytes]:
    """Yield a file's contents; its position is neither used nor moved."""
    position = 0
    while data := os.pread(descriptor, _READ_BYTES, position):
        yield data
        position += len(data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` where the file is; a disk that gets full takes a part without a word.

    :raises OSError: the disk is full, or fails.
    """
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])


def write_at(descriptor: int, data: bytes, position: int) -> None:
    """Write all of ``data`` to a place in a file.

    :raises OSError: the disk is full, or fails.
    """
    written = os.pwrite(descriptor, data, position)
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], position + written)


def write_new(descriptor: int, data: bytes, position: int) -> bool:
    """Likewise to where nothing was written yet; whole blocks of zeros are left out, as holes.

    :returns: whether nothing was written at their end, so that the file may be shorter yet.
    """
    begin, end = 0, len(data)
    for start in range(0, end - HOLE_BYTES + 1, HOLE_BYTES):
        if data.startswith(_ZEROS, start):
            if begin < start:
                write_at(descriptor, data[begin:start], position + begin)
            begin = start + HOLE_BYTES
    if begin < end:
        write_at(descriptor, data[begin:] if begin else data, position + begin)
    return begin == end
