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
from bisect import bisect_left

from wherry_sync.entry import Leaf, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

STATUS = struct.Struct(">IQQqq")
INODE = slice(4, 12)
"""Where in a record the inode's number is."""

COARSE_NS = 20_000_000
"""Two ticks of the slowest kernel clock (100 Hz), which stamps the files."""

WHOLE_SECONDS_NS = 4_000_000_000
"""Twice the 2 s that FAT stores; HFS+ stores 1 s."""


NEVER = b""
"""In place of a record: nothing holds."""


class Records:
    """The records of what is in a directory, by name; there are hundreds of thousands.

    Whole ones lie end to end in the order of their names, which takes half of what a dictionary
    does. The others, of directories and of what was only just written, are few.
    """

    __slots__ = ("_names", "_others", "_packed")

    def __init__(self, records: Mapping[str, bytes]) -> None:
        whole = STATUS.size
        self._names = tuple(sorted(name for name in records if len(records[name]) == whole))
        self._packed = b"".join([records[name] for name in self._names])
        self._others = {name: each for name, each in records.items() if len(each) != whole}

    def unpacked(self) -> dict[str, bytes]:
        """Return all of them, to look up many."""
        whole, packed = STATUS.size, self._packed
        pieces = [packed[start : start + whole] for start in range(0, len(packed), whole)]
        found = dict(zip(self._names, pieces, strict=True))
        for name, other in self._others.items():
            if other:
                found[name] = other
            else:
                del found[name]
        return found

    def get(self, name: str) -> bytes:
        """Return one of them, or :data:`NEVER`."""
        other = self._others.get(name)
        return self._whole(name) if other is None else other

    def forget(self, name: str) -> None:
        """Let nothing hold for a name."""
        if self._whole(name):
            self._others[name] = NEVER
        else:
            self._others.pop(name, None)

    def _whole(self, name: str) -> bytes:
        at = bisect_left(self._names, name)
        if at == len(self._names) or self._names[at] != name:
            return NEVER
        return self._packed[at * STATUS.size : (at + 1) * STATUS.size]


class Notes:
    """What the next scan is to know of files without reading them: by path, record and entry.

    After a first synchronisation they are as many as the files, all at once, and a moment later
    none: as objects they would leave holes in memory that are larger than what is needed for
    good. So those of one directory are one piece of bytes, and objects while that is looked at.
    """

    __slots__ = ("_open", "_packed", "_parent")

    _HEAD = struct.Struct(">HI")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._packed: dict[str, bytearray] = {}
        self._parent = ""
        self._open: dict[str, tuple[bytes, bytes]] = {}

    def put(self, path: str, record: bytes, leaf: bytes) -> None:
        """Note a file, in place of what there is of that path."""
        parent, name = split(path)
        if parent == self._parent:
            self._open[name] = record, leaf
        else:
            self._pack(parent, name, record, leaf)

    def pop(self, path: str) -> tuple[bytes, Leaf] | None:
        """Return a file's record and entry, and forget them."""
        parent, name = split(path)
        if parent != self._parent:
            if parent not in self._packed:
                return None
            for other, (record, leaf) in self._open.items():
                self._pack(self._parent, other, record, leaf)
            self._parent, self._open = parent, self._unpacked(parent)
        found = self._open.pop(name, None)
        return None if found is None else (found[0], Leaf(found[1]))

    def _pack(self, parent: str, name: str, record: bytes, leaf: bytes) -> None:
        packed = self._packed.setdefault(parent, bytearray())
        data = name.encode()
        packed += self._HEAD.pack(len(data), len(leaf)) + data + record + leaf

    def _unpacked(self, parent: str) -> dict[str, tuple[bytes, bytes]]:
        packed = bytes(self._packed.pop(parent))
        found, at = {}, 0
        while at < len(packed):
            name_bytes, leaf_bytes = self._HEAD.unpack_from(packed, at)
            record = at + self._HEAD.size + name_bytes
            leaf = record + STATUS.size
            name = packed[at + self._HEAD.size : record].decode()
            at = leaf + leaf_bytes
            found[name] = packed[record:leaf], packed[leaf:at]
        return found


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
