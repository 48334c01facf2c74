"""Carrying out operations on a tree.

Invariants:

* Nothing outside the root is touched: every path is reached by :mod:`wherry_sync.handles`, and
  names are checked by the caller's decoder and again here.
* Nothing is overwritten or removed that is not ``before``. The check comes first, and then the
  displaced file itself is looked at: it is exchanged or moved into the stage, not unlinked, so
  a write between check and rename is seen, and undone or rescued. What cannot be closed: a
  process that still has the displaced file open and writes to it later.
* A reader sees the old file or the new one, except where the inode must stay
  (:mod:`wherry_sync.inplace`). Where it need not, but is wanted to, it stays if readers can be
  kept waiting meanwhile.
* Contents are complete and verified before they are placed. They are *not* on the disk then:
  a disk flush for each file would make a first synchronisation ten times as long. The
  ancestor's store keeps the path pending until :meth:`~wherry_sync.local.LocalEndpoint.flush`.
* Permission bits beyond the executable one, and the owner, stay what they are; no setuid,
  setgid or sticky bit is put on contents that come from the other end.

In order, because of kind changes: deletions from the bottom up, then all else from the top down.
The caller sorts.
"""

from __future__ import annotations

import errno
import os
import stat

from wherry_sync import handles, inplace
from wherry_sync.entry import FILE, LINK, Directory, Leaf, is_file, name_problem, split
from wherry_sync.moves import Moves
from wherry_sync.operation import DONE, FAILED, STALE, Arrival, Operation, Result, Stale
from wherry_sync.stage import Damaged, Journal, Stage, same_contents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from wherry_sync.entry import Entry
    from wherry_sync.scan import Scanner

    Keep = Callable[[int, str, str, Leaf], None]

_TRIES = 3
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}


def no_fault(point: str) -> None:
    """Do nothing; tests put something here that ends the process, as it were."""


class Policy:
    """What an end does with files beyond what is synchronised.

    :ivar file_mode: permission bits of new files, without the executable ones.
    :ivar directory_mode: permission bits of new directories.
    :ivar keep: called with a deleted file, before it is gone: a directory's descriptor, the
        name in it, the path in the tree, and what it is. It may move the file.
    """

    __slots__ = ("directory_mode", "file_mode", "keep")

    def __init__(
        self, file_mode: int = 0o644, directory_mode: int = 0o755, keep: Keep | None = None
    ) -> None:
        self.file_mode = file_mode
        self.directory_mode = directory_mode
        self.keep = keep


