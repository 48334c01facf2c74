"""One end of a synchronisation: a tree on this machine, with its stage.

The host has one for each root, and so has the agent; ``wherry.sync.endpoint`` says what each
method promises, whichever side of the wire it is on.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from functools import partial

from wherry_sync import blocks, handles, hashing, kernel, records
from wherry_sync.apply import Applier, Policy, no_fault
from wherry_sync.build import Builder
from wherry_sync.cache import load, save
from wherry_sync.entry import Leaf, is_file, split
from wherry_sync.flush import Flushes
from wherry_sync.ignore import NOTHING, Ignore
from wherry_sync.moves import Moves
from wherry_sync.replace import Replacer
from wherry_sync.scan import Scanner, Snapshot
from wherry_sync.stage import Damaged, Gone, Stage, same_contents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from wherry_sync.entry import Entry
    from wherry_sync.operation import Arrival, Operation, Result
    from wherry_sync.stage import Rescued


class LocalEndpoint:
    """A tree on this machine.

    :param root: the directory, or the single file.
    :param stage: the directory for what is on its way; on the root's filesystem, and not in
        the tree unless its name begins with :data:`~wherry_sync.entry.TEMPORARY_PREFIX`.
    :param boot: id of this boot of this machine, as :attr:`boot` gives it back.
    :param durable: see :class:`~wherry_sync.stage.Stage`.
    :param single: whether the root is a file; None for what is there.
    :param cache: file with what an earlier endpoint knew of the tree; see :meth:`save_cache`.
    :param trust: the token that it must have been saved with; see :mod:`wherry_sync.cache`.
    :param told: see :class:`~wherry_sync.scan.Scanner`, and so for ``progress``.
    :raises OSError: the stage cannot be made, or is on another filesystem.
    """

    def __init__(
        self,
        root: str,
        stage: str,
        boot: str,
        *,
        ignore: Ignore = NOTHING,
        policy: Policy | None = None,
        checkpoint: Callable[[str], None] = no_fault,
        single: bool | None = None,
        durable: bool = True,
        cache: str | None = None,
        trust: str = "",
        told: bool = False,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.boot = boot
        self._cache = cache
        self._trust = trust
        self._path = root
        self._single = single
        # Directories that we have changed since the last scan. A watch may not have told of them
        # yet; a scan that did not look there would take our own work for somebody's undoing it.
        self._touched: set[str] = set()
        self._checkpoint = checkpoint
        self._progress = progress
        self._stage = Stage(stage, durable)
        self._flushes = Flushes(self._stage.fd)
        try:
            self._granularity_ns = granularity_ns = records.granularity_ns(
                self._stage.fd, self._stage.name("part")
            )
            self._scanner = Scanner(
                ignore, granularity_ns=granularity_ns, told=told, progress=progress
            )
            known = load(cache, trust) if cache is not None else None
            if known is not None:
                self._scanner.know(*known)
            self._policy = policy or Policy()
            moves = Moves(self._stage, checkpoint)
            self._replacer = Replacer(self._stage, self._scanner, self._policy, moves, checkpoint)
            self._applier = Applier(
                self._stage, self._scanner, self._policy, moves, self._replacer, checkpoint
            )
            self._stage.recover(self._expected)
            with self._opened() as (fd, name):
                if os.fstat(fd).st_dev != os.fstat(self._stage.fd).st_dev:
                    raise OSError("the stage is not on the filesystem of the tree")
                self._replacer.finish_in_place(fd, name)
        except FileNotFoundError:
            # No root: the next scan says so.
            pass
        except BaseException:
            self._stage.close()
            raise
        self._stage.discard_contents()

    def close(self) -> None:
        """Release the descriptors; safe to call twice."""
        self._stage.close()

    def set_ignore(self, ignore: Ignore) -> None:
        """Take other rules, from the next full scan on."""
        self._scanner.set_ignore(ignore)

    def scan(
        self,
        dirty: Collection[str] | None = None,
        rewritten: Collection[str] = (),
        arrived: Collection[str] = (),
        *,
        like: Entry | None = None,
        lost: bool = False,
    ) -> Snapshot:
        """Return the tree as it is now.

        :param rewritten: files whose contents are to be read whatever their records say; the
            root's own path is empty.
        :param arrived: see :meth:`~wherry_sync.scan.Scanner.scan`.
        :param like: of no use here, as what the scan finds is compared with what it found before.
        :param lost: whether there may be files that others wrote to and that are not in it.
        """
        if lost:
            self._scanner.forget_notes()
        try:
            with self._opened() as (fd, name):
                # A write in place that failed half-way is nobody's edit.
                self._replacer.finish_in_place(fd, name)
                if name:
                    return self._scanner.scan_file(fd, name, rewritten=bool(rewritten))
                if dirty is not None:
                    dirty = self._touched.union(dirty)
                found = self._scanner.scan(fd, dirty, rewritten, arrived)
                self._touched.clear()
                return found
        except FileNotFoundError:
            return Snapshot()

    @property
    def at(self) -> str:
        """The path that a scan looks at just now, for another thread to tell; else empty."""
        return self._scanner.at

    @property
    def with_links(self) -> set[str]:
        """Directories with files that can be written to by a name outside of the tree."""
        return self._scanner.with_links

    def missing(self, files: Iterable[Leaf]) -> list[Leaf]:
        """Return those files whose contents have to be sent."""
        return [leaf for leaf in files if not self._stage.has(leaf)]

    def read(self, path: str) -> tuple[int, Iterator[bytes]]:
        """Return a file's time of modification and its contents."""
        descriptor = self._open_file(path)
        return os.fstat(descriptor).st_mtime_ns, _chunks(descriptor)

    def _open_file(self, path: str) -> int:
        parent, name = split(path)
        try:
            with self._opened() as (fd, root_name), handles.open_directory(fd, parent) as directory:
                return handles.open_regular(directory, name or root_name)
        except OSError as error:
            raise Gone(f"{path} cannot be read: {error}") from error

    def recall(self, leaf: Leaf) -> bytes:
        """Return a file's sums if they are known; else nothing."""
        return self._scanner.sums.get(leaf.digest)

    def sums(self, path: str, leaf: Leaf) -> bytes:
        """Return a file's sums; nothing if it is not that file any more."""
        found = self.recall(leaf)
        if found:
            return found
        try:
            descriptor = self._open_file(path)
        except Gone:
            return b""
        try:
            found, _ = hashing.read_sums(descriptor, leaf.size, self._progress)
        finally:
            os.close(descriptor)
        if hashing.root(found) != leaf.digest:
            return b""
        self._scanner.sums.keep(leaf.digest, found)
        return found

    def read_blocks(
        self, path: str, leaf: Leaf, numbers: Sequence[int]
    ) -> tuple[int, Iterator[bytes]]:
        """Return a file's time of modification in ns, and some of its blocks.

        :raises Gone: it cannot be read. In the iterator, Damaged: it is not that file any more.
        """
        sums = self.sums(path, leaf)
        if not sums:
            raise Gone(f"{path} has changed")
        descriptor = self._open_file(path)
        mtime_ns = os.fstat(descriptor).st_mtime_ns
        os.close(descriptor)
        opened = partial(self._open_file, path)
        return mtime_ns, blocks.read(opened, leaf.size, numbers, sums)

    def stage_blocks(
        self,
        leaf: Leaf,
        path: str,
        base: Leaf,
        numbers: Sequence[int],
        mtime_ns: int,
        chunks: Iterable[bytes],
        *,
        verify: bool = True,
    ) -> bool:
        """Take contents of which only some blocks come; the others are those of a file here.

        :param base: what the file has to be, and ``path`` where it is.
        :param verify: whether the result has to be found to be right.
        :returns: whether they were taken.
        """
        parent, name = split(path)
        try:
            with self._opened() as (fd, root_name), handles.open_directory(fd, parent) as directory:
                name = name or root_name
                current, status = self._scanner.probe(directory, path, name)
                if status is not None and not verify:
                    # So that any other process's write from here on shows.
                    waited = time.time_ns() - status.st_ctime_ns
                    if 0 <= waited <= self._granularity_ns:
                        time.sleep((self._granularity_ns - waited + 1_000_000) / 1e9)
                        current, status = self._scanner.probe(directory, path, name)
                if status is None or not isinstance(current, Leaf):
                    return False
                if not is_file(current) or not same_contents(base, current):
                    return False
                source = handles.open_regular(directory, name)
        except OSError:
            return False
        record = records.record(status)
        state = hashing.new() if verify else None
        grown = False

        def fill(target: int) -> None:
            nonlocal grown
            grown = blocks.assemble(target, source, leaf, base.size, numbers, chunks, state)
            if state is not None:
                if state.digest() != leaf.digest:
                    raise Damaged("the contents are not those announced")
            elif records.record(os.fstat(source)) != record:
                raise Damaged("the file was changed meanwhile")

        try:
            self._stage.make(leaf, mtime_ns, fill)
        except Damaged:
            return False
        finally:
            os.close(source)
        self._stage.grown[leaf.digest] = (base.digest, base.size if grown else 0)
        return True

    def stage_local(self, wanted: Sequence[tuple[str, Leaf]]) -> set[bytes]:
        """Take contents from this tree; return the digests of those still at their paths."""
        taken = set()
        for path, leaf in wanted:
            self._progress()
            try:
                self._stage.receive(leaf, *self.read(path))
            except (Damaged, Gone):
                continue
            taken.add(leaf.digest)
        return taken

    def stamps(self, paths: Iterable[str]) -> list[bytes]:
        """Return of what is at each path what any write to it changes."""
        with self._opened() as (fd, root_name):
            return [_stamp(fd, path, root_name) for path in paths]

    def read_all(
        self, wanted: Sequence[tuple[str, Leaf]]
    ) -> Iterator[tuple[Leaf, int, Iterator[bytes]]]:
        """Yield the contents of several files; those that are gone are left out."""
        for path, leaf in wanted:
            try:
                mtime_ns, chunks = self.read(path)
            except Gone:
                continue
            yield leaf, mtime_ns, chunks

    def stage_all(self, contents: Iterable[tuple[Leaf, int, Iterable[bytes]]]) -> set[bytes]:
        """Take several files' contents; return the digests of those that were as announced."""
        taken = set()
        for leaf, mtime_ns, chunks in contents:
            try:
                self._stage.receive(leaf, mtime_ns, chunks)
            except Damaged:
                continue
            taken.add(leaf.digest)
        return taken

    def apply(
        self,
        operations: Sequence[Operation],
        contents: Iterable[Arrival] = (),
        *,
        verify: bool = True,
    ) -> Iterator[Result]:
        """Carry out operations in their order; yield what came of each.

        :param contents: of some of them; those of the others are staged.
        :param verify: whether contents have to be found to be what they are announced as.
        """
        self._touched.update(split(operation.path)[0] for operation in operations)
        with self._opened() as (fd, name):
            yield from self._applier.apply(fd, operations, name, contents, verify=verify)
            self._replacer.finish_in_place(fd, name)
        self._stage.discard_contents()

    def build(
        self,
        operations: Sequence[Operation],
        contents: Iterable[tuple[int, int, Iterable[bytes]]],
        *,
        verify: bool = True,
    ) -> list[Result]:
        """Make what was not there, of contents that come now; see :mod:`wherry_sync.build`.

        :param verify: whether contents have to be found to be what they are announced as.
        """
        self._touched.update(split(operation.path)[0] for operation in operations)
        builder = Builder(
            self._stage,
            self._scanner,
            self._policy,
            self._checkpoint,
            verify=verify,
            granularity_ns=self._granularity_ns,
        )
        with self._opened() as (fd, _):
            results = builder.build(fd, operations, contents)
        self._stage.discard_contents()
        return results

    def pin(self, path: str) -> None:
        """Keep a file's inode from now on, as a mount refers to it: rewrite it in place."""
        self._applier.pinned.add(path)

    def flush(self) -> None:
        """Wait until all that was done so far is on the disk."""
        kernel.flush(self._stage.fd)

    def begin_flush(self) -> None:
        """Begin to have all that was done so far on the disk, and do not wait for it."""
        self._flushes.begin()

    def flushed(self) -> bool:
        """Whether the flush that was begun last is done.

        :raises OSError: it has failed.
        """
        return self._flushes.is_done()

    def save_cache(self, trust: str | None = None) -> None:
        """Write down what is known, so that another endpoint's first scan need not read it all.

        :param trust: the token for it, if it is another one than at the start.
        :raises OSError: it cannot be written.
        """
        if self._cache is not None:
            save(self._cache, self._scanner.known(), self._trust if trust is None else trust)

    def has_rescued(self) -> bool:
        """Whether :meth:`rescued` has something."""
        return self._stage.has_rescued()

    def rescued(self) -> list[Rescued]:
        """Return what was saved from being overwritten at the last moment."""
        return list(self._stage.rescued())

    def read_rescued(self, name: str) -> Iterator[bytes]:
        """Return the contents of a rescued file."""
        return _chunks(handles.open_regular(self._stage.fd, name))

    def forget_rescued(self, name: str) -> None:
        """Remove a rescued file, now that it is kept elsewhere."""
        self._stage.discard(name)
        self._stage.discard(f"{name}.path")

    def _expected(self, name: str, path: str, leaf: Leaf) -> bool:
        if self._policy.keep is None:
            return False
        self._policy.keep(self._stage.fd, name, path, leaf)
        self._stage.discard(name)
        return True

    def _opened(self) -> _Root:
        return _Root(self._path, self._single)


def _stamp(fd: int, path: str, root_name: str) -> bytes:
    parent, name = split(path)
    try:
        with handles.open_directory(fd, parent) as directory:
            status = os.stat(name or root_name or ".", dir_fd=directory, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return b""
        raise
    return f"{status.st_ino} {status.st_ctime_ns}".encode()


class _Root:
    """The root, opened: a descriptor, and a name if it is not a directory."""

    def __init__(self, path: str, single: bool | None) -> None:
        self._path = path
        self._single = single
        self._fd = -1

    def __enter__(self) -> tuple[int, str]:
        # The path to the root is the user's, so links in it are followed.
        name = ""
        parent = self._path
        if self._single or not stat.S_ISDIR(os.stat(parent).st_mode):
            parent, name = os.path.split(self._path)
        self._fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._fd, name

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _chunks(descriptor: int) -> Iterator[bytes]:
    try:
        yield from handles.chunks(descriptor)
    finally:
        os.close(descriptor)
