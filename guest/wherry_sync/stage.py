"""Contents on their way into a tree, and what a change took out of it.

The stage is a directory of its own on the tree's filesystem, so that a rename moves a file
between the two. What is in it:

=============== ==================================================================
``part-N``      contents being received
``c-DIGEST``    contents received and verified, waiting to be placed
``t-N``         one file between stage and tree: about to be placed, or just displaced
``x-N``         likewise, if the journal names it; else a file that is being written
``journal``     the operation that is under way: see :class:`Journal`
``b-N``         files and directories being built; see :mod:`wherry_sync.build`
``rescued-N``   what somebody wrote at the last moment, for the user to have;
                ``rescued-N.path`` says where it was
=============== ==================================================================

Invariant: a file that a user or a container wrote is never removed from here unless it equals
the entry that the operation was told to replace. After a crash, :meth:`Stage.open` decides
about each ``t-N``, and the ``x-N`` that is named, by that rule, with the journal; the rest but
rescued files is rubbish.
"""

from __future__ import annotations

import os
import shutil
import stat

from wherry_sync import handles, hashing, kernel
from wherry_sync.entry import FILE, LINK, Leaf, file, link

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from wherry_sync.operation import Arrival

_NEW = handles.NEW_FLAGS
_JOURNAL = "journal"


class Gone(Exception):
    """A path has no file any more that could be read."""


class Damaged(Exception):
    """Contents that arrived are not what was announced."""


def same_contents(one: Leaf, other: Leaf | None) -> bool:
    """Whether two files have the same contents, executable or not, or two links one target."""
    if other is not None and one.kind == other.kind == FILE:
        return one[2:] == other[2:]
    return one == other


def fill(descriptor: int, leaf: Leaf, chunks: Iterable[bytes], *, verify: bool = True) -> None:
    """Write a file's contents to a new one, with long runs of zeros as holes.

    :param verify: whether the digest is to be compared, besides the size.
    :raises Damaged: they do not have the leaf's size or digest.
    :raises OSError: the disk is full, or failed.
    """
    state = hashing.new() if verify else None
    size = 0
    hole = False
    for chunk in chunks:
        start = size
        size += len(chunk)
        if size > leaf.size:
            break
        if state is not None:
            state.update(chunk)
        hole = handles.write_new(descriptor, chunk, start)
    if size != leaf.size or (state is not None and state.digest() != leaf.digest):
        raise Damaged("the contents are not those announced")
    if hole:
        os.ftruncate(descriptor, size)


class Rescued:
    """A file that was saved from being overwritten.

    :ivar name: in the stage.
    :ivar path: where it was in the tree.
    :ivar leaf: what it is.
    """

    __slots__ = ("leaf", "name", "path")

    def __init__(self, name: str, path: str, leaf: Leaf) -> None:
        self.name = name
        self.path = path
        self.leaf = leaf


class Journal:
    """An operation that was under way.

    :ivar in_place: whether the file itself is written to.
    :ivar made: the file in the stage that is exchanged with the one in the tree, if it is not
        called ``t-N``.
    :ivar tail: what is appended, if that is all that is done in place.
    :ivar old: the contents that are written over, unless they are much.
    """

    __slots__ = ("after", "before", "in_place", "made", "old", "path", "tail")

    def __init__(
        self,
        path: str,
        before: Leaf | None,
        after: Leaf | None,
        *,
        in_place: bool = False,
        made: str = "",
        tail: bytes = b"",
        old: bytes = b"",
    ) -> None:
        self.path = path
        self.before = before
        self.after = after
        self.in_place = in_place
        self.made = made
        self.tail = tail
        self.old = old


