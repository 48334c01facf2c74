"""Making what was not there: new files, links and directories, many at a time.

A first synchronisation is made of these, so what counts is how many system calls one file
takes: open, write, utime, fstat and close, and nothing else. It is built where it is of no
concern to anybody, in the stage, and placed when all of it is there:

* A directory that is new is made as ``b-N`` in the stage, with all that is new below it, and
  renamed into the tree as a whole. A file or link that is new in a directory that exists is
  made as ``b-N`` itself.
* ``b-N`` has only what we wrote. It is never exchanged with anything, and placed by a rename
  that fails where something is (``RENAME_NOREPLACE``), so nothing that a user wrote is ever
  displaced or ends up in it. That is why no journal is kept, and why after a crash all that is
  called ``b-N`` is rubbish.
* A reader sees nothing, or complete files: the rename is what makes them visible.
* As with every operation, the contents are not on the disk then; the paths are pending in the
  ancestor's store until :meth:`~wherry_sync.local.LocalEndpoint.flush`.

What was built needs not be read by the next scan: nobody else could write to it before it was
placed, and it is placed when the filesystem's clock has gone on since the last write of ours,
so a write by anybody shows in its time of change. Files that are placed alone get a new time of
change by that, so they are read again where nobody tells of writes (see :class:`Scanner`).
"""

from __future__ import annotations

import errno
import os
import stat
import time

from wherry_sync import handles, kernel
from wherry_sync.entry import LINK, Directory, Leaf, is_file, name_problem, split
from wherry_sync.operation import DONE, FAILED, STALE, Operation, Result, Stale
from wherry_sync.replace import with_executable
from wherry_sync.stage import Damaged, Stage, fill

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from wherry_sync.apply import Policy
    from wherry_sync.scan import Scanner

_NEW = handles.NEW_FLAGS
# Fewer files are read again sooner than it takes to wait for the clock.
_WORTH_WAITING = 16

REPEATED_BYTES = 64 * 1024
"""A file that is larger than this and comes again is copied, not sent twice."""

MAX_REPEATED = 64
"""How many such files, each of which the receiver keeps open until the end."""


def repeats(operations: Sequence[Operation]) -> dict[int, int]:
    """Return the operations whose contents are those of an earlier one, by their numbers.

    Both ends find the same. An operation that is an original has its own number.
    """
    first: dict[bytes, int] = {}
    found: dict[int, int] = {}
    originals = 0
    for number, operation in enumerate(operations):
        after = operation.after
        if not isinstance(after, Leaf) or not is_file(after) or after.size <= REPEATED_BYTES:
            continue
        original = first.setdefault(after.digest, number)
        if original == number or (original not in found and originals == MAX_REPEATED):
            continue
        if original not in found:
            found[original] = original
            originals += 1
        found[number] = original
    return found


def needed(operations: Sequence[Operation]) -> Iterator[int]:
    """Yield the numbers of those operations whose contents have to be sent."""
    known = repeats(operations)
    for number, operation in enumerate(operations):
        if is_file(operation.after) and known.get(number, number) == number:
            yield number


class _Directory:
    """A directory on the way to what is made.

    :ivar staged: whether it is one that we build.
    """

    __slots__ = ("fd", "like", "path", "staged")

    def __init__(self, fd: int, path: str, like: tuple[int, int], *, staged: bool) -> None:
        self.fd = fd
        self.path = path
        self.like = like
        self.staged = staged


class _Ready:
    """What is complete and has to be placed: operations ``first`` up to ``last``."""

    __slots__ = ("first", "last", "made", "name", "parent")

    def __init__(self, made: str, parent: str, name: str, first: int) -> None:
        self.made = made
        self.parent = parent
        self.name = name
        self.first = self.last = first


