"""What a scanner knows of files that it need not read, hundreds of thousands, in little memory."""

from __future__ import annotations

import struct
from bisect import bisect_left

from wherry_sync import records
from wherry_sync.entry import Leaf, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

NEVER = b""
"""In place of a record: nothing holds."""


class Records:
    """The records of what is in a directory, by name; there are hundreds of thousands.

    Whole ones lie end to end in the order of their names, which takes half of what a dictionary
    does. The others, of directories and of what was only just written, are few.
    """

    __slots__ = ("_names", "_others", "_packed")

    def __init__(self, known: Mapping[str, bytes]) -> None:
        whole = records.STATUS.size
        self._names = tuple(sorted(name for name in known if len(known[name]) == whole))
        self._packed = b"".join([known[name] for name in self._names])
        self._others = {name: each for name, each in known.items() if len(each) != whole}

    def unpacked(self) -> dict[str, bytes]:
        """Return all of them, to look up many."""
        whole, packed = records.STATUS.size, self._packed
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
        return self._packed[at * records.STATUS.size : (at + 1) * records.STATUS.size]


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
            leaf = record + records.STATUS.size
            name = packed[at + self._HEAD.size : record].decode()
            at = leaf + leaf_bytes
            found[name] = packed[record:leaf], packed[leaf:at]
        return found
