"""A directory on disk -> its :class:`~wherry_sync.entry.Entry`.

Invariants:

* What has not changed comes back as the same object, so comparing two scans costs what
  changed. A scan that finds nothing new makes no entries.
* A digest is of contents that the file had at one moment. A file that is written while it is
  read is read again; if it only grew, its old length is taken (a log is synchronised by
  prefixes); if it will not hold still it is a problem, and in :attr:`Snapshot.requeue`.
* The scan never leaves the root: no link is followed, no other filesystem entered.
* What cannot be told is a problem at its own path and nowhere else.
"""

from __future__ import annotations

import os
import stat
import time

from wherry_sync import handles, hashing, records
from wherry_sync.blocks import LEAST_BYTES, Sums
from wherry_sync.entry import (
    EMPTY,
    IGNORED,
    MAX_DEPTH,
    TEMPORARY_PREFIX,
    Directory,
    Leaf,
    file,
    join,
    link,
    name_problem,
    problem,
    split,
    untracked,
)
from wherry_sync.ignore import NOTHING, Ignore
from wherry_sync.known import NEVER, Notes, Records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from wherry_sync.entry import Entry

_READS = 3
# In place of a record, known by identity.
_IGNORED_LEAF = b"ignored"
_IGNORED_DIRECTORY = b"ignored/"


class Snapshot:
    """What a scan found.

    :ivar root: the tree; None if there is no root.
    :ivar device: of the filesystem that it is on (``st_dev``).
    :ivar inode: of the root if it is a directory (``st_ino``); 0 if it is none, or not known.
    :ivar requeue: paths to look at again soon, as they were changing.
    :ivar files_read: files whose contents were read, because no record stood for them.
    :ivar bytes_read: their size.
    :ivar written_over: files that were read anew, and are the same inodes as in the last scan.
    """

    __slots__ = ("bytes_read", "device", "files_read", "inode", "requeue", "root", "written_over")

    def __init__(self) -> None:
        self.root: Entry | None = None
        self.device = 0
        self.inode = 0
        self.requeue: set[str] = set()
        self.files_read = 0
        self.bytes_read = 0
        self.written_over: set[str] = set()


class Node:
    """A directory as the last scan left it: its entry, and the records of what is in it."""

    __slots__ = ("entry", "nodes", "records")

    def __init__(self, entry: Directory, records: Records, nodes: dict[str, Node]):
        self.entry = entry
        self.records = records
        self.nodes = nodes


def _wanted(dirty: Collection[str]) -> dict[str, bool]:
    """Return the directories on the way: to be listed (true), or only gone through (false)."""
    wanted = {}
    for path in dirty:
        wanted[path] = True
        while path:
            path = split(path)[0]
            wanted.setdefault(path, False)
    return wanted


def _reason(error: OSError) -> str:
    return error.strerror.lower() if error.strerror else str(error)


