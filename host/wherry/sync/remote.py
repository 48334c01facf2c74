"""The guest's end of a root, reached over the tunnel; :mod:`wherry_sync.wire` is the protocol.

The guest is not trusted: names, entries, numbers and sizes are checked before they are used,
and what breaks the protocol ends the connection.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from wherry.sync.connection import SILENCE_S, Connection, Stream
from wherry.sync.packing import packer
from wherry_sync import blocks, hashing, wire
from wherry_sync.entry import (
    DIGEST_BYTES,
    FILE,
    Entry,
    Leaf,
    count,
    is_problem,
    is_untracked,
    share,
    updated,
)
from wherry_sync.ignore import NOTHING, Ignore
from wherry_sync.operation import DONE, FAILED, STALE, Arrival, Operation, Result
from wherry_sync.scan import Snapshot
from wherry_sync.stage import Damaged, Gone, Rescued
from wherry_wire.frames import WireError
from wherry_wire.messages import (
    Done,
    Message,
    SyncApply,
    SyncBeginFlush,
    SyncBuild,
    SyncCopies,
    SyncEnd,
    SyncFlush,
    SyncFlushed,
    SyncForgetRescued,
    SyncMissing,
    SyncMount,
    SyncOpen,
    SyncOpened,
    SyncPin,
    SyncRead,
    SyncReadBlocks,
    SyncReadRescued,
    SyncRescued,
    SyncScan,
    SyncScanned,
    SyncStage,
    SyncStageBlocks,
    SyncStageLocal,
    SyncStamps,
    SyncSums,
    SyncYes,
    pack,
)

_CHANGED_AT_ONCE = 4096
_STATUSES = {b"d": DONE, b"s": STALE, b"f": FAILED}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a root's copy is in the guest, and what new files get there.

    :ivar root: an id of letters and digits.
    :ivar path: absolute, in the guest, where containers mount it from.
    :ivar single: whether it is a file.
    :ivar file_mode: permission bits; see :class:`wherry_sync.apply.Policy`.
    """

    root: str
    path: str
    single: bool = False
    ignore: Ignore = NOTHING
    file_mode: int = 0o666
    directory_mode: int = 0o777


