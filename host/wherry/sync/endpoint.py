"""What the sync needs of either end. :class:`wherry_sync.local.LocalEndpoint` is one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from wherry_sync.entry import Entry, Leaf
from wherry_sync.operation import Arrival, Operation, Result
from wherry_sync.scan import Snapshot
from wherry_sync.stage import Rescued


class Endpoint(Protocol):
    """One tree, wherever it is.

    None of the methods may be called while another one runs, save :meth:`close`, which may be
    called at any time, from any thread, and makes the one that runs fail. Every call has a
    bound in time, or raises. An iterator that a method returns counts as running until it is
    exhausted or closed.

    All raise OSError when the end cannot be reached or its disk fails. What concerns one path
    is in the answer, not an error.
    """

    @property
    def boot(self) -> str:
        """Id of the boot that the end is in; another one means that memory was lost."""

    def scan(self, dirty: Collection[str] | None = None, *, like: Entry | None = None) -> Snapshot:
        """Return the tree as it is now: as it was at some moment after the call, path by path.

        Idempotent. Equal parts of two results are the same objects.

        :param dirty: the directories whose own entries may have changed, besides those of
            which the end has learned by a watch of its own; None for all.
        :param like: another tree, whose objects the end may hold instead of equal ones.
        """

    def stamps(self, paths: Sequence[str]) -> list[bytes]:
        """Return of what is at each path what any write to it changes, and little else. A
        directory's is of the names in it; where nothing is, it is empty. Idempotent.
        """

    def missing(self, files: Iterable[Leaf]) -> list[Leaf]:
        """Return those files whose contents the end does not hold staged. Idempotent."""

    def read(self, path: str) -> tuple[int, Iterator[bytes]]:
        """Return a file's time of modification in ns and its contents as they are now.

        The contents need not be those of the last scan: who gets them compares the digest.

        :raises Gone: there is no file that can be read.
        """

    def read_all(
        self, wanted: Sequence[tuple[str, Leaf]]
    ) -> Iterator[tuple[Leaf, int, Iterable[bytes]]]:
        """Yield what :meth:`read` gives of several files, each with the leaf it was asked with.

        In their order; those that cannot be read are left out. The chunks of one file are read
        before the next file is asked for.
        """

    def stage_all(self, contents: Iterable[tuple[Leaf, int, Iterable[bytes]]]) -> set[bytes]:
        """Take contents for a later :meth:`apply`. Idempotent; nothing in the tree changes.

        :param contents: a file's leaf, its time of modification in ns, and its bytes. Bytes
            that are not the leaf's are not kept.
        :returns: the digests of those that were taken.
        """

    def recall(self, leaf: Leaf) -> bytes:
        """Return a file's sums (:mod:`wherry_sync.blocks`) if they are known at once."""

    def sums(self, path: str, leaf: Leaf) -> bytes:
        """Return a file's sums; nothing if it is not that file any more. Idempotent."""

    def read_blocks(
        self, path: str, leaf: Leaf, numbers: Sequence[int]
    ) -> tuple[int, Iterator[bytes]]:
        """Return a file's time of modification in ns, and some of its blocks.

        :raises Gone: it cannot be read. In the iterator, Damaged: it is not that file any more.
        """

    def stage_blocks(
        self,
        leaf: Leaf,
        path: str,
        base: Leaf,
        numbers: Sequence[int],
        mtime_ns: int,
        chunks: Iterable[bytes],
    ) -> bool:
        """Take contents of which only some blocks come; the others are those of a file here.

        Whether they were taken: not if the file is not ``base``, or the result not the leaf.

        :param numbers: ascending.
        :param chunks: the blocks' bytes, in pieces of any size.
        """

    def stage_local(self, wanted: Sequence[tuple[str, Leaf]]) -> set[bytes]:
        """Take contents from paths of the same tree. Idempotent; nothing in the tree changes.

        :returns: the digests of those that were taken; the others are not at their paths.
        """

    def apply(
        self, operations: Sequence[Operation], contents: Iterable[Arrival] = ()
    ) -> Iterator[Result]:
        """Carry out operations in order, and yield one result each, in order.

        Idempotent: what is already as it shall be is done. Nothing is done where something
        else is than an operation says. Stopping half-way, by a crash too, leaves each path as
        it was or as it shall be. Staged contents are gone afterwards.

        :param contents: of some operations that make a file or change its contents, in their
            order, with no ``start``; those of the others are staged.
        """

    def build(
        self,
        operations: Sequence[Operation],
        contents: Iterable[tuple[int, int, Iterable[bytes]]],
        *,
        verify: bool = True,
    ) -> list[Result]:
        """Make what was not there, of contents that come at the same time; return the results.

        All of it appears when all contents have come, each new directory at once. Idempotent:
        what is there already is stale. See :class:`wherry_sync.build.Builder`.

        :param operations: a directory before what is in it, and all of that right after it.
        :param contents: of those operations that :func:`wherry_sync.build.needed` names, in
            their order: the number, the time of modification in ns, and the bytes.
        """

    def flush(self) -> None:
        """Return when all that was in the tree at the call is on the disk. Idempotent."""

    def begin_flush(self) -> None:
        """Begin what :meth:`flush` does, and return. The other methods may be called meanwhile."""

    def flushed(self) -> bool:
        """Whether what was begun last is done; so again and again. False too if nothing was.

        :raises OSError: it has failed; it is not known then what is on the disk.
        """

    def rescued(self) -> list[Rescued]:
        """Return the files that were saved from being overwritten up to the last scan; see
        :mod:`wherry_sync.stage`."""

    def read_rescued(self, name: str) -> Iterator[bytes]:
        """Return the contents of one of them."""

    def forget_rescued(self, name: str) -> None:
        """Remove one of them, now that it is kept elsewhere. Idempotent."""

    def close(self) -> None:
        """Release what the end holds. Idempotent."""


if TYPE_CHECKING:
    from wherry_sync.local import LocalEndpoint

    def _conforms(end: LocalEndpoint) -> Endpoint:
        return end