class Applier:
    """Carries out operations. Not safe for concurrent use, nor during a scan.

    :param scanner: knows what was there, and is told what we put there.
    :param checkpoint: called between any two steps that change something.
    """

    def __init__(
        self,
        stage: Stage,
        scanner: Scanner,
        policy: Policy,
        checkpoint: Callable[[str], None] = no_fault,
    ) -> None:
        self._stage = stage
        self._scanner = scanner
        self._policy = policy
        self._checkpoint = checkpoint
        self._uses: dict[bytes, int] = {}
        self._moves = Moves(stage, checkpoint)
        self._parent = ("", handles.Handle(-1))
        self._verify = True
        # What the contents failed with, as against the disk.
        self._cut: OSError | None = None
        self.pinned: set[str] = set()
        """Files whose inode stays, so they are rewritten in place."""

    def apply(
        self,
        fd: int,
        operations: Sequence[Operation],
        root_name: str = "",
        contents: Iterable[Arrival] = (),
        *,
        verify: bool = True,
    ) -> Iterator[Result]:
        """Carry out operations, and yield what came of each as soon as it is known.

        :param fd: the root; if the root is a file, the directory that it is in.
        :param root_name: the root's name if it is a file.
        :param contents: of some operations, in their order; those of the others are staged.
        :param verify: whether ``contents`` have to be found to be what they are announced as.
        """
        self._verify = verify
        self._cut = None
        self._uses.clear()
        for operation in operations:
            if operation.after is not None and is_file(operation.after):
                digest = _digest(operation.after)
                self._uses[digest] = self._uses.get(digest, 0) + 1
        stream = iter(contents)
        current = next(stream, None)
        try:
            for number, operation in enumerate(operations):
                self._checkpoint("operation")
                while current is not None and current.number < number:
                    current = next(stream, None)
                given = current if current is not None and current.number == number else None
                if given is not None:
                    given.chunks = self._arriving(given.chunks)
                try:
                    self._one(fd, operation, root_name, given)
                except (Stale, Damaged) as error:
                    yield Result(operation, STALE, str(error))
                except OSError as error:
                    if self._cut is error:
                        raise
                    if self._is_gone(error):
                        yield Result(operation, STALE, "the directory it is in has changed")
                        continue
                    # The next operation's journal must not hide a write that failed half-way.
                    self.finish_in_place(fd, root_name)
                    yield Result(operation, FAILED, (error.strerror or str(error)).lower())
                else:
                    yield Result(operation, DONE)
            for _ in stream:
                pass
        finally:
            self._leave()

    def _arriving(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from chunks
        except OSError as error:
            self._cut = error
            raise

    def finish_in_place(self, fd: int, root_name: str = "") -> None:
        """Finish a write in place that a crash interrupted, before anything else is done.

        What is there now may also have been edited since, so it is rescued first.
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
            if inplace.begins(fd, name, before):
                self._rescue(fd, name, entry.path)
                inplace.finish_append(fd, name, before, entry.tail)
            return
        if not self._stage.has(after):
            return
        for _ in range(_TRIES):
            self._rescue(fd, name, entry.path)
            try:
                inplace.rewrite(fd, name, self._stage, after, 0, self._checkpoint, status)
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
        self._checkpoint("torn")

    def _one(self, fd: int, operation: Operation, root_name: str, given: Arrival | None) -> None:
        path = operation.path
        parent, name = split(path)
        if path.startswith("/") or (name_problem(name) and not (root_name and not path)):
            raise OSError("the path is not one of this tree")
        try:
            parent_fd = self._enter(fd, parent)
        except (FileNotFoundError, NotADirectoryError) as error:
            if operation.after is None:
                return
            raise Stale("the directory it is in has changed") from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Stale("a directory on the way became a link") from error
            raise
        in_place = bool(root_name) or path in self.pinned
        self._change(parent_fd, name or root_name, operation, given, in_place=in_place)

    def _enter(self, fd: int, path: str) -> int:
        """Open a directory, or return the one of the last operation if it is the same.

        An operation on the directory itself is one in another directory, so none is kept that
        an operation has removed.
        """
        known, handle = self._parent
        if handle.fd < 0 or known != path:
            self._leave()
            if any(name_problem(name) for name in path.split("/") if path):
                raise OSError("the path is not one of this tree")
            handle = handles.open_directory(fd, path)
            self._parent = (path, handle)
        return handle.fd

    def _is_gone(self, error: OSError) -> bool:
        """Whether an operation failed because its directory has been removed meanwhile."""
        fd = self._parent[1].fd
        return isinstance(error, FileNotFoundError) and fd >= 0 and os.fstat(fd).st_nlink == 0

    def _leave(self) -> None:
        if self._parent[1].fd >= 0:
            os.close(self._parent[1].fd)
        self._parent = ("", handles.Handle(-1))

    def _change(
        self, fd: int, name: str, operation: Operation, given: Arrival | None, *, in_place: bool
    ) -> None:
        before, after = operation.before, operation.after
        current, status = self._scanner.probe(fd, operation.path, name)
        if _shallow_equal(current, after):
            self._forget(after)
            return
        if not _shallow_equal(current, before):
            raise Stale("it was changed meanwhile")
        if isinstance(before, Directory):
            if not self._remove_directory(fd, name) and after is not None:
                raise Stale("something that is not synchronised is in the way")
            before = status = None
            if after is None:
                return
        if given is not None and isinstance(after, Leaf) and is_file(after):
            if isinstance(before, Leaf) and is_file(before):
                assert status is not None
                self._update(_Change(fd, name, operation, before, after, status, in_place), given)
                return
            self._stage.receive(after, given.mtime_ns, given.chunks)
        if isinstance(after, Directory):
            if before is not None:
                assert status is not None
                self._remove(fd, name, operation.path, before, status)
            self._checkpoint("mkdir")
            os.mkdir(name, self._policy.directory_mode, dir_fd=fd)
            with handles.open_directory(fd, name) as made:
                os.fchmod(made, self._policy.directory_mode)
                self._adopt(made, os.fstat(fd))
        elif after is None:
            assert before is not None
            assert status is not None
            self._remove(fd, name, operation.path, before, status)
        elif before is None:
            self._create(fd, name, operation.path, after)
        else:
            assert status is not None
            self._replace(_Change(fd, name, operation, before, after, status, in_place))

    def _remove_directory(self, fd: int, name: str) -> bool:
        """Remove a directory; return False if it still holds something."""
        self._checkpoint("rmdir")
        try:
            os.rmdir(name, dir_fd=fd)
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
            return False
        return True

    def _remove(self, fd: int, name: str, path: str, before: Leaf, status: os.stat_result) -> None:
        """Take a file or link out of the tree."""
        self._stage.begin(Journal(path, before, None))
        taken = self._moves.displace(fd, name, path, before, status)
        if self._policy.keep is not None:
            self._policy.keep(self._stage.fd, taken, path, before)
            self._checkpoint("kept")
        self._stage.discard(taken)

    def _create(self, fd: int, name: str, path: str, after: Leaf) -> None:
        self._stage.begin(Journal(path, None, after))
        made = self._make(after, None, os.fstat(fd))
        ours = os.stat(made, dir_fd=self._stage.fd, follow_symlinks=False)
        self._checkpoint("create")
        try:
            self._moves.place(made, fd, name)
        except FileExistsError as error:
            self._stage.discard(made)
            raise Stale("something was made there meanwhile") from error
        except BaseException as error:
            if isinstance(error, OSError):
                self._stage.discard(made)
            raise
        self._checkpoint("created")
        self._note(fd, name, path, after, ours.st_mtime_ns)

    def _replace(self, change: _Change) -> None:
        before, after = change.before, change.after
        if is_file(before) and is_file(after):
            if before.digest == after.digest:
                self._forget(after)
                self._checkpoint("chmod")
                self._set_executable(change.fd, change.name, change.status, after.executable)
                return
            start = inplace.start(self._stage, before, after)
            if change.in_place or start:
                self._rewrite(change, start)
                return
            if change.in_place_if_alone and self._rewrite(change, None):
                return
        self._stage.begin(Journal(change.path, before, after))
        made = self._make(after, change.status, os.fstat(change.fd))
        ours = os.stat(made, dir_fd=self._stage.fd, follow_symlinks=False)
        self._swap(change, made, ours)

    def _rewrite(self, change: _Change, start: int | None) -> bool:
        """Write over a file from ``start`` on.

        :param start: None to write all of it, and only if it is for us alone.
        :returns: False if it is not.
        """
        fd, name, before, after = change.fd, change.name, change.before, change.after
        stage, step = self._stage, self._checkpoint
        stage.begin(Journal(change.path, before, after, in_place=True))
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
        self._forget(after)
        return True

    def _update(self, change: _Change, given: Arrival) -> None:
        """Give a file the contents that come now, with as few system calls as will do."""
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
            self._replace(change)
            return
        mode = with_executable(status.st_mode & 0o777, after.executable)
        owner = (status.st_uid, status.st_gid)
        adopted = owner if os.geteuid() == 0 and owner != (0, os.getegid()) else None
        made, ours = self._stage.write(after, given, mode, adopted, verify=self._verify)
        self._stage.begin(Journal(path, before, after, made=made))
        self._swap(change, made, ours)

    def _end_in_place(self, change: _Change, mtime_ns: int) -> None:
        """Have what was written in place be so: its journal ends, its mode follows."""
        self._stage.end()
        if change.before.executable != change.after.executable:
            self._set_executable(change.fd, change.name, None, change.after.executable)
        self._note(change.fd, change.name, change.path, change.after, mtime_ns)

    def _swap(self, change: _Change, made: str, ours: os.stat_result) -> None:
        """Put a file or link of the stage in the place of another one.

        :param ours: the status of the one in the stage.
        """
        fd, name, path, before = change.fd, change.name, change.path, change.before
        self._moves.swap(fd, name, path, before, change.status, made, ours)
        if self._policy.keep is not None and before.kind != change.after.kind:
            self._policy.keep(self._stage.fd, made, path, before)
        self._stage.discard(made)
        self._note(fd, name, path, change.after, ours.st_mtime_ns)

    def _make(self, after: Leaf, replaced: os.stat_result | None, parent: os.stat_result) -> str:
        """Return the name of a new file or link in the stage that is ready to be placed."""
        if after.kind == LINK:
            made = self._stage.name("t")
            os.symlink(after.target, made.encode(), dir_fd=self._stage.fd)
            return made
        digest = _digest(after)
        made = self._stage.take(after, self._uses.get(digest, 1) > 1)
        self._forget(after)
        descriptor = os.open(
            made, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._stage.fd
        )
        try:
            # A replaced file's times are of use to nobody; its owner and mode are.
            if replaced is not None and stat.S_ISREG(replaced.st_mode):
                self._adopt(descriptor, replaced)
                mode = replaced.st_mode & 0o777
            else:
                self._adopt(descriptor, parent)
                mode = self._policy.file_mode
            os.fchmod(descriptor, with_executable(mode, after.executable))
        finally:
            os.close(descriptor)
        return made

    def _adopt(self, descriptor: int, like: os.stat_result) -> None:
        """Give a new file the owner of its predecessor or its directory, if we are root."""
        if os.geteuid() == 0:
            os.fchown(descriptor, like.st_uid, like.st_gid)

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

    def _note(self, fd: int, name: str, path: str, after: Leaf, mtime_ns: int) -> None:
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

    def _forget(self, after: Entry | None) -> None:
        """Count one use of contents less."""
        if after is not None and is_file(after):
            digest = _digest(after)
            self._uses[digest] = self._uses.get(digest, 1) - 1


class _Change:
    """A file or link that shall become another one.

    :ivar fd: of the directory that it is in, and ``name`` in there.
    :ivar status: as it was when it was found to be ``before``.
    :ivar in_place: whether the inode has to stay.
    :ivar in_place_if_alone: whether it shall stay if nobody else has it open.
    """

    __slots__ = (
        "after",
        "before",
        "fd",
        "in_place",
        "in_place_if_alone",
        "name",
        "path",
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
    ) -> None:
        self.fd = fd
        self.name = name
        self.path = operation.path
        self.before = before
        self.after = after
        self.status = status
        self.in_place = in_place or status.st_nlink > 1
        self.in_place_if_alone = operation.in_place


def with_executable(mode: int, executable: bool) -> int:
    """Return permission bits with those for executing where those for reading are, or none."""
    return mode | (mode & 0o444) >> 2 if executable else mode & ~0o111


def _digest(entry: Entry) -> bytes:
    assert isinstance(entry, Leaf)
    return entry.digest


def _shallow_equal(one: Entry | None, other: Entry | None) -> bool:
    if isinstance(one, Directory) or isinstance(other, Directory):
        return isinstance(one, Directory) and isinstance(other, Directory)
    return one == other
