"""The tree: what there is at each path, as far as the other end should know.

An entry is a :class:`Leaf` or a :class:`Directory`; a path with nothing there has ``None``.
Invariants, on which everything else rests:

* Entries never change. A new tree shares with the old one all that is equal, so "nothing
  changed below here" is usually seen by identity; see :func:`share` and :func:`updated`.
* Equality is about what is synchronised: kind, contents, executable bit, target. Owner, other
  permission bits and times are not in it, they belong to each end alone.
* No tree is deeper than :data:`MAX_DEPTH`, so recursion over it is safe.
* Every name has passed :func:`name_problem`: it is one component and not special.

A path is its names joined by ``/``; the root's is empty.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILE, LINK, UNTRACKED, PROBLEM = b"FLUP"

DIGEST_BYTES = 32
MAX_DEPTH = 128
"""Directories below the root. Each costs a scan one open descriptor; macOS grants 256."""

MAX_NAME_BYTES = 255
TEMPORARY_PREFIX = ".wherry-"
"""Names that are ours wherever they are: never synchronised."""

_FILE = struct.Struct(f">BBQ{DIGEST_BYTES}s")


class Leaf(bytes):
    """What is not a directory: its kind and, by kind, the rest, in one object.

    ========= ===================================================================
    FILE      executable bit, size, digest: 42 bytes
    LINK      the target, as it is in the link; never followed
    UNTRACKED something is there that is never sent: ignored, or no file, link or
              directory. It can be in the way
    PROBLEM   a reason: what is there cannot be told now. No conclusion may be
              drawn from it, least of all that something was deleted
    ========= ===================================================================

    Made of bytes because there are hundreds of thousands: such an object is compact, and already
    in the form that is stored and sent.
    """

    __slots__ = ()

    @property
    def kind(self) -> int:
        """One of the kinds above."""
        return self[0]

    @property
    def executable(self) -> bool:
        """Of a file: whether its owner may run it."""
        return self[0] == FILE and self[1] == 1

    @property
    def size(self) -> int:
        """Of a file: its length in bytes; else 0."""
        return int.from_bytes(self[2:10], "big") if self[0] == FILE else 0

    @property
    def digest(self) -> bytes:
        """Of a file: see :mod:`wherry_sync.hashing`."""
        return self[10:]

    @property
    def target(self) -> bytes:
        """Of a link."""
        return self[1:]

    @property
    def reason(self) -> str:
        """Of a problem, and of something untracked."""
        return self[1:].decode(errors="replace")

    def with_executable(self, executable: bool) -> Leaf:
        """Return the same file with another executable bit."""
        return file(executable, self.size, self.digest)

    def __repr__(self) -> str:
        if self[0] == FILE:
            mark = "*" if self.executable else ""
            return f"<{self.digest.hex()[:8]}{mark} {self.size} bytes>"
        return f"<{chr(self[0])} {bytes(self[1:])!r}>"


class Directory:
    """A directory: its children by name.

    :ivar children: not to be changed.
    :ivar husk: it holds something untracked and nothing else. Such a directory is left
        behind when a deletion cannot take what is ignored; it is a directory where the other
        end or the ancestor has one, and else it counts as untracked. So it is not created
        elsewhere, and a deleted one does not come back.
    """

    __slots__ = ("children", "husk")

    def __init__(self, children: Mapping[str, Entry]) -> None:
        self.children = children
        self.husk = bool(children) and all(is_untracked(child) for child in children.values())

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Directory) and self.children == other.children

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Directory({self.children!r})"


Entry = Leaf | Directory

EMPTY = Directory({})


def file(executable: bool, size: int, digest: bytes) -> Leaf:
    """Return a file's entry."""
    return Leaf(_FILE.pack(FILE, executable, size, digest))


def link(target: bytes) -> Leaf:
    """Return a symbolic link's entry."""
    return Leaf(b"L" + target)


def untracked(reason: str) -> Leaf:
    """Return the entry of something that is there but never sent."""
    return Leaf(b"U" + reason.encode(errors="replace"))


def problem(reason: str) -> Leaf:
    """Return the entry of something that cannot be told now."""
    return Leaf(b"P" + reason.encode(errors="replace"))


IGNORED = untracked("ignored")