class Scanner:
    """Scans one tree, again and again. Not safe for concurrent use.

    :param granularity_ns: of the filesystem's clock; see :func:`records.granularity_ns`.
    :param now_ns: the wall clock.
    :param told: whether who calls :meth:`scan` knows of every file that another process wrote
        to. Then what we wrote ourselves needs not be read, however short ago that was.
    :param progress: called with each directory, and with each piece of a file that is read.
    """

    def __init__(
        self,
        ignore: Ignore = NOTHING,
        *,
        granularity_ns: int = records.COARSE_NS,
        now_ns: Callable[[], int] = time.time_ns,
        told: bool = False,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._told = told
        self._progress = progress
        self.sums = Sums()
        """Of files that were read."""
        self._ignore = ignore
        self._granularity_ns = granularity_ns
        self._now_ns = now_ns
        self._root = Node(EMPTY, Records({}), {})
        self._identity = (0, 0)
        self._file: tuple[bytes, Leaf] = (NEVER, problem(""))
        self._notes = Notes()
        self._trust_ignored = True
        self._found = Snapshot()
        # One object for a name, in however many directories it is.
        self._names: dict[str, str] = {}
        # Inodes that were read and have several names: the record, and the paths read.
        self._linked: dict[bytes, tuple[bytes, set[str]]] = {}
        self.with_links: set[str] = set()
        """Directories with files that have another name, perhaps outside of the tree: a watch of
        the tree does not tell of what is written by that name."""
        self.at = ""
        """The directory, or the file, that is being read."""

    def set_ignore(self, ignore: Ignore) -> None:
        """Take other rules; they hold from the next full scan on."""
        self._ignore = ignore
        self._trust_ignored = False

    def scan(
        self,
        fd: int,
        dirty: Collection[str] | None = None,
        rewritten: Collection[str] = (),
        arrived: Collection[str] = (),
    ) -> Snapshot:
        """Return the tree below a directory.

        :param dirty: the directories whose own entries may have changed; None for all.
            Directories that are new, or not the same inode as before, are always scanned. That
            one is the same inode says little: its number may have been free for a moment.
        :param rewritten: files that are to be read though their records may say that nothing
            has changed. The directories that they are in count as dirty.
        :param arrived: directories of which nothing is to be known any more. Those that they are
            in count as dirty.
        :raises OSError: the root itself cannot be read.
        """
        self._found = found = Snapshot()
        status = os.fstat(fd)
        found.device, found.inode = status.st_dev, status.st_ino
        # What may have changed in one tree says nothing of another that is in its place.
        before, self._identity = self._identity, (status.st_dev, status.st_ino)
        wanted: dict[str, bool] | None = None
        parents = [self._forget(path) for path in arrived]
        parents += [self._distrust(path) for path in rewritten]
        if dirty is not None and self._trust_ignored and self._identity == before:
            wanted = _wanted([*dirty, *parents])
        else:
            self.with_links.clear()
        self._linked.clear()
        self._root = self._visit(fd, "", self._root, 0, wanted)
        if self._linked and (wanted is not None or rewritten):
            others = self._other_names(rewritten)
            if others:
                self._root = self._visit(fd, "", self._root, 0, _wanted(others))
        self.at = ""
        self._names.clear()
        found.root = self._root.entry
        if wanted is None:
            self._trust_ignored = True
            self._notes.clear()
        return found

    def known(self) -> tuple[Node, tuple[bytes, Leaf]]:
        """Return what the next scan could use: of a directory, and of a single file."""
        return self._root, self._file

    def know(self, root: Node, single: tuple[bytes, Leaf]) -> None:
        """Take what another scanner knew, whatever its rules were. The next scan is a full one."""
        self._root, self._file = root, single
        self._trust_ignored = False

    def scan_file(self, fd: int, name: str, *, rewritten: bool = False) -> Snapshot:
        """Return a tree whose root is a file, or anything but a directory.

        :param fd: the directory that it is in.
        :param rewritten: read it though its record may say that nothing has changed.
        :raises OSError: it cannot be told whether it exists.
        """
        self._found = found = Snapshot()
        status = handles.status(fd, name)
        if status is None:
            return found
        found.device = status.st_dev
        if stat.S_ISDIR(status.st_mode):
            found.root = EMPTY
            return found
        kept, leaf = self._file
        current = records.record(status)
        if kept != current or rewritten:
            record, leaf = self._leaf(fd, "", name, status)
            self._file = (record, leaf)
        found.root = leaf
        return found

    def probe(self, fd: int, path: str, name: str) -> tuple[Entry | None, os.stat_result | None]:
        """Return what is at one path now, a directory without its children, and its status.

        :param fd: the directory that it is in.
        :param path: from the root, empty for the root itself.
        """
        status = handles.status(fd, name)
        if status is None:
            return None, None
        if stat.S_ISDIR(status.st_mode):
            return EMPTY, status
        parent = split(path)[0]
        node = self._node(parent)
        if node is not None and path:
            known = node.entry.children.get(name)
            if isinstance(known, Leaf) and node.records.get(name) == records.record(status):
                return known, status
        return self._leaf(fd, path, name, status)[1], status

    def note(self, path: str, leaf: Leaf, status: os.stat_result) -> None:
        """Have the next scan know what we wrote ourselves, unless it was changed since."""
        if self._told or records.settled(status, self._now_ns(), self._granularity_ns):
            self._notes.put(path, records.record(status), leaf)

    def forget_notes(self) -> None:
        """Have the next scan read what we wrote ourselves: others may have written to it."""
        if self._told:
            self._notes.clear()

    def _node(self, path: str) -> Node | None:
        node: Node | None = self._root
        for name in path.split("/") if path else ():
            node = node.nodes.get(name) if node is not None else None
        return node

    def _forget(self, path: str) -> str:
        """Forget a directory with all that is in it; return the one that it is in."""
        parent, name = split(path)
        node = self._node(parent)
        if node is not None and node.nodes.pop(name, None) is not None:
            node.records.forget(name)
        return parent

    def _distrust(self, path: str) -> str:
        """Forget a file's record; return the directory that it is in."""
        parent, name = split(path)
        self._notes.pop(path)
        node = self._node(parent)
        if node is not None and name not in node.nodes:
            known = node.records.get(name)
            if known is not _IGNORED_LEAF and known is not _IGNORED_DIRECTORY:
                node.records.forget(name)
        return parent

    def _other_names(self, rewritten: Collection[str]) -> set[str]:
        """Return the directories in which files that were read have other names, as an event
        tells only the one that was used.

        Whether all names of an inode are in this tree cannot be known, so it is searched for;
        it takes some 50 ms for 100 000 entries.
        """
        surely = set()
        for path in rewritten:
            parent, name = split(path)
            node = self._node(parent)
            if node is not None:
                surely.add(node.records.get(name)[records.INODE])
        linked = self._linked
        found = set()
        pending = [("", self._root)]
        while pending:
            path, node = pending.pop()
            for name, record in node.records.unpacked().items():
                number = record[records.INODE]
                if number not in linked:
                    continue
                current, read = linked[number]
                if join(path, name) not in read and (record != current or number in surely):
                    node.records.forget(name)
                    self._notes.pop(join(path, name))
                    found.add(path)
            pending.extend((join(path, name), child) for name, child in node.nodes.items())
        return found

    def _visit(
        self, fd: int, path: str, old: Node, depth: int, wanted: dict[str, bool] | None
    ) -> Node:
        """Return the node of an open directory; ``old`` itself if nothing changed."""
        if wanted is not None and not wanted.get(path, True):
            return self._descend(fd, path, old, depth, wanted)
        self.at = path
        self._progress()
        device = self._found.device
        kept_records = old.records.unpacked()
        known = kept_records.get
        same: list[str] = []
        other: list[tuple[str, os.stat_result]] = []
        directories: list[tuple[str, os.stat_result]] = []
        pack = records.STATUS.pack
        trusted = self._trust_ignored
        links = False
        with os.scandir(fd) as listing:
            for found in listing:
                name = found.name
                before = known(name)
                if (before is _IGNORED_LEAF or before is _IGNORED_DIRECTORY) and trusted:
                    is_directory = found.is_dir(follow_symlinks=False)
                    if is_directory == (before is _IGNORED_DIRECTORY):
                        same.append(name)
                        continue
                try:
                    status = found.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                # As records.record does, but a call for each file would take a fifth longer.
                record = pack(
                    status.st_mode,
                    status.st_ino,
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                )
                if before == record and trusted and status.st_dev == device:
                    same.append(name)
                    links = links or status.st_nlink > 1
                elif stat.S_ISDIR(status.st_mode):
                    if not name.startswith(TEMPORARY_PREFIX):
                        directories.append((name, status))
                else:
                    other.append((name, status))
                    links = links or status.st_nlink > 1
        if links:
            self.with_links.add(path)
        else:
            self.with_links.discard(path)
        children: dict[str, Entry] = {}
        nodes: dict[str, Node] = {}
        kept = old.entry.children
        once = self._names.setdefault
        for name, status in directories:
            name = once(name, name)
            shown = self._shown(name)
            below = join(path, shown)
            node = self._subdirectory(fd, name, below, status, old, depth, wanted)
            if isinstance(node, Node):
                nodes[name] = node
                children[name] = node.entry
            else:
                children[shown] = kept[shown] if kept.get(shown) == node else node
        fresh: dict[str, bytes] = {}
        for name, status in other:
            name = once(name, name)
            shown = self._shown(name)
            if shown.startswith(TEMPORARY_PREFIX):
                continue
            record, leaf = known(name, NEVER), kept.get(name)
            below = join(path, shown)
            # After a change of the rules a record is as good as before.
            if (
                not isinstance(leaf, Leaf)
                or record != records.record(status)
                or status.st_dev != device
                or self._ignore(below, False)
            ):
                before, (record, leaf) = record, self._leaf(fd, below, name, status)
                if record and record[records.INODE] == before[records.INODE]:
                    self._found.written_over.add(below)
            if record:
                fresh[name] = record
            children[shown] = kept[shown] if kept.get(shown) == leaf else leaf
        for name, status in directories:
            self._record_directory(name, status, children, nodes, fresh)
        if len(same) + len(children) == len(kept) and all(
            kept.get(name) is child for name, child in children.items()
        ):
            # Equal, they stay: what is new among much that goes keeps its memory from being freed.
            if nodes != old.nodes:
                old.nodes = nodes
            # Records of files whose contents are the same after all.
            if any(known(name) != record for name, record in fresh.items()):
                old.records = Records({**kept_records, **fresh})
            return old
        stay = set(same)
        for name, record in kept_records.items():
            # Its name here is the object that there is already.
            if name in stay:
                children[name] = kept[name]
                fresh[name] = record
        return Node(Directory(children), Records(fresh), nodes)

    def _record_directory(
        self,
        name: str,
        status: os.stat_result,
        children: dict[str, Entry],
        nodes: dict[str, Node],
        into: dict[str, bytes],
    ) -> None:
        if name in nodes:
            into[name] = status.st_ino.to_bytes(8, "big")
        elif children.get(name) is IGNORED:
            into[name] = _IGNORED_DIRECTORY

    def _descend(self, fd: int, path: str, old: Node, depth: int, wanted: dict[str, bool]) -> Node:
        """Return a node of which only some directories further down are to be listed."""
        children: dict[str, Entry] | None = None
        for name, node in list(old.nodes.items()):
            below = join(path, name)
            if below not in wanted:
                continue
            status = handles.status(fd, name)
            if status is None or not stat.S_ISDIR(status.st_mode):
                return self._visit(fd, path, old, depth, {**wanted, path: True})
            new = self._subdirectory(fd, name, below, status, old, depth, wanted)
            if new is node:
                continue
            if children is None:
                children = dict(old.entry.children)
            if isinstance(new, Node):
                old.nodes[name] = new
                children[name] = new.entry
            else:
                del old.nodes[name]
                children[name] = new
        if children is None:
            return old
        return Node(Directory(children), old.records, old.nodes)

    def _subdirectory(
        self,
        fd: int,
        name: str,
        path: str,
        status: os.stat_result,
        parent: Node,
        depth: int,
        wanted: dict[str, bool] | None,
    ) -> Node | Leaf:
        """Return the node of a directory, or the leaf that stands for it."""
        reason = name_problem(name)
        if reason is not None:
            return problem(reason)
        if self._ignore(path, True):
            return IGNORED
        if status.st_dev != self._found.device:
            # Its contents are hidden by the mount, not deleted.
            return problem("another filesystem is mounted there")
        if depth >= MAX_DEPTH:
            return problem("it is too deep in the tree")
        old = parent.nodes.get(name)
        known = parent.records.get(name) == status.st_ino.to_bytes(8, "big")
        if old is not None and known and wanted is not None and path not in wanted:
            return old
        try:
            child = os.open(name, handles.DIRECTORY_FLAGS, dir_fd=fd)
        except FileNotFoundError:
            self._found.requeue.add(path)
            return problem("it was moved while it was read")
        except OSError as error:
            return problem(_reason(error))
        try:
            if old is None:
                old = Node(EMPTY, Records({}), {})
            # One that is not the same inode is compared with the old one all the same, for
            # the records would not match; but all of it has to be listed.
            return self._visit(child, path, old, depth + 1, wanted if known else None)
        except OSError as error:
            return problem(_reason(error))
        finally:
            os.close(child)

    def _shown(self, name: str) -> str:
        """Return a name that can be stored and printed."""
        return name if name.isascii() else name.encode(errors="backslashreplace").decode()

    def _leaf(self, fd: int, path: str, name: str, status: os.stat_result) -> tuple[bytes, Leaf]:
        """Return the record and the entry of anything but a directory."""
        reason = name_problem(name)
        if reason is not None:
            return NEVER, problem(reason)
        if path and self._ignore(path, False):
            return _IGNORED_LEAF, IGNORED
        if path and self._found.device and status.st_dev != self._found.device:
            return NEVER, problem("another filesystem is mounted there")
        mode = status.st_mode
        try:
            if stat.S_ISREG(mode):
                note = self._notes.pop(path)
                if note is not None and note[0] == records.record(status):
                    return note
                return self._read(fd, path, name)
            if stat.S_ISLNK(mode):
                # A link cannot be written to, only replaced, so its inode tells enough.
                target = os.fsencode(os.readlink(name, dir_fd=fd))
                return records.record(status), link(target)
        except FileNotFoundError:
            self._found.requeue.add(path)
            return NEVER, problem("it was moved while it was read")
        except BlockingIOError:
            # An endpoint of the same tree writes it in place.
            self._found.requeue.add(path)
            return NEVER, problem("it is being written")
        except OSError as error:
            return NEVER, problem(_reason(error))
        return NEVER, untracked("not a file, link or directory")

    def _read(self, fd: int, path: str, name: str) -> tuple[bytes, Leaf]:
        self.at = path
        descriptor = handles.open_regular(fd, name)
        try:
            earlier: tuple[int, bytes] | None = None
            for _ in range(_READS):
                now_ns = self._now_ns()
                self._progress()
                before = os.fstat(descriptor)
                size = before.st_size if earlier is None else earlier[0]
                if size < LEAST_BYTES:
                    digest, length = hashing.read_digest(descriptor, size)
                else:
                    sums, length = hashing.read_sums(descriptor, size, self._progress)
                    digest = hashing.root(sums)
                    self.sums.keep(digest, sums)
                after = os.fstat(descriptor)
                self._found.files_read += 1
                self._found.bytes_read += length
                executable = bool(before.st_mode & 0o111)
                if records.record(before) == records.record(after) and length == before.st_size:
                    settled = records.settled(before, now_ns, self._granularity_ns)
                    leaf = file(executable, length, digest)
                    known = records.record(before)
                    if before.st_nlink > 1:
                        entry = (known, set[str]())
                        self._linked.setdefault(known[records.INODE], entry)[1].add(path)
                    return (known if settled else records.inode(before)), leaf
                # Two reads of the same bytes while the file got longer: it was appended to.
                if earlier == (length, digest) and after.st_size >= length:
                    self._found.requeue.add(path)
                    return records.inode(after), file(executable, length, digest)
                earlier = (length, digest) if after.st_size >= length else None
        finally:
            os.close(descriptor)
        self._found.requeue.add(path)
        return records.inode(after), problem("it is being written")