class RemoteEndpoint(Connection):
    """A root's copy in the guest.

    :param stream: a connection to the agent's socket for roots; owned from now on.
    :param ordered: whether it was parted from in order; then the guest need not read all files.
    :param progress: called with the bytes of contents that were sent or received.
    :raises OSError: the agent refused, or cannot be reached.
    """

    def __init__(
        self,
        stream: Stream,
        place: Place,
        *,
        ordered: bool = False,
        progress: Callable[[int], object] = lambda size: None,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(stream, progress, silence_s)
        self._known: Entry | None = None
        self._entries_at_most = 0
        self._rescued = False
        try:
            opened = self._call(
                SyncOpen(
                    root=place.root,
                    path=place.path,
                    single=place.single,
                    file_mode=place.file_mode,
                    directory_mode=place.directory_mode,
                    rules=json.dumps([list(rule) for rule in place.ignore.rules]),
                    ordered=ordered,
                ),
                SyncOpened,
            )
        except BaseException:
            self.close()
            raise
        self.boot = opened.boot_id
        self._packer = packer() if opened.packed else None

    def has(self, copies: Iterable[str]) -> bool:
        """Whether the guest still has what was known of some copies, by their roots' ids.

        Before the first scan. If not, this copy is another one: nothing was deleted in it.
        """
        return self._call(SyncCopies(roots=" ".join(copies)), SyncYes).done

    def mount(self) -> None:
        """Have the copy appear at its path, for containers. Idempotent.

        :raises OSError: something else is there.
        """
        self._call(SyncMount(), Done)

    def pin(self, path: str) -> None:
        """Have a file rewritten in place from now on, as a container has mounted it."""
        self._call(SyncPin(path=path), Done)

    def scan(self, dirty: Collection[str] | None = None, *, like: Entry | None = None) -> Snapshot:
        """Return the copy as it is now; see :class:`wherry.sync.endpoint.Endpoint`."""
        payloads: list[bytes] = []
        reply = self._call(SyncScan(full=dirty is None), SyncScanned, self._gather(payloads.append))
        rows = wire.all_rows(payloads, 2)
        try:
            self._change(itertools.islice(rows, max(0, reply.changes)), reply.changes, like)
            requeue = {wire.parse_path(path, shown=True) for path, _ in rows}
        except WireError as error:
            raise self._broken(error) from error
        if reply.present != (self._known is not None):
            raise self._broken(WireError("the tree is not complete"))
        self._rescued = reply.rescued
        found = Snapshot()
        found.root = self._known
        found.device = reply.device
        found.requeue = requeue
        found.files_read = reply.files_read
        found.bytes_read = reply.bytes_read
        return found

    def _change(self, rows: Iterable[tuple[bytes, ...]], count: int, like: Entry | None) -> None:
        """Change what is known of the copy by rows of paths and entries.

        Some at a time: after a first synchronisation they are as many as the files, and what is
        equal in the other tree needs no memory as soon as it is compared.

        :raises WireError: they are malformed, or not so many.
        """
        changes: dict[str, Entry | None] = {}
        done = 0
        for path, data in rows:
            entry = wire.parse_entry(data)
            shown = is_problem(entry) or is_untracked(entry)
            # What is gone may have been a problem that had no better name.
            changes[wire.parse_path(path, shown=shown or entry is None)] = entry
            done += 1
            # The more there were, the more at once: each time all of their directories are copied.
            if len(changes) >= _CHANGED_AT_ONCE + done // 4:
                self._known = share(updated(self._known, changes), like)
                changes.clear()
        if done != count:
            raise WireError("changes are missing")
        if changes:
            self._known = share(updated(self._known, changes), like)
        self._bound(done)

    def _bound(self, changes: int) -> None:
        """Keep the tree from growing without a bound; it is counted now and then."""
        self._entries_at_most += changes
        if self._entries_at_most > wire.MAX_ROWS:
            self._entries_at_most = count(self._known)
            if self._entries_at_most > wire.MAX_ROWS:
                raise self._broken(WireError("the tree has too many entries"))

    def stamps(self, paths: Sequence[str]) -> list[bytes]:
        """Return of what is at each path what any write to it changes."""
        self._send(wire.rows((path.encode(),) for path in paths))
        rows: list[tuple[bytes, ...]] = []
        self._call(SyncStamps(), Done, self._collect(rows, 1))
        if len(rows) != len(paths):
            raise self._broken(WireError("not every path has a stamp"))
        return [stamp for (stamp,) in rows]

    def missing(self, files: Iterable[Leaf]) -> list[Leaf]:
        """Return those files whose contents have to be sent."""
        leaves = list(files)
        if not leaves:
            return []
        self._send(wire.rows((leaf,) for leaf in leaves))
        return [leaves[number] for number in self._numbers(SyncMissing(), len(leaves))]

    def read(self, path: str) -> tuple[int, Iterator[bytes]]:
        """Return a file's time of modification in ns and its contents."""
        files = self._read([path])
        for _, mtime_ns, chunks in files:
            return mtime_ns, _last(chunks, files)
        raise Gone(f"{path} cannot be read")

    def read_all(
        self, wanted: Sequence[tuple[str, Leaf]]
    ) -> Iterator[tuple[Leaf, int, Iterator[bytes]]]:
        """Yield the contents of several files; those that are gone are left out."""
        for key, mtime_ns, chunks in self._read([path for path, _ in wanted]):
            try:
                number = wire.parse_number(key, len(wanted))
            except WireError as error:
                raise self._broken(error) from error
            yield wanted[number][1], mtime_ns, chunks

    def stage_all(self, contents: Iterable[tuple[Leaf, int, Iterable[bytes]]]) -> set[bytes]:
        """Send several files' contents; return the digests of those that were taken."""
        sent: list[bytes] = []

        def announced() -> Iterator[tuple[bytes, int, Iterable[bytes]]]:
            for leaf, mtime_ns, chunks in contents:
                sent.append(leaf.digest)
                yield leaf, mtime_ns, chunks

        try:
            self._send((pack(SyncStage(), 0),))
            self._send_contents(announced())
        except BaseException:
            # The other end of a root failed, in the midst of a file perhaps.
            self.close()
            raise
        rows: list[tuple[bytes, ...]] = []
        self._answer(Done, self._collect(rows, 1))
        return set(sent) - {digest for (digest,) in rows}

    def recall(self, leaf: Leaf) -> bytes:
        """Return nothing: what the guest knows, it has to be asked for."""
        return b""

    def sums(self, path: str, leaf: Leaf) -> bytes:
        """Return a file's sums; nothing if it is not that file any more."""
        found = bytearray()
        size = blocks.count(leaf.size) * DIGEST_BYTES

        def take(payload: bytes) -> None:
            for (piece,) in wire.parse_rows(payload, 1):
                found.extend(piece)
            if len(found) > size:
                raise WireError("there are too many sums")

        self._call(SyncSums(path=path, leaf=leaf.hex()), Done, take)
        sums = bytes(found)
        if sums and (len(sums) != size or hashing.root(sums) != leaf.digest):
            raise self._broken(WireError("the sums are not the file's"))
        return sums

    def read_blocks(
        self, path: str, leaf: Leaf, numbers: Sequence[int]
    ) -> tuple[int, Iterator[bytes]]:
        """Return a file's time of modification in ns, and some of its blocks."""
        self._send(wire.rows((wire.pack_number(number),) for number in numbers))
        files = self._contents(SyncReadBlocks(path=path, leaf=leaf.hex()))
        for _, mtime_ns, chunks in files:
            return mtime_ns, _last(chunks, files)
        raise Gone(f"{path} cannot be read")

    def stage_blocks(
        self,
        leaf: Leaf,
        path: str,
        base: Leaf,
        numbers: Sequence[int],
        mtime_ns: int,
        chunks: Iterable[bytes],
    ) -> bool:
        """Send some blocks of a file, the rest of which is in another one in the guest."""
        self._send(wire.rows((wire.pack_number(number),) for number in numbers))
        try:
            self._send((pack(SyncStageBlocks(leaf=leaf.hex(), path=path, base=base.hex()), 0),))
            self._send_contents([(b"", mtime_ns, chunks)])
        except BaseException:
            # The other end of a root failed, in the midst of a file perhaps.
            self.close()
            raise
        return self._answer(SyncYes).done

    def stage_local(self, wanted: Sequence[tuple[str, Leaf]]) -> set[bytes]:
        """Have contents taken from other paths of the copy; return the digests of those taken."""
        if not wanted:
            return set()
        self._send(wire.rows((leaf, path.encode()) for path, leaf in wanted))
        refused = self._numbers(SyncStageLocal(), len(wanted))
        absent = {wanted[number][1].digest for number in refused}
        return {leaf.digest for _, leaf in wanted} - absent

    def apply(
        self, operations: Sequence[Operation], contents: Iterable[Arrival] = ()
    ) -> Iterator[Result]:
        """Carry out operations in the guest; yield what came of each.

        :param contents: small ones, as each is held in memory. What is found not to be the
            operation's is left out, which makes that stale.
        """
        self._send_operations(operations)
        try:
            self._send((pack(SyncApply(), 0),))
            self._send_contents(
                found
                for arrival in contents
                if (found := _shortened(operations[arrival.number], arrival)) is not None
            )
        except BaseException:
            # The other end of a root failed, in the midst of a file perhaps.
            self.close()
            raise
        yield from self._results(operations)

    def build(
        self,
        operations: Sequence[Operation],
        contents: Iterable[tuple[int, int, Iterable[bytes]]],
        *,
        verify: bool = True,
    ) -> list[Result]:
        """Make what was not there in the guest, of contents that are found to be right here.

        :param verify: has no meaning here: the guest trusts us, and we are faster.
        """
        self._send_operations(operations)
        try:
            self._send((pack(SyncBuild(), 0),))
            self._send_contents(
                (wire.pack_number(number), mtime_ns, _verified(operations[number].after, chunks))
                for number, mtime_ns, chunks in contents
            )
        except BaseException:
            # The other end of a root failed, in the midst of a file perhaps.
            self.close()
            raise
        return list(self._results(operations))

    def _send_contents(self, files: Iterable[tuple[bytes, int, Iterable[bytes]]]) -> None:
        if self._packer is None:
            frames = wire.contents(files)
        else:
            frames = wire.contents(files, self._packer)
        self._send(frames, progress=self._progress, packer=self._packer)
        self._send((pack(SyncEnd(), 0),))

    def _send_operations(self, operations: Sequence[Operation]) -> None:
        self._send(
            wire.rows(
                (
                    operation.path.encode(),
                    wire.pack_entry(operation.before),
                    wire.pack_entry(operation.after),
                    b"y" if operation.in_place else b"",
                )
                for operation in operations
            )
        )

    def _results(self, operations: Sequence[Operation]) -> Iterator[Result]:
        rows: list[tuple[bytes, ...]] = []
        self._answer(Done, self._collect(rows, 2))
        if len(rows) != len(operations):
            raise self._broken(WireError("not every operation has a result"))
        for operation, (status, reason) in zip(operations, rows, strict=True):
            if status not in _STATUSES:
                raise self._broken(WireError("a result is malformed"))
            yield Result(operation, _STATUSES[status], reason.decode(errors="replace")[:500])

    def flush(self) -> None:
        """Wait until all that is in the copy is on the guest's disk."""
        self._call(SyncFlush(last=False), Done)

    def begin_flush(self) -> None:
        """Begin to have all that is in the copy on the guest's disk, and do not wait for it."""
        self._call(SyncBeginFlush(), Done)

    def flushed(self) -> bool:
        """Whether the flush that was begun last is done."""
        return self._call(SyncFlushed(), SyncYes).done

    def part(self) -> None:
        """Do as :meth:`flush` for the last time: see ``ordered``."""
        self._call(SyncFlush(last=True), Done)

    def rescued(self) -> list[Rescued]:
        """Return what was saved in the guest from being overwritten, if the last scan told of it.

        So a round in which nothing was takes one question less.
        """
        if not self._rescued:
            return []
        rows: list[tuple[bytes, ...]] = []
        self._call(SyncRescued(), Done, self._collect(rows, 3))
        try:
            return [
                Rescued(name.decode("ascii"), wire.parse_path(path), wire.parse_leaf(leaf))
                for name, path, leaf in rows
            ]
        except (WireError, UnicodeDecodeError) as error:
            raise self._broken(WireError(str(error))) from error

    def read_rescued(self, name: str) -> Iterator[bytes]:
        """Return the contents of one of them."""
        for _, _, chunks in self._contents(SyncReadRescued(name=name)):
            yield from chunks

    def forget_rescued(self, name: str) -> None:
        """Remove one of them."""
        self._call(SyncForgetRescued(name=name), Done)

    def _read(self, paths: list[str]) -> Iterator[tuple[bytes, int, Iterator[bytes]]]:
        self._send(wire.rows((path.encode(),) for path in paths))
        return self._contents(SyncRead())

    def _numbers(self, request: Message, limit: int) -> list[int]:
        rows: list[tuple[bytes, ...]] = []
        self._call(request, Done, self._collect(rows, 1))
        try:
            return [wire.parse_number(number, limit) for (number,) in rows]
        except WireError as error:
            raise self._broken(error) from error


def _shortened(operation: Operation, arrival: Arrival) -> tuple[bytes, int, Iterable[bytes]] | None:
    """Return what has to be sent of a file that is changed: if it only grew, what it got.

    None if it is not that file any more.
    """
    before, after = operation.before, operation.after
    try:
        data = b"".join(_verified(after, arrival.chunks))
    except Damaged:
        return None
    start = 0
    if isinstance(before, Leaf) and before.kind == FILE and 0 < before.size < len(data):
        same = hashing.digest(data[: before.size]) == before.digest
        start = before.size if same else 0
    return wire.pack_arrival(arrival.number, start), arrival.mtime_ns, (data[start:],)


def _verified(after: Entry | None, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a file's chunks, and raise Damaged at the end of any other file's."""
    assert isinstance(after, Leaf)
    state = hashing.new()
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > after.size:
            break
        state.update(chunk)
        yield chunk
    if size != after.size or state.digest() != after.digest:
        raise Damaged("the file has changed")


def _last(chunks: Iterator[bytes], files: Iterator[object]) -> Iterator[bytes]:
    """Yield a file's chunks, and have the answer that it came in read to its end."""
    yield from chunks
    for _ in files:
        pass