def is_file(entry: Entry | None) -> bool:
    """Whether it is a regular file."""
    return isinstance(entry, Leaf) and entry[0] == FILE


def is_untracked(entry: Entry | None) -> bool:
    """Whether something is there that the other end should not know of."""
    if isinstance(entry, Leaf):
        return entry[0] == UNTRACKED
    return entry is not None and entry.husk


def is_problem(entry: Entry | None) -> bool:
    """Whether no conclusion may be drawn from it."""
    return isinstance(entry, Leaf) and entry[0] == PROBLEM


def name_problem(name: str) -> str | None:
    """Return why a name cannot be synchronised, or None if it can.

    Names from the other end pass here before anything else looks at them.
    """
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        return "its name is not a file's name"
    if name.startswith(TEMPORARY_PREFIX):
        return "its name is reserved"
    if not name.isascii():
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            return "its name is not valid UTF-8"
    else:
        size = len(name)
    return "its name is too long" if size > MAX_NAME_BYTES else None


def join(path: str, name: str) -> str:
    """Return the path of a child."""
    return f"{path}/{name}" if path else name


def split(path: str) -> tuple[str, str]:
    """Return the parent's path, and the name in it."""
    parent, _, name = path.rpartition("/")
    return parent, name


def lookup(root: Entry | None, path: str) -> Entry | None:
    """Return what the tree has at a path."""
    found = root
    for name in path.split("/") if path else ():
        if not isinstance(found, Directory):
            return None
        found = found.children.get(name)
    return found


def walk(entry: Entry | None, path: str = "") -> Iterator[tuple[str, Entry]]:
    """Yield every path with its entry, a directory before what is in it."""
    if entry is None:
        return
    yield path, entry
    if isinstance(entry, Directory):
        for name, child in entry.children.items():
            yield from walk(child, join(path, name))


def count(entry: Entry | None) -> int:
    """Return the number of entries of a tree, its root included."""
    if isinstance(entry, Directory):
        return 1 + sum(count(child) for child in entry.children.values())
    return entry is not None


def tracked(entry: Entry | None) -> Entry | None:
    """Return the tree without what is untracked or a problem: what an ancestor may hold."""
    if isinstance(entry, Directory):
        children = {name: tracked(child) for name, child in entry.children.items()}
        return Directory({name: child for name, child in children.items() if child is not None})
    return None if entry is not None and entry[0] in (UNTRACKED, PROBLEM) else entry


def share(new: Entry | None, old: Entry | None) -> Entry | None:
    """Return ``new``, with the objects of ``old`` wherever the two are equal.

    Three trees that agree then take the memory of one.
    """
    if new is old or not isinstance(new, Directory) or not isinstance(old, Directory):
        return old if new == old else new
    same = len(new.children) == len(old.children)
    children: dict[str, Entry] = {}
    # In the order of the old one, whose names are taken over as well.
    for name, before in old.children.items():
        after = new.children.get(name)
        if after is None:
            same = False
            continue
        shared = share(after, before)
        assert shared is not None
        same = same and shared is before
        children[name] = shared
    if same:
        return old
    for name, after in new.children.items():
        children.setdefault(name, after)
    return Directory(children)


def updated(root: Entry | None, changes: Mapping[str, Entry | None]) -> Entry | None:
    """Return the tree with other entries at some paths; what is not concerned is shared.

    An empty :class:`Directory` put where a directory is leaves that one's children alone, so a
    list of paths and shallow entries describes any change, in any order. A missing parent is
    made; what is below a removed directory goes with it.
    """
    own = root
    below: dict[str, dict[str, Entry | None]] = {}
    for path, entry in changes.items():
        if path == "":
            shallow = isinstance(entry, Directory) and not entry.children
            own = root if shallow and isinstance(root, Directory) else entry
        else:
            name, _, rest = path.partition("/")
            below.setdefault(name, {})[rest] = entry
    if not below:
        return own
    children = dict(own.children) if isinstance(own, Directory) else {}
    for name in list(below):
        # What is done needs no memory any more.
        child = updated(children.get(name), below.pop(name))
        if child is None:
            children.pop(name, None)
        else:
            children[name] = child
    return Directory(children) if children or isinstance(own, Directory) else own
