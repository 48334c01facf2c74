"""One file or link that becomes another one: replaced, or written over.

Replaced, a reader sees the old one or the new one. Written over, it stays the same inode: see
:mod:`wherry_sync.inplace`. The invariants are those of :mod:`wherry_sync.apply`.
"""

from __future__ import annotations

import errno
import os
import stat

from wherry_sync import handles, inplace
from wherry_sync.entry import FILE, LINK, Leaf, is_file, split
from wherry_sync.operation import Operation, Stale
from wherry_sync.stage import Damaged, Journal, Stage, same_contents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from wherry_sync.apply import Policy
    from wherry_sync.entry import Entry
    from wherry_sync.moves import Moves
    from wherry_sync.operation import Arrival
    from wherry_sync.scan import Scanner

_TRIES = 3


class Change:
    """A file or link that shall become another one.

    :ivar fd: of the directory that it is in, and ``name`` in there.
    :ivar status: as it was when it was found to be ``before``.
    :ivar in_place: whether the inode has to stay.
    :ivar in_place_if_alone: whether it shall stay if nobody else has it open.
    :ivar replaced: whether it may not stay, because its other names are not ours to change.
    """

    __slots__ = (
        "after",
        "before",
        "fd",
        "in_place",
        "in_place_if_alone",
        "name",
        "path",
        "replaced",
        "status",
    )

    def __init__(
        self,
        fd: int,
        name: str,
        operation: Operation,
        before: Leaf,
        after: Leaf,
        status: os.stat_result,
        in_place: bool,
        links_stay: bool,
    ) -> None:
        self.fd = fd
        self.name = name
        self.path = operation.path
        self.before = before
        self.after = after
        self.status = status
        linked = status.st_nlink > 1
        self.in_place = in_place or (linked and links_stay)
        self.replaced = linked and not self.in_place
        self.in_place_if_alone = operation.in_place


