"""The ancestor, and which paths are not on both disks yet: a database.

A cycle goes through here twice. :meth:`Store.begin` writes down, before anything is touched,
that its paths are pending on both sides, with what was there for certain; :meth:`Store.commit`
writes what both sides have now into the ancestor. Later :meth:`Store.confirm` forgets what was
pending before a side's disk was flushed. Each is one transaction. The first is on the disk when it
returns, as is whatever tells of boots; the other two need not be: the log keeps their order, so
what a loss of power takes is the last of them, and that leaves what a crash before them would.

So whatever stops when, either the ancestor is what both sides had, or the path is pending; what
a side that lost power has at a pending path is judged by :mod:`wherry.sync.core.recover`.

Also paths at which both sides changed alike are pending: a side can lose its own change, too.

Roots that lie in each other have the same files, one after the other. What is remembered of a
file goes with it: :meth:`Store.take` moves it to the root that begins, so no two roots ever
remember the same path, and what the other one knew cannot be used when it is out of date.
It holds as long as the guest has the copy that it was learnt from, so :meth:`Store.copies` goes
along: on another data disk what is not there would look as if it had been deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from wherry.sync.core import database
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.core.recover import Pending
from wherry_sync.apply import no_fault
from wherry_sync.entry import EMPTY, Directory, Entry, Leaf

_DIRECTORY = b"D"
_UNCERTAIN = "uncertain"
"""Stands for two boots of a side, of which at least one is over."""

_TREES = ("ancestor", "pending", "withheld")
"""The tables of what is known of paths."""


@dataclass(frozen=True, slots=True)
class Withheld:
    """What does not come to the host: see :mod:`wherry.sync.core.withhold`.

    :ivar entry: what is in the guest, without children.
    :ivar stamp: what any write to it changes.
    :ivar coming: what we have begun to make of it, if anything.
    """

    entry: Entry | None
    stamp: bytes
    coming: Entry | None = None


class Store:
    """What is remembered of one root; a file may hold several. One thread at a time.

    :param path: of the database, made if missing.
    :param root: the root's number in it.
    :param checkpoint: called between any two steps that change something.
    :raises WherryError: the file is not ours, or of a later release.
    """

    def __init__(self, path: Path, root: int, checkpoint: Callable[[str], None] = no_fault) -> None:
        self._root = root
        self._checkpoint = checkpoint
        self._database = database.connect(path)
        ((last,),) = self._execute("SELECT coalesce(max(number), 0) FROM pending")
        self._number: int = last
        # While a flush goes on: what was there when it began, at the paths of rounds since.
        self._before: dict[str, Entry | None] = {}
        self._flushing: set[int] = set()

    def close(self) -> None:
        """Close the database; safe to call twice."""
        database.close(self._database)

    def load(self) -> Entry | None:
        """Return the ancestor."""
        # A directory comes before what is in it: its path is a prefix of theirs.
        children: dict[str, dict[str, Entry]] = {}
        root: Entry | None = None
        with closing(self._database.cursor()) as rows:
            # One by one: all of them at once would take as much memory again.
            for raw, data in rows.execute(
                "SELECT path, entry FROM ancestor WHERE root = ? ORDER BY path", (self._root,)
            ):
                path = raw.decode()
                entry: Entry = Leaf(data)
                if data == _DIRECTORY:
                    entry = Directory(children.setdefault(path, {}))
                if path:
                    parent, _, name = path.rpartition("/")
                    children[parent][name] = entry
                else:
                    root = entry
        return root

    def begin(
        self,
        changes: Mapping[str, tuple[Entry | None, Entry | None]],
        origins: Mapping[str, int] | None = None,
    ) -> None:
        """Make paths pending on both sides.

        :param changes: what is there, and what shall be; only shallow entries are kept. What
            was there when the path was made pending before is kept instead.
        :param origins: the side that has what shall be already, where one has.
        """
        origins = origins or {}
        self._number += 1
        if self._flushing:
            for path, (before, _) in changes.items():
                self._before.setdefault(path, before)
        self._checkpoint("begin")
        with database.Transaction(self._database):
            self._database.executemany(
                "INSERT INTO pending VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (root, side, path)"
                " DO UPDATE SET after = excluded.after, number = excluded.number,"
                " origin = excluded.origin",
                (
                    (
                        self._root,
                        side,
                        path.encode(),
                        _data(before),
                        _data(after),
                        self._number,
                        origins.get(path),
                    )
                    for path, (before, after) in changes.items()
                    for side in (HOST, GUEST)
                ),
            )
        self._checkpoint("begun")

    def commit(self, changes: Mapping[str, Entry | None]) -> None:
        """Change the ancestor by what :func:`~wherry_sync.diff.diff` says."""
        self._checkpoint("commit")
        with database.Transaction(self._database, lazy=True):
            self._change(changes)
        self._checkpoint("committed")

    def pending(self, side: int) -> dict[str, Pending]:
        """Return the paths that a side may not have on its disk."""
        return {
            path.decode(): Pending(_entry(before), _entry(after))
            for path, before, after in self._execute(
                "SELECT path, before, after FROM pending WHERE root = ? AND side = ?",
                self._root,
                side,
            )
        }

    def carried(self) -> list[tuple[str, int, Entry | None]]:
        """Return what was last to be carried from one side to the other: path, origin, entry."""
        return [
            (path.decode(), origin, _entry(after))
            for path, origin, after in self._execute(
                "SELECT path, origin, after FROM pending"
                " WHERE root = ? AND side = ? AND origin IS NOT NULL",
                self._root,
                HOST,
            )
        ]

    def ticket(self) -> int:
        """Return what to hand to :meth:`confirm` after a flush that starts now.

        Not between a cycle's first operation and its commit.
        """
        self._before.clear()
        self._flushing = {HOST, GUEST}
        return self._number

    def confirm(self, side: int, ticket: int) -> None:
        """Note that a side has on its disk all that was pending when the ticket was taken.

        At a path that is pending again since, that is what is there for certain.
        """
        self._checkpoint("confirm")
        with database.Transaction(self._database, lazy=True):
            self._execute(
                "DELETE FROM pending WHERE root = ? AND side = ? AND number <= ?",
                self._root,
                side,
                ticket,
            )
            self._database.executemany(
                "UPDATE pending SET before = ? WHERE root = ? AND side = ? AND path = ?",
                (
                    (_data(before), self._root, side, path.encode())
                    for path, before in self._before.items()
                ),
            )
        self._flushing.discard(side)
        if not self._flushing:
            self._before.clear()
        self._checkpoint("confirmed")

    def boot(self, side: int) -> str:
        """Return the boot in which a side was seen last; empty if it then ended in order."""
        return self._side(side)[0]

    def device(self, side: int) -> tuple[int | None, str]:
        """Return the device that a side's tree is on, and in which boot it had that number.

        None if it is not known; no boot if that is not.
        """
        return self._side(side)[1:3]

    def inode(self, side: int) -> int | None:
        """Return the inode of a side's root, as of the last :meth:`identify`; None if unknown."""
        return self._side(side)[3]

    def identify(self, side: int, inode: int) -> None:
        """Note the inode of a side's root, after both sides have met."""
        with database.Transaction(self._database, lazy=True):
            self._execute(
                "UPDATE side SET inode = ? WHERE root = ? AND side = ?",
                str(inode),
                self._root,
                side,
            )

    def copies(self) -> list[int]:
        """Return of which roots' copies in the guest is known what is remembered.

        Of its own, unless it was taken over from others and both sides have not met since.
        """
        return self._copies(self._root)

    def _copies(self, root: int) -> list[int]:
        found = self._execute("SELECT copy FROM copies WHERE root = ? ORDER BY copy", root)
        return [copy for (copy,) in found] or [root]

    def meet(
        self,
        boots: tuple[str, str],
        devices: tuple[int, int],
        changes: Mapping[str, Entry | None],
    ) -> None:
        """Note in which boots both sides are, and how the ancestor was changed for that.

        One transaction, so that a loss of power is answered exactly once; and so is what was
        carried over: later that would speak for what a loss of power has left. Whatever copies
        were known, what is remembered is of the root's own from now on.
        """
        self._checkpoint("meet")
        with database.Transaction(self._database):
            self._change(changes)
            self._execute("DELETE FROM copies WHERE root = ?", self._root)
            self._execute("UPDATE pending SET origin = NULL WHERE root = ?", self._root)
            for side in (HOST, GUEST):
                self._execute(
                    "INSERT INTO side VALUES (?, ?, ?, ?, ?, NULL) ON CONFLICT (root, side)"
                    " DO UPDATE SET boot = excluded.boot, device = excluded.device,"
                    " device_boot = excluded.device_boot",
                    self._root,
                    side,
                    boots[side],
                    devices[side],
                    boots[side],
                )
        self._checkpoint("met")

    def part(self, side: int, ticket: int) -> None:
        """Note that a side ended in order, after a flush; its next boot has lost nothing."""
        self.confirm(side, ticket)
        self._execute("UPDATE side SET boot = '' WHERE root = ? AND side = ?", self._root, side)

    def written(self) -> bool | None:
        """Return whether containers may have written what is not on the host; None if unknown."""
        return self._written(self._root)

    def _written(self, root: int) -> bool | None:
        for (written,) in self._execute("SELECT written FROM written WHERE root = ?", root):
            return bool(written)
        return None

    def withheld(self) -> dict[str, Withheld]:
        """Return what does not come to the host."""
        return {
            path.decode(): Withheld(_entry(entry), stamp, _entry(coming))
            for path, entry, stamp, coming in self._execute(
                "SELECT path, entry, stamp, coming FROM withheld WHERE root = ?", self._root
            )
        }

    def withhold(self, changes: Mapping[str, Withheld | None], *, written: bool) -> None:
        """Change what :meth:`withheld` and :meth:`written` return, in one transaction."""
        self._checkpoint("withhold")
        with database.Transaction(self._database):
            self._execute("INSERT OR REPLACE INTO written VALUES (?, ?)", self._root, written)
            self._database.executemany(
                "DELETE FROM withheld WHERE root = ? AND path = ?",
                ((self._root, path.encode()) for path in changes),
            )
            self._database.executemany(
                "INSERT INTO withheld VALUES (?, ?, ?, ?, ?)",
                (
                    (self._root, path.encode(), _data(new.entry), new.stamp, _data(new.coming))
                    for path, new in changes.items()
                    if new is not None
                ),
            )
        self._checkpoint("withheld")

    def forget(self) -> None:
        """Forget what both sides had; of the boots, and of who wrote, is known what was known.

        For what an end remembers of the contents of files it has to tell a loss of power; and
        what containers wrote is owed all the same.
        """
        with database.Transaction(self._database):
            for table in (*_TREES, "copies"):
                self._execute(f"DELETE FROM {table} WHERE root = ?", self._root)
            self._execute("UPDATE side SET device = NULL, inode = NULL WHERE root = ?", self._root)

    def take(self, other: int, theirs: str, ours: str) -> None:
        """Take over what is remembered of the files that this root has now, and another one had.

        What both remember is forgotten, as it cannot be told which of them had it last.

        :param theirs: the path in the other root of what is ``ours`` here; one is empty.
        """
        part, own = _part(other, theirs), _part(self._root, ours)
        ancestor = self._execute(f"SELECT path, entry FROM ancestor WHERE {_PART}", *part)
        pending = self._execute(
            f"SELECT side, path, before, after, number, origin FROM pending WHERE {_PART}", *part
        )
        withheld = self._execute(
            f"SELECT path, entry, stamp, coming FROM withheld WHERE {_PART}", *part
        )
        written = [each for each in (self.written(), self._written(other)) if each is not None]
        owes = any(written) if written else None
        knows = bool(ancestor or pending or withheld)
        if not knows and owes == self.written():
            return
        cut, at = len(_bytes(theirs)) + 1 if theirs else 0, _bytes(ours)

        def moved(path: bytes) -> bytes:
            return b"/".join(filter(None, (at, path[cut:])))

        known = self._execute(f"SELECT 1 FROM ancestor WHERE {_PART} LIMIT 1", *own)
        with database.Transaction(self._database):
            if owes is not None:
                # What containers owe to one of them, this one owes.
                self._execute("INSERT OR REPLACE INTO written VALUES (?, ?)", self._root, owes)
            if not knows:
                return
            for table in _TREES:
                for which in (part, own):
                    self._execute(f"DELETE FROM {table} WHERE {_PART}", *which)
            if known:
                return
            self._take_boots(other, with_devices=not ours)
            self._take_copies(other)
            if ancestor:
                names = at.split(b"/") if at else []
                above = [b"/".join(names[:depth]) for depth in range(len(names))]
                self._database.executemany(
                    "INSERT OR REPLACE INTO ancestor VALUES (?, ?, ?)",
                    [
                        *((self._root, path, _DIRECTORY) for path in above),
                        *((self._root, moved(path), entry) for path, entry in ancestor),
                    ],
                )
            self._database.executemany(
                "INSERT INTO pending VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((self._root, side, moved(path), *values) for side, path, *values in pending),
            )
            self._database.executemany(
                "INSERT INTO withheld VALUES (?, ?, ?, ?, ?)",
                ((self._root, moved(path), *values) for path, *values in withheld),
            )

    def _take_boots(self, other: int, *, with_devices: bool) -> None:
        """Note that either root's loss of power is one of this root's."""
        for side, boot, *device in self._execute(
            "SELECT side, boot, device, device_boot FROM side WHERE root = ?", other
        ):
            own, *own_device, _ = self._side(side)
            if own and boot and own != boot:
                boot = _UNCERTAIN
            # Its own directory may have become another one meanwhile.
            self._execute(
                "INSERT OR REPLACE INTO side VALUES (?, ?, ?, ?, ?, NULL)",
                self._root,
                side,
                boot or own,
                *(device if with_devices else own_device),
            )

    def _take_copies(self, other: int) -> None:
        """Note that what is remembered holds only if the guest has the other one's copies too."""
        copies = set(self._copies(other))
        if any(
            self._execute(f"SELECT 1 FROM {table} WHERE root = ? LIMIT 1", self._root)
            for table in ("ancestor", "pending")
        ):
            copies.update(self.copies())
        self._execute("DELETE FROM copies WHERE root = ?", self._root)
        self._database.executemany(
            "INSERT INTO copies VALUES (?, ?)", [(self._root, copy) for copy in sorted(copies)]
        )

    def _side(self, side: int) -> tuple[str, int | None, str, int | None]:
        for boot, device, device_boot, inode in self._execute(
            "SELECT boot, device, device_boot, inode FROM side WHERE root = ? AND side = ?",
            self._root,
            side,
        ):
            return boot, device, device_boot or "", None if inode is None else int(inode)
        return "", None, "", None

    def _change(self, changes: Mapping[str, Entry | None]) -> None:
        self._database.executemany(
            "DELETE FROM ancestor WHERE root = ? AND path = ?",
            ((self._root, path.encode()) for path, entry in changes.items() if entry is None),
        )
        self._database.executemany(
            "INSERT OR REPLACE INTO ancestor VALUES (?, ?, ?)",
            (
                (self._root, path.encode(), _data(entry))
                for path, entry in changes.items()
                if entry is not None
            ),
        )

    def _execute(self, statement: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
        with closing(self._database.cursor()) as cursor:
            return cursor.execute(statement, values).fetchall()


def _data(entry: Entry | None) -> bytes | None:
    if entry is None or isinstance(entry, Leaf):
        # sqlite3 takes subclasses of bytes for what they are.
        return entry
    return _DIRECTORY


def _entry(data: bytes | None) -> Entry | None:
    if data is None:
        return None
    return EMPTY if data == _DIRECTORY else Leaf(data)


_PART = "root = ? AND (path = ? OR path >= ? AND path < ?)"


def _part(root: int, path: str) -> tuple[int, bytes, bytes, bytes]:
    """Return the values of :data:`_PART` for a path of a root, and all that is below it."""
    raw = _bytes(path)
    # "0" is what comes after "/", and 255 is in no path, as they are UTF-8.
    return (root, raw, raw + b"/", raw + b"0") if raw else (root, raw, b"", b"\xff")


def _bytes(path: str) -> bytes:
    return path.encode(errors="backslashreplace")
