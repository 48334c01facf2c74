"""When a digest of an earlier scan may stand for a file's contents.

A record is what ``lstat`` said when the file was read: mode, inode, size, time of modification
and time of change. The digest holds as long as all are the same; the time of change is in it
because nobody can set it back (stat(2)). Git's racy rule adds: if the record was made within
the clock's granularity of the last change, another change could leave all of it the same, so
such a record is not kept and the next scan reads the file again.

A write to a mapped page that is dirty already changes no time until the page was written back
(mmap(2), ``MAP_SHARED``): who knows of mappings has to tell the scan about them.
"""

from __future__ import annotations

import os
import struct

STATUS = struct.Struct(">IQQqq")
INODE = slice(4, 12)
"""Where in a record the inode's number is."""

COARSE_NS = 20_000_000
"""Two ticks of the slowest kernel clock (100 Hz), which stamps the files."""

WHOLE_SECONDS_NS = 4_000_000_000
"""Twice the 2 s that FAT stores; HFS+ stores 1 s."""


def record(status: os.stat_result) -> bytes:
    """Return what must stay the same for a digest to hold."""
    return STATUS.pack(
        status.st_mode,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def inode(status: os.stat_result) -> bytes:
    """Return a record of which nothing holds but what :data:`INODE` is."""
    return record(status)[: INODE.stop]


def settled(status: os.stat_result, now_ns: int, granularity_ns: int) -> bool:
    """Whether a change after ``now_ns`` would show in the record.

    :param now_ns: the wall clock, read before the file's status and contents were.
    :param granularity_ns: see :func:`granularity_ns`.
    """
    return granularity_ns == 0 or status.st_ctime_ns < now_ns - granularity_ns


def granularity_ns(fd: int, name: str) -> int:
    """Measure how far apart two changes must be to get different times.

    Zero if each change that follows a look at the times gets a new one, as on Linux from 6.13
    ("multigrain timestamps"): then every record is good at once.

    :param fd: a directory of the filesystem in question.
    :param name: of a file to make there and remove.
    :raises OSError: the file cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=fd)
    try:
        times = []
        for _ in range(8):
            os.pwrite(descriptor, b"x", 0)
            times.append(os.fstat(descriptor).st_ctime_ns)
    finally:
        os.close(descriptor)
        os.unlink(name, dir_fd=fd)
    if all(time % 1_000_000_000 == 0 for time in times):
        return WHOLE_SECONDS_NS
    return 0 if len(set(times)) == len(times) else COARSE_NS
