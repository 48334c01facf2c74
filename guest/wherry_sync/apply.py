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

from wherry_sync import handles
from wherry_sync.entry import Directory, Leaf, is_file, name_problem, split
from wherry_sync.operation import DONE, FAILED, STALE, Arrival, Operation, Result, Stale
from wherry_sync.replace import Change, Replacer, adopt
from wherry_sync.stage import Damaged, Journal, Stage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from wherry_sync.entry import Entry
    from wherry_sync.moves import Moves
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
        name in it, the path in the tree, and what it is. It may move the file. If it raises
        OSError the file is not deleted.
    :ivar links_stay: whether a file with several hard links is written over, so that these stay
        one file. Where some may be outside of the tree, what comes from the other end is not to
        get there.
    """

    __slots__ = ("directory_mode", "file_mode", "keep", "links_stay")

    def __init__(
        self,
        file_mode: int = 0o644,
        directory_mode: int = 0o755,
        keep: Keep | None = None,
        *,
        links_stay: bool = True,
    ) -> None:
        self.file_mode = file_mode
        self.directory_mode = directory_mode
        self.keep = keep
        self.links_stay = links_stay


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
        moves: Moves,
        replacer: Replacer,
        checkpoint: Callable[[str], None] = no_fault,
    ) -> None:
        self._stage = stage
        self._scanner = scanner
        self._policy = policy
        self._moves = moves
        self._replacer = replacer
        self._checkpoint = checkpoint
        self._parent = ("", handles.Handle(-1))
        self._verify = True
        # What the contents failed with, as against the disk.
        self._cut: OSError | None = None
        # Directories with something in them that was not done, and whether that failed.
        self._undone: dict[str, bool] = {}
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
        self._undone.clear()
        self._replacer.expect(operations)
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
                    self._note_undone(operation.path, failed=False)
                    yield Result(operation, STALE, str(error))
                except OSError as error:
                    if self._cut is error:
                        raise
                    gone = self._is_gone(error)
                    self._note_undone(operation.path, failed=not gone)
                    if gone:
                        yield Result(operation, STALE, "the directory it is in has changed")
                        continue
                    # The next operation's journal must not hide a write that failed half-way.
                    self._replacer.finish_in_place(fd, root_name)
                    yield Result(operation, FAILED, (error.strerror or str(error)).lower())
                else:
                    yield Result(operation, DONE)
            for _ in stream:
                pass
        finally:
            self._leave()

    def _note_undone(self, path: str, *, failed: bool) -> None:
        while path:
            path = split(path)[0]
            self._undone[path] = failed or self._undone.get(path, False)

    def _arriving(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from chunks
        except OSError as error:
            self._cut = error
            raise

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
        links_stay = self._policy.links_stay
        current, status = self._scanner.probe(fd, operation.path, name)
        if _shallow_equal(current, after):
            self._replacer.forget(after)
            return
        if not _shallow_equal(current, before):
            raise Stale("it was changed meanwhile")
        if isinstance(before, Directory):
            if not self._remove_directory(fd, name):
                self._explain_rest(operation.path)
                if after is not None:
                    raise Stale("something that is not synchronised is in the way")
            before = status = None
            if after is None:
                return
        if given is not None and isinstance(after, Leaf) and is_file(after):
            if isinstance(before, Leaf) and is_file(before):
                assert status is not None
                self._replacer.update(
                    Change(fd, name, operation, before, after, status, in_place, links_stay),
                    given,
                    verify=self._verify,
                )
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
                adopt(made, os.fstat(fd))
        elif after is None:
            assert before is not None
            assert status is not None
            self._remove(fd, name, operation.path, before, status)
        elif before is None:
            self._create(fd, name, operation.path, after)
        else:
            assert status is not None
            self._replacer.replace(
                Change(fd, name, operation, before, after, status, in_place, links_stay)
            )

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

    def _explain_rest(self, path: str) -> None:
        """Say what a directory still holds, if that was to be removed.

        The directory must not count as done then: it would be forgotten with all that is in it,
        which would look new at the other end.

        :raises Stale: it has changed meanwhile.
        :raises OSError: it could not be removed.
        """
        failed = self._undone.get(path)
        if failed:
            raise OSError(errno.ENOTEMPTY, "something in it could not be removed")
        if failed is not None:
            raise Stale("something in it was changed meanwhile")

    def _remove(self, fd: int, name: str, path: str, before: Leaf, status: os.stat_result) -> None:
        """Take a file or link out of the tree."""
        self._stage.begin(Journal(path, before, None))
        taken = self._moves.displace(fd, name, path, before, status)
        if self._policy.keep is not None:
            try:
                self._policy.keep(self._stage.fd, taken, path, before)
            except OSError:
                # Nobody else may have it.
                self._moves.put_back(taken, fd, name, path)
                raise
            self._checkpoint("kept")
        self._stage.discard(taken)

    def _create(self, fd: int, name: str, path: str, after: Leaf) -> None:
        self._stage.begin(Journal(path, None, after))
        made = self._replacer.make(after, None, os.fstat(fd))
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
        self._replacer.note(fd, name, path, after, ours.st_mtime_ns)


def _shallow_equal(one: Entry | None, other: Entry | None) -> bool:
    if isinstance(one, Directory) or isinstance(other, Directory):
        return isinstance(one, Directory) and isinstance(other, Directory)
    return one == other
