"""cpio archives in the "newc" format, which the kernel unpacks as its initramfs.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A file or directory: `path` has no leading slash, `mode` includes the type bits."""

    path: str
    mode: int
    data: bytes = b""


def directory(path: str) -> Entry:
    """Return a directory that everyone can read."""
    return Entry(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    """Return a regular file."""
    return Entry(path, stat.S_IFREG | mode, data)


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive of `entries` in their order, owned by root, dated 0."""
    parts = [
        _record(number, entry.path, entry.mode, entry.data)
        for number, entry in enumerate(entries, start=1)
    ]
    parts.append(_record(0, "TRAILER!!!", 0, b""))
    return b"".join(parts)


def _record(inode: int, path: str, mode: int, data: bytes) -> bytes:
    name = path.encode() + b"\0"
    links, uid, gid, mtime, device = 1, 0, 0, 0, (0, 0, 0, 0)
    numbers = (inode, mode, uid, gid, links, mtime, len(data), *device, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    return _padded(header + name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
