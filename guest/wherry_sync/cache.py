"""What a scanner knows, in a file: so that a new process need not read all contents again.

The file holds, for each directory, the names with the records and entries that the scanner would
trust itself (see :mod:`wherry_sync.records`); no problems, nothing that is ignored. A record
from a file is used as one from memory is: it has to equal what the system says now.

What the records cannot tell, the caller has to: a token that is written into the file, and a
file with another one is not used. Contents that were written shortly before a loss of power may
be gone though the times say otherwise (ext4 writes an inode's times and a file's overwritten
blocks apart), so the token must be another one after a loss of power.

What is stored through a mapping into a page that is dirty already shows in no time, and between
two processes nobody watches. But a page is dirty for half a minute at most, until it is written
back (``vm.dirty_expire_centisecs``), and the store that made it dirty shows. So files that were
modified shortly before the cache is saved are left out.

The file is written beside its place and renamed. It is not flushed: one that a crash has
damaged has a wrong checksum, and is as good as none.

======================= ======================================================
``wherry-scan\\x02``     what this is, and the version of all that follows
32 bytes                BLAKE2b of the rest
length, token           32 bits, big-endian, as all lengths; UTF-8
record, leaf            of a root that is a file: each with its length; else empty
directories             each before those in it, see :func:`_pack`
======================= ======================================================
"""

from __future__ import annotations

import itertools
import os
import struct
import time

from wherry_sync import handles, hashing, records
from wherry_sync.entry import EMPTY, FILE, LINK, MAX_DEPTH, Directory, Leaf
from wherry_sync.known import Records
from wherry_sync.scan import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from wherry_sync.entry import Entry

    Known = tuple[Node, tuple[bytes, Leaf]]

_MAGIC = b"wherry-scan\x02"
_LENGTH = struct.Struct(">I")
# Names' bytes; files, links and directories.
_COUNTS = struct.Struct(">IIII")
_LEAF_BYTES = 42
_INODE_BYTES = 8
_MODIFIED_NS = slice(20, 28)
_RECENT_NS = 120_000_000_000
_PARTS = 4096


def save(path: str, known: Known, trust: str) -> None:
    """Write what a scanner knows.

    :param trust: what :func:`load` has to be given.
    :raises OSError: it cannot be written; an older file is still there.
    """
    new = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(new, flags, 0o600)
    try:
        # Some at a time: all of it at once would take as much memory as what is known.
        state = hashing.new()
        os.lseek(descriptor, len(_MAGIC) + len(hashing.EMPTY_DIGEST), os.SEEK_SET)
        parts = _parts(known, trust, time.time_ns())
        while data := b"".join(itertools.islice(parts, _PARTS)):
            state.update(data)
            handles.write_all(descriptor, data)
        handles.write_at(descriptor, _MAGIC + state.digest(), 0)
    except BaseException:
        os.unlink(new)
        raise
    finally:
        os.close(descriptor)
    os.replace(new, path)


def load(path: str, trust: str) -> Known | None:
    """Return what a scanner knew; None if there is no such file, or none that can be used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read()
    except OSError:
        return None
    return decode(data, trust)


def encode(known: Known, trust: str, now_ns: int) -> bytes:
    """Return a file's contents."""
    body = b"".join(_parts(known, trust, now_ns))
    return _MAGIC + hashing.digest(body) + body


def _parts(known: Known, trust: str, now_ns: int) -> Iterator[bytes]:
    """Yield what comes after the digest, in small pieces; none of them is empty."""
    # The bytes of two times compare as the times do, from 1970 on.
    before = max(0, now_ns - _RECENT_NS).to_bytes(8, "big")
    node, (record, leaf) = known
    if not _is_kept(record, before):
        record, leaf = b"", Leaf(b"")
    yield from (_sized(trust.encode()), _sized(record), _sized(leaf))
    yield from _pack(node, before)


