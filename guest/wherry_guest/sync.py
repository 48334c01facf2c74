"""The agent's end of the file synchronisation: one connection, and one thread, for each root.

The copy of a root that is ``/home/ann/app`` on the host is the directory ``tree/home/ann/app``
on the data disk, and is mounted at ``/home/ann/app`` for containers. As all copies are in one
tree, roots that contain each other share their files.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time

from wherry_guest import packing, system
from wherry_guest.link import Ended, Link, is_cut, to_the_end
from wherry_guest.session import failure
from wherry_guest.watcher import Watcher
from wherry_sync import blocks, wire
from wherry_sync.apply import Policy
from wherry_sync.diff import changes
from wherry_sync.entry import is_file
from wherry_sync.fanotify import Changes
from wherry_sync.ignore import Ignore
from wherry_sync.local import LocalEndpoint
from wherry_sync.operation import Operation, Result
from wherry_sync.stage import Gone
from wherry_wire.frames import WireError
from wherry_wire.messages import (
    Done,
    Message,
    SyncApply,
    SyncBeginFlush,
    SyncBuild,
    SyncChanged,
    SyncCopies,
    SyncFlush,
    SyncFlushed,
    SyncForgetRescued,
    SyncListen,
    SyncListening,
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
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from wherry_sync.entry import Entry, Leaf

_SOCKET = "/run/wherry/sync-%d.sock"
_LOCK_S = 60.0
_LOCK_STEP_S = 0.02
_ORDERED = "ended in order"
_RESULTS = {"done": b"d", "stale": b"s", "failed": b"f"}


class Roots:
    """Listens for the connections of roots.

    :param send: sends a message on the agent's own session.
    """

    def __init__(self, send: Callable[[Message, int], None]) -> None:
        self._send = send
        self._path = ""

    def listen(self, request: SyncListen) -> SyncListening:
        """Begin to listen; later calls return the same socket."""
        if not self._path:
            for part in ("tree", "stage"):
                os.makedirs(f"{request.directory}/{part}", 0o755, exist_ok=True)
            watcher = Watcher(
                f"{request.directory}/tree",
                lambda root: self._send(SyncChanged(root=root), 0),
            )
            path = _SOCKET % os.getpid()
            system.listen(path, lambda each: serve(each, request.directory, watcher))
            self._path = path
        return SyncListening(socket=self._path)


def serve(connection: socket.socket, directory: str, watcher: Watcher) -> None:
    """Serve one root until the host closes the connection.

    :param directory: where copies and stages are.
    """
    with connection:
        link = Link(connection)
        root = _Root(link, directory, watcher)
        try:
            root.run()
        except (Ended, OSError):
            pass
        except WireError as error:
            try:
                link.say(failure(f"the protocol was broken: {error}"))
            except OSError:
                pass
        finally:
            link.close()
            root.close()


def _file(data: str) -> Leaf:
    """Return the entry of a file in a message."""
    try:
        leaf = wire.parse_leaf(bytes.fromhex(data))
    except ValueError as error:
        raise WireError("an entry is malformed") from error
    if not is_file(leaf):
        raise WireError("an entry is no file's")
    return leaf


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _write(path: str, data: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(data)


class _Root:
    def __init__(self, link: Link, directory: str, watcher: Watcher) -> None:
        self._link = link
        self._directory = directory
        self._watcher = watcher
        self._endpoint: LocalEndpoint | None = None
        self._tree = ""
        self._path = ""
        self._single = False
        self._known: Entry | None = None
        self._scanned = False
        self._unsettled: set[str] = set()
        self._files_read = 0
        self._lock_fd = -1
        self._marker = self._made = ""

    def close(self) -> None:
        """Release what it holds."""
        if self._tree:
            self._watcher.remove(self._tree)
        if self._endpoint is not None:
            self._endpoint.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def run(self) -> None:
        """Answer requests in their order."""
        handlers: dict[type[Message], Callable[..., Message]] = {
            SyncCopies: self._copies,
            SyncScan: self._scan,
            SyncMissing: self._missing,
            SyncRead: self._read,
            SyncStage: self._stage,
            SyncStageLocal: self._stage_local,
            SyncStamps: self._stamps,
            SyncSums: self._sums,
            SyncReadBlocks: self._read_blocks,
            SyncStageBlocks: self._stage_blocks,
            SyncApply: self._apply,
            SyncBuild: self._build,
            SyncFlush: self._flush,
            SyncBeginFlush: self._begin_flush,
            SyncFlushed: self._flushed,
            SyncRescued: self._rescued,
            SyncReadRescued: self._read_rescued,
            SyncForgetRescued: self._forget_rescued,
            SyncMount: self._mount,
            SyncPin: self._pin,
        }
        while True:
            request = self._link.request()
            try:
                if isinstance(request, SyncOpen):
                    reply: Message = self._open(request)
                else:
                    handler = handlers.get(type(request))
                    if handler is None or self._endpoint is None:
                        raise WireError(f"{type(request).__name__} is not expected")
                    reply = handler(request)
            except Gone as error:
                reply = failure(str(error))
            except OSError as error:
                if is_cut(error):
                    raise
                reply = failure(f"{error.strerror or error}: {error.filename or self._path}")
            self._link.answer(reply)

    @property
    def _end(self) -> LocalEndpoint:
        assert self._endpoint is not None
        return self._endpoint

    def _open(self, request: SyncOpen) -> SyncOpened:
        if self._endpoint is not None:
            raise WireError("the root is open")
        if not request.root.isalnum() or os.path.normpath(request.path) != request.path:
            raise WireError(f"{request.path!r} is no path of a root")
        self._path, self._single = request.path, request.single
        tree = f"{self._directory}/tree{request.path}"
        stage = f"{self._directory}/stage/{request.root}"
        self._lock(f"{stage}.lock")
        self._marker, self._made = f"{stage}.known", f"{stage}.made"
        if not os.path.lexists(tree):
            # What the host remembers of a copy is of another one. It may have to be told again,
            # after a connection that was cut.
            _write(self._made)
            _remove(self._marker)
        os.makedirs(os.path.dirname(tree), 0o755, exist_ok=True)
        if not request.single and not os.path.isdir(tree):
            os.mkdir(tree)
            os.chmod(tree, request.directory_mode)
        # Before the first scan, so that nothing falls in between.
        self._watcher.add(tree, request.root)
        self._tree = tree
        rules = json.loads(request.rules)
        self._endpoint = LocalEndpoint(
            tree,
            stage,
            system.boot_id(),
            ignore=Ignore([(str(text), bool(ignores)) for text, ignores in rules]),
            policy=Policy(request.file_mode, request.directory_mode),
            single=request.single,
            durable=False,
            cache=f"{self._directory}/stage/{request.root}.cache",
            trust=_ORDERED if request.ordered else system.boot_id(),
            told=True,
        )
        self._link.at = lambda: self._end.at
        return SyncOpened(
            boot_id=system.boot_id(),
            packed=packing.available(),
        )

    def _copies(self, request: SyncCopies) -> SyncYes:
        roots = request.roots.split()
        if not all(root.isalnum() for root in roots):
            raise WireError("an id of a root is malformed")
        return SyncYes(done=not os.path.exists(self._made) and all(map(self._has, roots)))

    def _has(self, root: str) -> bool:
        """Whether a root's copy is here since its last scan."""
        marker = f"{self._directory}/stage/{root}.known"
        try:
            with open(marker, "rb") as file:
                path = os.fsdecode(file.read())
        except FileNotFoundError:
            return False
        # An earlier release has left the path out. Another copy may be anywhere, then.
        return marker == self._marker or (
            bool(path) and os.path.lexists(f"{self._directory}/tree{path}")
        )

    def _lock(self, path: str) -> None:
        """Have the root for us alone: an earlier connection may still be at work on it.

        :raises OSError: it does not end.
        """
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError("an earlier connection is still at work") from None
                time.sleep(_LOCK_STEP_S)

    def _scan(self, request: SyncScan) -> SyncScanned:
        if not self._scanned:
            # The host goes on only when it has forgotten an earlier copy, on its disk. Marked any
            # sooner, a copy that is empty because it is new could pass for one that was emptied.
            _write(self._marker, os.fsencode(self._path))
            _remove(self._made)
        seen = self._watcher.take(self._tree)
        if seen is None:
            seen = Changes()
        full = request.full or not self._scanned or seen.lost
        snapshot = self._end.scan(
            None if full else seen.directories,
            seen.files | self._unsettled,
            seen.arrived,
            lost=seen.lost,
        )
        self._scanned = True
        self._unsettled = snapshot.requeue
        self._files_read += snapshot.files_read
        told = 0

        def rows() -> Iterator[tuple[bytes, bytes]]:
            # One by one: after a first synchronisation they are as many as the files.
            nonlocal told
            for path, entry in changes(self._known, snapshot.root):
                told += 1
                yield path.encode(), wire.pack_entry(entry)

        self._link.send(wire.rows(rows()))
        self._link.send(wire.rows((path.encode(), b"") for path in snapshot.requeue))
        # What the host was told of; it has the same tree when it has read all of it.
        self._known = snapshot.root
        return SyncScanned(
            present=snapshot.root is not None,
            device=snapshot.device,
            files_read=snapshot.files_read,
            bytes_read=snapshot.bytes_read,
            changes=told,
            rescued=self._end.has_rescued(),
        )

    def _missing(self, request: SyncMissing) -> Done:
        leaves = [wire.parse_leaf(leaf) for (leaf,) in self._link.rows(1)]
        missing = {leaf.digest for leaf in self._end.missing(leaves)}
        self._link.send(
            wire.rows(
                (wire.pack_number(number),)
                for number, leaf in enumerate(leaves)
                if leaf.digest in missing
            )
        )
        return Done()

    def _read(self, request: SyncRead) -> Done:
        paths = [wire.parse_path(path) for (path,) in self._link.rows(1)]
        self._link.send_contents(self._readable(paths))
        return Done()

    def _readable(self, paths: list[str]) -> Iterator[tuple[bytes, int, Iterator[bytes]]]:
        for number, path in enumerate(paths):
            try:
                mtime_ns, chunks = self._end.read(path)
            except Gone:
                continue
            yield wire.pack_number(number), mtime_ns, chunks

    def _stage(self, request: SyncStage) -> Done:
        refused: list[bytes] = []
        next_piece = self._link.contents()

        def take() -> None:
            for key, mtime_ns, chunks in wire.Contents(next_piece):
                leaf = wire.parse_leaf(key)
                if not self._end.stage_all([(leaf, mtime_ns, chunks)]):
                    refused.append(leaf.digest)

        to_the_end(next_piece, take)
        self._link.send(wire.rows((digest,) for digest in refused))
        return Done()

    def _stage_local(self, request: SyncStageLocal) -> Done:
        wanted = [
            (wire.parse_path(path), wire.parse_leaf(leaf)) for leaf, path in self._link.rows(2)
        ]
        taken = self._end.stage_local(wanted)
        self._link.send(
            wire.rows(
                (wire.pack_number(number),)
                for number, (_, leaf) in enumerate(wanted)
                if leaf.digest not in taken
            )
        )
        return Done()

    def _stamps(self, request: SyncStamps) -> Done:
        paths = [wire.parse_path(path) for (path,) in self._link.rows(1)]
        self._link.send(wire.rows((stamp,) for stamp in self._end.stamps(paths)))
        return Done()

    def _sums(self, request: SyncSums) -> Done:
        path, leaf = wire.parse_path(request.path.encode()), _file(request.leaf)
        self._link.send(wire.rows(wire.pieces(self._end.sums(path, leaf))))
        return Done()

    def _numbers(self, leaf: Leaf) -> list[int]:
        limit = blocks.count(leaf.size)
        return [wire.parse_number(number, limit) for (number,) in self._link.rows(1)]

    def _read_blocks(self, request: SyncReadBlocks) -> Done:
        path, leaf = wire.parse_path(request.path.encode()), _file(request.leaf)
        mtime_ns, chunks = self._end.read_blocks(path, leaf, self._numbers(leaf))
        self._link.send_contents([(b"", mtime_ns, chunks)])
        return Done()

    def _stage_blocks(self, request: SyncStageBlocks) -> SyncYes:
        path = wire.parse_path(request.path.encode())
        leaf, base = _file(request.leaf), _file(request.base)
        numbers = self._numbers(leaf)
        next_piece = self._link.contents()

        def take() -> bool:
            done = False
            for _, mtime_ns, chunks in wire.Contents(next_piece):
                # The host has found the blocks to be right when it read them.
                done = self._end.stage_blocks(
                    leaf, path, base, numbers, mtime_ns, chunks, verify=False
                )
            return done

        return SyncYes(done=to_the_end(next_piece, take))

    def _build(self, request: SyncBuild) -> Done:
        operations = self._operations()
        next_piece = self._link.contents()
        contents = (
            (wire.parse_number(key, len(operations)), mtime_ns, chunks)
            for key, mtime_ns, chunks in wire.Contents(next_piece)
        )
        # The host has found them to be right when it read them.
        results = to_the_end(
            next_piece, lambda: self._end.build(operations, contents, verify=False)
        )
        self._tell(results)
        return Done()

    def _apply(self, request: SyncApply) -> Done:
        operations = self._operations()
        next_piece = self._link.contents()
        contents = (
            wire.parse_arrival(key, mtime_ns, chunks, len(operations))
            for key, mtime_ns, chunks in wire.Contents(next_piece)
        )

        def work() -> list[Result]:
            # The host has found them to be right when it read them.
            return list(self._end.apply(operations, contents, verify=False))

        self._tell(to_the_end(next_piece, work))
        return Done()

    def _operations(self) -> list[Operation]:
        return [
            Operation(
                wire.parse_path(path),
                wire.parse_entry(before),
                wire.parse_entry(after),
                in_place=bool(in_place),
            )
            for path, before, after, in_place in self._link.rows(4)
        ]

    def _tell(self, results: Iterable[Result]) -> None:
        self._link.send(
            wire.rows(
                (_RESULTS[result.status], result.reason.encode(errors="replace"))
                for result in results
            )
        )

    def _flush(self, request: SyncFlush) -> Done:
        self._end.flush()
        self._rest(last=request.last)
        return Done()

    def _begin_flush(self, request: SyncBeginFlush) -> Done:
        self._end.begin_flush()
        return Done()

    def _flushed(self, request: SyncFlushed) -> SyncYes:
        done = self._end.flushed()
        if done:
            self._rest(last=False)
        return SyncYes(done=done)

    def _rest(self, *, last: bool) -> None:
        """Write down what is known, and give back the memory that it took to find that out."""
        if self._files_read or last:
            self._end.save_cache(_ORDERED if last else system.boot_id())
            self._files_read = 0
        system.give_memory_back()

    def _rescued(self, request: SyncRescued) -> Done:
        self._link.send(
            wire.rows(
                (found.name.encode(), found.path.encode(errors="replace"), found.leaf)
                for found in self._end.rescued()
            )
        )
        return Done()

    def _rescued_name(self, name: str) -> str:
        if not name.startswith("rescued-") or not name.removeprefix("rescued-").isdigit():
            raise WireError(f"{name[:100]!r} is not a rescued file")
        return name

    def _read_rescued(self, request: SyncReadRescued) -> Done:
        chunks = self._end.read_rescued(self._rescued_name(request.name))
        self._link.send_contents([(b"", 0, chunks)])
        return Done()

    def _forget_rescued(self, request: SyncForgetRescued) -> Done:
        self._end.forget_rescued(self._rescued_name(request.name))
        return Done()

    def _mount(self, request: SyncMount) -> Done:
        system.bind(f"{self._directory}/tree{self._path}", self._path)
        if "\n" not in self._path:
            # The guest's next boot mounts it before the engine starts containers.
            path = f"{self._directory}/mounts"
            with open(path, "a+", encoding="utf-8", errors="surrogateescape") as file:
                file.seek(0)
                if self._path not in file.read().split("\n"):
                    file.write(f"{self._path}\n")
        return Done()

    def _pin(self, request: SyncPin) -> Done:
        self._end.pin(wire.parse_path(request.path.encode()))
        return Done()