class Builder:
    """Builds once; see :meth:`build`.

    :param verify: whether contents have to be found to be what they are announced as. Not if
        they come from an end that has done so, over a connection that keeps them.
    :param granularity_ns: of the filesystem's clock; see :mod:`wherry_sync.records`.
    """

    def __init__(
        self,
        stage: Stage,
        scanner: Scanner,
        policy: Policy,
        checkpoint: Callable[[str], None],
        *,
        verify: bool,
        granularity_ns: int,
    ) -> None:
        self._stage = stage
        self._scanner = scanner
        self._policy = policy
        self._checkpoint = checkpoint
        self._verify = verify
        self._granularity_ns = granularity_ns
        self._open: list[_Directory] = []
        self._ready: list[_Ready] = []
        self._results: list[Result] = []
        self._notes: list[tuple[int, Leaf, os.stat_result]] = []
        self._alone: dict[int, os.stat_result] = {}
        self._originals: dict[int, tuple[int, int]] = {}
        self._broken = ""
        # What the contents failed with, as against the disk.
        self._cut: OSError | None = None
        self._root = -1
        self._own = (os.geteuid(), os.getegid())
        # Whether a file that is made with a mode comes out with another, because of the umask.
        self._masked: dict[int, bool] = {}

    def build(
        self,
        fd: int,
        operations: Sequence[Operation],
        contents: Iterable[tuple[int, int, Iterable[bytes]]],
    ) -> list[Result]:
        """Carry out operations that make something where nothing is; return a result for each.

        :param fd: the root.
        :param operations: a directory before what is in it, and all of that right after it.
        :param contents: of the files, in the operations' order: the operation's number, the time
            of modification in ns, and the bytes. A file whose contents are missing is stale;
            those that :func:`repeats` finds to come again are not sent.
        """
        self._root = fd
        known = repeats(operations)
        stream = iter(contents)
        current = next(stream, None)
        try:
            for number, operation in enumerate(operations):
                self._checkpoint("build")
                while current is not None and current[0] < number:
                    current = next(stream, None)
                given = current[1:] if current is not None and current[0] == number else None
                try:
                    self._one(number, operation, given, known.get(number))
                except (Stale, Damaged) as error:
                    self._fail(operation, STALE, str(error))
                except OSError as error:
                    if self._cut is error:
                        raise
                    self._fail(operation, FAILED, (error.strerror or str(error)).lower())
                else:
                    self._results.append(Result(operation, DONE))
            while current is not None:
                current = next(stream, None)
            self._leave(0)
            self._place()
        finally:
            self._leave(0)
            for descriptor, _ in self._originals.values():
                os.close(descriptor)
        return self._results

    def _fail(self, operation: Operation, status: str, reason: str) -> None:
        self._results.append(Result(operation, status, reason))
        if isinstance(operation.after, Directory):
            self._broken = f"{operation.path}/"

    def _one(
        self,
        number: int,
        operation: Operation,
        given: tuple[int, Iterable[bytes]] | None,
        original: int | None,
    ) -> None:
        path, after = operation.path, operation.after
        parent, name = split(path)
        if path.startswith("/") or name_problem(name):
            raise OSError("the path is not one of this tree")
        if operation.before is not None or after is None:
            raise OSError("it is no operation that makes something")
        if self._broken and path.startswith(self._broken):
            raise Stale("the directory it is in could not be made")
        directory = self._enter(parent)
        if isinstance(after, Directory):
            self._make_directory(directory, number, path, name)
            return
        if after.kind != LINK and not is_file(after):
            raise OSError("it is no operation that makes something")
        made = name if directory.staged else self._stage.name("b")
        fd = directory.fd if directory.staged else self._stage.fd
        if after.kind == LINK:
            os.symlink(after.target, made.encode(), dir_fd=fd)
        else:
            status = self._write(fd, made, after, directory.like, given, number, original)
            if directory.staged:
                self._notes.append((number, after, status))
            else:
                self._alone[number] = status
        if directory.staged:
            self._ready[-1].last = number
        else:
            self._ready.append(_Ready(made, parent, name, number))

    # Directories

    def _enter(self, path: str) -> _Directory:
        """Return an open directory, one that is being built or one of the tree."""
        opened = self._open
        while opened:
            last = opened[-1]
            if last.path == path:
                return last
            if last.staged and (not last.path or path.startswith(f"{last.path}/")):
                # Between it and the path is a directory that is not made by any operation.
                raise Stale("the directory it is in is missing")
            self._leave(len(opened) - 1)
        if any(name_problem(name) for name in path.split("/") if path):
            raise OSError("the path is not one of this tree")
        try:
            fd = handles.open_directory(self._root, path).fd
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Stale("the directory it is in has changed") from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Stale("a directory on the way became a link") from error
            raise
        status = os.fstat(fd)
        like = (status.st_uid, status.st_gid) if self._own[0] == 0 else self._own
        opened.append(_Directory(fd, path, like, staged=False))
        return opened[-1]

    def _leave(self, depth: int) -> None:
        while len(self._open) > depth:
            os.close(self._open.pop().fd)

    def _make_directory(self, parent: _Directory, number: int, path: str, name: str) -> None:
        if parent.staged:
            made, fd = name, parent.fd
        else:
            status = handles.status(parent.fd, name)
            if status is not None:
                # One that holds nothing but what is not synchronised is as good as a new one.
                if not stat.S_ISDIR(status.st_mode):
                    raise Stale("something was made there meanwhile")
                return
            made, fd = self._stage.name("b"), self._stage.fd
        os.mkdir(made, self._policy.directory_mode, dir_fd=fd)
        child = os.open(made, handles.DIRECTORY_FLAGS, dir_fd=fd)
        self._open.append(_Directory(child, path, parent.like, staged=True))
        os.fchmod(child, self._policy.directory_mode)
        if parent.like != self._own:
            os.fchown(child, *parent.like)
        if parent.staged:
            self._ready[-1].last = number
        else:
            self._ready.append(_Ready(made, parent.path, name, number))

    # Files

    def _write(
        self,
        fd: int,
        name: str,
        leaf: Leaf,
        like: tuple[int, int],
        given: tuple[int, Iterable[bytes]] | None,
        number: int,
        original: int | None,
    ) -> os.stat_result:
        """Make a file; return what it is then."""
        if original is not None and original != number:
            if original not in self._originals:
                raise Stale("its contents did not come")
            descriptor, mtime_ns = self._originals[original]
            given = mtime_ns, handles.chunks(descriptor)
        if given is None:
            raise Stale("its contents did not come")
        mtime_ns, chunks = given
        mode = with_executable(self._policy.file_mode, leaf.executable)
        descriptor = os.open(name, _NEW, mode, dir_fd=fd)
        try:
            fill(descriptor, leaf, self._arriving(chunks), verify=self._verify)
            masked = self._masked.get(mode)
            if masked is None:
                masked = stat.S_IMODE(os.fstat(descriptor).st_mode) != mode
                self._masked[mode] = masked
            if like != self._own:
                os.fchown(descriptor, *like)
            if masked:
                os.fchmod(descriptor, mode)
            os.utime(descriptor, ns=(mtime_ns, mtime_ns))
            if original == number:
                self._originals[number] = (os.dup(descriptor), mtime_ns)
            return os.fstat(descriptor)
        except Exception:
            os.unlink(name, dir_fd=fd)
            raise
        finally:
            os.close(descriptor)

    def _arriving(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from chunks
        except OSError as error:
            self._cut = error
            raise

    # Placing

    def _place(self) -> None:
        """Have all that was built appear in the tree."""
        if len(self._notes) >= _WORTH_WAITING:
            last = max(status.st_ctime_ns for _, _, status in self._notes)
            waited = time.time_ns() - last
            if 0 <= waited <= self._granularity_ns:
                time.sleep((self._granularity_ns - waited + 1_000_000) / 1e9)
        placed: set[int] = set()
        for ready in self._ready:
            self._checkpoint("place")
            try:
                with handles.open_directory(self._root, ready.parent) as fd:
                    self._rename(ready, fd)
                    found = handles.status(fd, ready.name)
            except (FileExistsError, FileNotFoundError, NotADirectoryError):
                self._refuse(ready, STALE, "something was made there meanwhile")
            except OSError as error:
                self._refuse(ready, FAILED, (error.strerror or str(error)).lower())
            else:
                placed.update(range(ready.first, ready.last + 1))
                self._note_alone(ready, found)
            self._checkpoint("placed")
        now_ns = time.time_ns()
        for number, leaf, status in self._notes:
            if number in placed and status.st_ctime_ns < now_ns - self._granularity_ns:
                self._scanner.note(self._results[number].operation.path, leaf, status)

    def _note_alone(self, ready: _Ready, found: os.stat_result | None) -> None:
        """Tell the scanner of a file that was placed by itself, unless it was written to."""
        made = self._alone.get(ready.first)
        operation = self._results[ready.first].operation
        if made is None or found is None or not isinstance(operation.after, Leaf):
            return
        if (made.st_mode, made.st_ino, made.st_size, made.st_mtime_ns) == (
            found.st_mode,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
        ):
            self._scanner.note(operation.path, operation.after, found)

    def _rename(self, ready: _Ready, fd: int) -> None:
        if kernel.rename_exclusive(self._stage.fd, ready.made, fd, ready.name):
            return
        # Without such a rename: what is renamed onto a directory needs an empty one, which
        # mkdir makes only where nothing is; and a link is made only where nothing is.
        status = os.stat(ready.made, dir_fd=self._stage.fd, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(ready.name, 0o700, dir_fd=fd)
            os.rename(ready.made, ready.name, src_dir_fd=self._stage.fd, dst_dir_fd=fd)
        else:
            os.link(
                ready.made,
                ready.name,
                src_dir_fd=self._stage.fd,
                dst_dir_fd=fd,
                follow_symlinks=False,
            )
            self._stage.discard(ready.made)

    def _refuse(self, ready: _Ready, status: str, reason: str) -> None:
        for number in range(ready.first, ready.last + 1):
            if self._results[number].status == DONE:
                self._results[number] = Result(self._results[number].operation, status, reason)
        self._stage.discard_tree(ready.made)