def decode(data: bytes, trust: str) -> Known | None:
    """Return what is in a file's contents; None if they are no such file's, or not for us."""
    start = len(_MAGIC) + len(hashing.EMPTY_DIGEST)
    if not data.startswith(_MAGIC) or data[len(_MAGIC) : start] != hashing.digest(
        memoryview(data)[start:]
    ):
        return None
    reader = _Reader(data, start)
    try:
        if reader.sized() != trust.encode():
            return None
        record, leaf = reader.sized(), Leaf(reader.sized())
        node = reader.node(0)
    except (ValueError, struct.error):
        return None
    if reader.offset != len(data) or (record and leaf[:1] not in (b"F", b"L")):
        return None
    return node, (record, leaf)


def _sized(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _is_kept(record: bytes, before: bytes) -> bool:
    return len(record) == records.STATUS.size and record[_MODIFIED_NS] < before


def _pack(node: Node, before: bytes) -> Iterator[bytes]:
    """Yield a directory, then all below it.

    Counts; the names of files, links and directories in this order, with a NUL between any two;
    the records of files and links; the files' entries; the links', each with its length; the
    directories' inodes.
    """
    children = node.entry.children
    files: list[str] = []
    links: list[str] = []
    known = node.records.unpacked()
    for name, record in known.items():
        leaf = children.get(name)
        if len(record) == records.STATUS.size and isinstance(leaf, Leaf):
            if leaf[0] == FILE:
                if record[_MODIFIED_NS] < before:
                    files.append(name)
            elif leaf[0] == LINK:
                links.append(name)
    directories = [name for name in node.nodes if len(known.get(name, b"")) == _INODE_BYTES]
    names = "\0".join([*files, *links, *directories]).encode()
    yield _COUNTS.pack(len(names), len(files), len(links), len(directories)) + names
    yield from (known[name] for name in files)
    yield from (known[name] for name in links)
    yield from (children[name] for name in files)  # type: ignore[misc]
    yield from (_sized(children[name]) for name in links)  # type: ignore[arg-type]
    yield from (known[name] for name in directories)
    for name in directories:
        yield from _pack(node.nodes[name], before)


class _Reader:
    """Reads a file's contents from an offset on.

    All methods raise ValueError or struct.error if they cannot be such a file's.
    """

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self.offset = offset
        # One object for a name, in however many directories it is.
        self._names: dict[str, str] = {}

    def take(self, size: int) -> bytes:
        start = self.offset
        self.offset = start + size
        if self.offset > len(self._data):
            raise ValueError("the file is too short")
        return self._data[start : self.offset]

    def sized(self) -> bytes:
        return self.take(_LENGTH.unpack(self.take(_LENGTH.size))[0])

    def pieces(self, count: int, size: int) -> list[bytes]:
        data = self.take(count * size)
        return [data[start : start + size] for start in range(0, len(data), size)]

    def node(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise ValueError("the tree is too deep")
        length, files, links, directories = _COUNTS.unpack(self.take(_COUNTS.size))
        text = self.take(length).decode()
        once = self._names.setdefault
        names = [once(name, name) for name in text.split("\0")] if text else []
        if len(names) != files + links + directories or len(set(names)) != len(names):
            raise ValueError("the names are not those that were counted")
        known = dict(zip(names, self.pieces(files + links, records.STATUS.size), strict=False))
        children: dict[str, Entry] = dict(
            zip(names, map(Leaf, self.pieces(files, _LEAF_BYTES)), strict=False)
        )
        for name in names[files : files + links]:
            children[name] = Leaf(self.sized())
        if any(leaf[:1] not in (b"F", b"L") for leaf in children.values()):  # type: ignore[index]
            raise ValueError("an entry is of no kind that is kept")
        inodes = self.pieces(directories, _INODE_BYTES)
        nodes: dict[str, Node] = {}
        for name, inode in zip(names[files + links :], inodes, strict=True):
            known[name] = inode
            nodes[name] = child = self.node(depth + 1)
            children[name] = child.entry
        return Node(Directory(children) if children else EMPTY, Records(known), nodes)