class Replacer:
    """Makes files of the stage's contents, and has them take the place of others.

    :param scanner: knows what was there, and is told what we put there.
    :param checkpoint: called between any two steps that change something.
    """

    def __init__(
        self,
        stage: Stage,
        scanner: Scanner,
        policy: Policy,
        moves: Moves,
        checkpoint: Callable[[str], None],
    ) -> None:
        self._stage = stage
        self._scanner = scanner
        self._policy = policy
        self._moves = moves
        self._checkpoint = checkpoint
        self._uses: dict[bytes, int] = {}

    def expect(self, operations: Iterable[Operation]) -> None:
        """Learn how often the same contents will be needed."""
        self._uses.clear()
        for operation in operations:
            if operation.after is not None and is_file(operation.after):
                digest = _digest(operation.after)
                self._uses[digest] = self._uses.get(digest, 0) + 1

    def finish_in_place(self, fd: int, root_name: str = "") -> None:
        """Finish a write in place that a crash interrupted, before anything else is done.

        What is there now may also have been edited since. Then it is rescued first.
        """
        entry = self._stage.journal()
        if entry is None or not entry.in_place:
            return
        path, before, after = entry.path, entry.before, entry.after
        parent, name = (path, "") if root_name else split(path)
        try:
            with handles.open_directory(fd, parent) as directory:
                name = root_name or name
                current, status = self._scanner.probe(directory, path, name)
                if (
                    isinstance(current, Leaf)
                    and status is not None
                    and before is not None
                    and after is not None
                    and current.kind == FILE
                    and not same_contents(current, before)
                    and not same_contents(current, after)
                ):
                    self._finish(directory, name, entry, before, after, status)
        except FileNotFoundError:
            pass
        self._stage.end()

    def _finish(
        self,
        fd: int,
        name: str,
        entry: Journal,
        before: Leaf,
        after: Leaf,
        status: os.stat_result,
    ) -> None:
        if entry.tail:
            found = inplace.appended(fd, name, before, len(entry.tail) + 1)
            if found is not None:
                if not entry.tail.startswith(found):
                    self._rescue(fd, name, entry.path)
                inplace.finish_append(fd, name, before, entry.tail)
            return
        if not self._stage.has(after):
            return
        for _ in range(_TRIES):
            if not inplace.is_torn(fd, name, self._stage, before, after, entry.old):
                self._rescue(fd, name, entry.path)
            self._checkpoint("torn")
            try:
                inplace.rewrite(fd, name, self._stage, after, 0, self._checkpoint, status)
            except inplace.Moved:
                # What is there now is somebody's, and whole.
                return
            except Stale:
                # What was written since is rescued as well.
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            else:
                return
        raise OSError(errno.EBUSY, "it is written all the time", entry.path)

    def _rescue(self, fd: int, name: str, path: str) -> None:
        copy = self._stage.name("t")
        inplace.copy(fd, name, self._stage.fd, copy)
        self._stage.rescue(copy, path)

    def replace(self, change: Change) -> None:
        """Give a file or link the contents that are staged, or another mode.

        :raises Stale: it is not what it was.
        """
        before, after = change.before, change.after
        if is_file(before) and is_file(after):
            if before.digest == after.digest:
                self.forget(after)
                self._checkpoint("chmod")
                self._set_executable(change.fd, change.name, change.status, after.executable)
                return
            start = 0 if change.replaced else inplace.start(self._stage, before, after)
            if change.in_place or start:
                self._rewrite(change, start)
                return
            if change.in_place_if_alone and not change.replaced and self._rewrite(change, None):
                return
        self._stage.begin(Journal(change.path, before, after))
        made = self.make(after, change.status, os.fstat(change.fd))
        ours = os.stat(made, dir_fd=self._stage.fd, follow_symlinks=False)
        self._swap(change, made, ours)

    def _rewrite(self, change: Change, start: int | None) -> bool:
        """Write over a file from ``start`` on.

        :param start: None to write all of it, and only if it is for us alone.
        :returns: False if it is not.
        """
        fd, name, before, after = change.fd, change.name, change.before, change.after
        stage, step = self._stage, self._checkpoint
        # Of a file that is appended to, no old byte is written over.
        old = b"" if start else inplace.old_contents(fd, name, before)
        stage.begin(Journal(change.path, before, after, in_place=True, old=old))
        step("in place")
        try:
            if start is None:
                mtime_ns = inplace.rewrite_alone(fd, name, stage, before, after, step)
            else:
                mtime_ns = inplace.rewrite(fd, name, stage, after, start, step, change.status)
        except inplace.InUse:
            return False
        except Stale:
            stage.end()
            raise
        self._end_in_place(change, mtime_ns)
        self.forget(after)
        return True

    def update(self, change: Change, given: Arrival, *, verify: bool) -> None:
        """Give a file the contents that come now, with as few system calls as will do.

        :param verify: whether they have to be found to be what they are announced as.
        :raises Stale: it is not what it was.
        """
        path, before, after, status = change.path, change.before, change.after, change.status
        if given.start:
            if given.start != before.size:
                raise Stale("it is not as long as it should be")
            tail = b"".join(given.chunks)
            if given.start + len(tail) != after.size:
                raise Damaged("the contents are not those announced")
            self._stage.begin(Journal(path, before, after, in_place=True, tail=tail))
            self._checkpoint("append")
            try:
                inplace.append(change.fd, change.name, tail, given.mtime_ns, status)
                self._checkpoint("appended")
            except (Stale, OSError):
                self._stage.end()
                raise
            self._end_in_place(change, given.mtime_ns)
            return
        may_append = given.start is None and before.size < after.size
        if change.in_place or change.in_place_if_alone or may_append:
            self._stage.receive(after, given.mtime_ns, given.chunks)
            self.replace(change)
            return
        mode = with_executable(status.st_mode & 0o777, after.executable)
        owner = (status.st_uid, status.st_gid)
        adopted = owner if os.geteuid() == 0 and owner != (0, os.getegid()) else None
        made, ours = self._stage.write(after, given, mode, adopted, verify=verify)
        self._stage.begin(Journal(path, before, after, made=made))
        self._swap(change, made, ours)

    def _end_in_place(self, change: Change, mtime_ns: int) -> None:
        """Have what was written in place be so: its journal ends, its mode follows."""
        self._stage.end()
        if change.before.executable != change.after.executable:
            self._set_executable(change.fd, change.name, None, change.after.executable)
        self.note(change.fd, change.name, change.path, change.after, mtime_ns)

    def _swap(self, change: Change, made: str, ours: os.stat_result) -> None:
        """Put a file or link of the stage in the place of another one.

        :param ours: the status of the one in the stage.
        """
        fd, name, path, before = change.fd, change.name, change.path, change.before
        self._moves.swap(fd, name, path, before, change.status, made, ours)
        if self._policy.keep is not None and before.kind != change.after.kind:
            self._policy.keep(self._stage.fd, made, path, before)
        self._stage.discard(made)
        self.note(fd, name, path, change.after, ours.st_mtime_ns)

    def make(self, after: Leaf, replaced: os.stat_result | None, parent: os.stat_result) -> str:
        """Return the name of a new file or link in the stage that is ready to be placed."""
        if after.kind == LINK:
            made = self._stage.name("t")
            os.symlink(after.target, made.encode(), dir_fd=self._stage.fd)
            return made
        digest = _digest(after)
        made = self._stage.take(after, self._uses.get(digest, 1) > 1)
        self.forget(after)
        descriptor = os.open(
            made, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._stage.fd
        )
        try:
            # A replaced file's times are of use to nobody; its owner and mode are.
            if replaced is not None and stat.S_ISREG(replaced.st_mode):
                adopt(descriptor, replaced)
                mode = replaced.st_mode & 0o777
            else:
                adopt(descriptor, parent)
                mode = self._policy.file_mode
            os.fchmod(descriptor, with_executable(mode, after.executable))
        finally:
            os.close(descriptor)
        return made

    def _set_executable(
        self, fd: int, name: str, expected: os.stat_result | None, executable: bool
    ) -> None:
        descriptor = handles.open_regular(fd, name)
        try:
            status = os.fstat(descriptor)
            if expected is not None and status.st_ino != expected.st_ino:
                raise Stale("it was replaced meanwhile")
            os.fchmod(descriptor, with_executable(stat.S_IMODE(status.st_mode), executable))
        finally:
            os.close(descriptor)

    def note(self, fd: int, name: str, path: str, after: Leaf, mtime_ns: int) -> None:
        """Tell the scanner what we put there, unless somebody has written to it already.

        :param mtime_ns: that we gave the file; a write since would have changed it.
        """
        if after.kind != FILE:
            return
        status = handles.status(fd, name)
        if (
            status is not None
            and stat.S_ISREG(status.st_mode)
            and (status.st_size, status.st_mtime_ns) == (after.size, mtime_ns)
            and bool(status.st_mode & 0o111) == after.executable
        ):
            self._scanner.note(path, after, status)

    def forget(self, after: Entry | None) -> None:
        """Count one use of contents less."""
        if after is not None and is_file(after):
            digest = _digest(after)
            self._uses[digest] = self._uses.get(digest, 1) - 1


def adopt(descriptor: int, like: os.stat_result) -> None:
    """Give what is new the owner of its predecessor or its directory, if we are root."""
    if os.geteuid() == 0:
        os.fchown(descriptor, like.st_uid, like.st_gid)


def with_executable(mode: int, executable: bool) -> int:
    """Return permission bits with those for executing where those for reading are, or none."""
    return mode | (mode & 0o444) >> 2 if executable else mode & ~0o111


def _digest(entry: Entry) -> bytes:
    assert isinstance(entry, Leaf)
    return entry.digest