class Stage:
    """The staging directory of one tree; one thread uses it at a time.

    :param path: made if missing, with access for its owner alone.
    :param durable: whether a write in place has to be finished after a loss of power. In the
        guest it has not: nothing that is there then is believed.
    :raises OSError: it cannot be made or read.
    """

    def __init__(self, path: str, durable: bool = True) -> None:
        self._durable = durable
        os.makedirs(path, 0o700, exist_ok=True)
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._number = 0
        self.grown: dict[bytes, tuple[bytes, int]] = {}
        """Of contents by their digest: the digest of earlier ones with which they were compared,
        and how many bytes these are if the contents begin with all of them, else 0."""
        names = self._names()
        for name in names:
            number = name.removeprefix("rescued-").removesuffix(".path")
            if number.isdigit():
                self._number = max(self._number, int(number))
        self._journal = os.open(
            _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.fd
        )

    def _names(self) -> list[str]:
        with os.scandir(self.fd) as entries:
            return [entry.name for entry in entries]

    def close(self) -> None:
        """Release the descriptors; safe to call twice."""
        if self.fd >= 0:
            os.close(self._journal)
            os.close(self.fd)
        self.fd = -1

    def name(self, kind: str) -> str:
        """Return a new name."""
        self._number += 1
        return f"{kind}-{self._number}"

    # Receiving

    def has(self, leaf: Leaf) -> bool:
        """Whether a file's contents are here."""
        try:
            os.stat(f"c-{leaf.digest.hex()}", dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def receive(self, leaf: Leaf, mtime_ns: int, chunks: Iterable[bytes]) -> None:
        """Take a file's contents.

        :param mtime_ns: time of modification that the placed file gets.
        :raises Damaged: they do not have the leaf's size or digest.
        :raises OSError: the disk is full, or failed.
        """
        self.make(leaf, mtime_ns, lambda descriptor: fill(descriptor, leaf, chunks))

    def make(self, leaf: Leaf, mtime_ns: int, write: Callable[[int], object]) -> None:
        """Have contents written to a new file; when that returns, they are received."""
        part = self.name("part")
        descriptor = os.open(part, _NEW, 0o600, dir_fd=self.fd)
        try:
            write(descriptor)
            os.utime(descriptor, ns=(mtime_ns, mtime_ns))
            os.rename(part, f"c-{leaf.digest.hex()}", src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            os.unlink(part, dir_fd=self.fd)
            raise
        finally:
            os.close(descriptor)

    def write(
        self,
        leaf: Leaf,
        arrival: Arrival,
        mode: int,
        owner: tuple[int, int] | None,
        *,
        verify: bool,
    ) -> tuple[str, os.stat_result]:
        """Make a file ``x-N`` that is ready to be exchanged; return its name and status.

        :param mode: permission bits, and ``owner`` the ids or None for our own.
        :param verify: whether the digest is to be compared, besides the size.
        :raises Damaged: they do not have the leaf's size or digest.
        """
        name = self.name("x")
        descriptor = os.open(name, _NEW, mode, dir_fd=self.fd)
        try:
            fill(descriptor, leaf, arrival.chunks, verify=verify)
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.utime(descriptor, ns=(arrival.mtime_ns, arrival.mtime_ns))
            status = os.fstat(descriptor)
            if stat.S_IMODE(status.st_mode) != mode:
                os.fchmod(descriptor, mode)
                status = os.fstat(descriptor)
        except BaseException:
            os.unlink(name, dir_fd=self.fd)
            raise
        finally:
            os.close(descriptor)
        return name, status

    def open_contents(self, leaf: Leaf) -> int:
        """Open contents that were received.

        :raises FileNotFoundError: they were not.
        """
        return os.open(f"c-{leaf.digest.hex()}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)

    def take(self, leaf: Leaf, again: bool) -> str:
        """Return the name of a file with these contents that nothing else refers to.

        :param again: the contents are needed once more after this.
        :raises FileNotFoundError: they were not received.
        """
        name = self.name("t")
        contents = f"c-{leaf.digest.hex()}"
        if not again:
            os.rename(contents, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            return name
        part = self.name("part")
        source = self.open_contents(leaf)
        try:
            target = os.open(part, _NEW, 0o600, dir_fd=self.fd)
            try:
                fill(target, leaf, handles.chunks(source), verify=False)
                status = os.fstat(source)
                os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
            finally:
                os.close(target)
        finally:
            os.close(source)
        os.rename(part, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        return name

    def discard(self, name: str) -> None:
        """Remove a file of ours; missing is well."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def discard_contents(self) -> None:
        """Remove all contents that were received and not taken, and what was not placed."""
        self.grown.clear()
        for name in self._names():
            if name.startswith(("c-", "part-")):
                self.discard(name)
            elif name.startswith("b-"):
                self.discard_tree(name)

    def discard_tree(self, name: str) -> None:
        """Remove a file or a directory of ours with all that is in it; missing is well."""
        status = handles.status(self.fd, name)
        if status is not None and stat.S_ISDIR(status.st_mode):
            shutil.rmtree(name, dir_fd=self.fd)
        else:
            self.discard(name)

    # Not losing what was displaced

    def begin(self, journal: Journal) -> None:
        """Write down the operation that is about to touch the tree.

        One that works in place is written to the disk, and the contents too, because it can be
        finished after a crash of the system and of nothing less.
        """
        before, after, in_place = journal.before, journal.after, journal.in_place
        fields = (
            journal.path.encode(),
            before or b"",
            after or b"",
            b"in place" if in_place else b"",
            journal.made.encode(),
            journal.tail,
            journal.old,
        )
        data = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        handles.write_at(self._journal, len(data).to_bytes(4, "big") + data, 0)
        if in_place and self._durable:
            assert after is not None
            if not journal.tail:
                contents = self.open_contents(after)
                try:
                    kernel.flush_disk(contents)
                finally:
                    os.close(contents)
                os.fsync(self.fd)
            kernel.flush_disk(self._journal)

    def end(self) -> None:
        """Write down that no operation works in place any more."""
        os.pwrite(self._journal, bytes(4), 0)

    def journal(self) -> Journal | None:
        """Return the last operation that was begun; None if there was none, or it is torn."""
        size = int.from_bytes(os.pread(self._journal, 4, 0), "big")
        data = os.pread(self._journal, size, 4)
        fields = []
        while len(data) >= 4:
            length = int.from_bytes(data[:4], "big")
            fields.append(data[4 : 4 + length])
            if len(fields[-1]) != length:
                return None
            data = data[4 + length :]
        if len(fields) != 7:
            return None
        path, before, after, in_place, made, tail, old = fields
        try:
            text = path.decode()
        except UnicodeDecodeError:
            return None
        return Journal(
            text,
            Leaf(before) if before else None,
            Leaf(after) if after else None,
            in_place=bool(in_place),
            made=made.decode("ascii"),
            tail=tail,
            old=old,
        )

    def leaf(self, name: str) -> Leaf:
        """Return what a file in the stage is."""
        status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        if (status.st_mode & 0o170000) == 0o120000:
            return link(os.fsencode(os.readlink(name, dir_fd=self.fd)))
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            digest, size = hashing.read_digest(descriptor, status.st_size)
        finally:
            os.close(descriptor)
        return file(bool(status.st_mode & 0o111), size, digest)

    def rescue(self, name: str, path: str) -> None:
        """Keep a displaced file for the user; an empty one says nothing and is removed."""
        leaf = self.leaf(name)
        if leaf.kind == FILE and leaf.size == 0:
            self.discard(name)
            return
        kept = self.name("rescued")
        marker = os.open(f"{kept}.path", _NEW, 0o600, dir_fd=self.fd)
        try:
            handles.write_all(marker, path.encode())
        finally:
            os.close(marker)
        os.rename(name, kept, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def has_rescued(self) -> bool:
        """Whether anything was kept for the user."""
        return any(name.startswith("rescued-") for name in self._names())

    def rescued(self) -> Iterator[Rescued]:
        """Yield what was kept for the user."""
        for name in sorted(self._names()):
            if not name.startswith("rescued-") or name.endswith(".path"):
                continue
            marker = os.open(f"{name}.path", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                path = os.read(marker, 1 << 20).decode(errors="replace")
            finally:
                os.close(marker)
            leaf = self.leaf(name)
            if leaf.kind in (FILE, LINK):
                yield Rescued(name, path, leaf)

    def recover(self, expected: Callable[[str, str, Leaf], bool]) -> None:
        """Clean up after a crash: keep what a user wrote, remove what we did.

        :param expected: called with a displaced file that its operation was told to remove:
            its name, its path, and what it is. Whether it took the file.
        """
        entry = self.journal() or Journal("", None, None)
        names = set(self._names())
        for name in names:
            if name.startswith("t-") or name == entry.made:
                leaf = self.leaf(name)
                if same_contents(leaf, entry.after):
                    self.discard(name)
                elif not same_contents(leaf, entry.before):
                    self.rescue(name, entry.path)
                elif not expected(name, entry.path, leaf):
                    self.discard(name)
            elif (
                name.startswith(("part-", "x-"))
                or (name.startswith("c-") and not entry.in_place)
                or (name.endswith(".path") and name.removesuffix(".path") not in names)
            ):
                self.discard(name)
            elif name.startswith("b-"):
                self.discard_tree(name)
        if not entry.in_place:
            # Numbers begin anew, so a name in it may come again.
            self.end()
