"""The database that :class:`~wherry.sync.core.store.Store` is kept in, of this release or another.

SQLite with a write-ahead log: its transactions are on the disk when they end, but for those that
need not be.
"""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from wherry.core.errors import WherryError

_SCHEMA = """
CREATE TABLE ancestor (
    root INTEGER NOT NULL, path BLOB NOT NULL, entry BLOB NOT NULL, PRIMARY KEY (root, path)
) WITHOUT ROWID;
CREATE TABLE pending (
    root INTEGER NOT NULL, side INTEGER NOT NULL, path BLOB NOT NULL,
    before BLOB, after BLOB, number INTEGER NOT NULL, origin INTEGER,
    PRIMARY KEY (root, side, path)
) WITHOUT ROWID;
CREATE TABLE side (
    root INTEGER NOT NULL, side INTEGER NOT NULL, boot TEXT NOT NULL, device INTEGER,
    device_boot TEXT, inode TEXT, PRIMARY KEY (root, side)
) WITHOUT ROWID;
"""
_COPIES = """
CREATE TABLE copies (
    root INTEGER NOT NULL, copy INTEGER NOT NULL, PRIMARY KEY (root, copy)
) WITHOUT ROWID;
"""
_WITHHELD = """
CREATE TABLE withheld (
    root INTEGER NOT NULL, path BLOB NOT NULL, entry BLOB, stamp BLOB NOT NULL, coming BLOB,
    PRIMARY KEY (root, path)
) WITHOUT ROWID;
CREATE TABLE written (root INTEGER PRIMARY KEY, written INTEGER NOT NULL);
"""
_OWED = "INSERT INTO written SELECT DISTINCT root, 1 FROM ancestor;"
"""An earlier release did not tell who had written."""

_FROM_1 = "ALTER TABLE pending ADD COLUMN origin INTEGER;"
_FROM_2 = "ALTER TABLE side ADD COLUMN device_boot TEXT;"
_FROM_4 = "ALTER TABLE side ADD COLUMN inode TEXT;"
"""As text, for SQLite's integers have a sign."""

_VERSION = 6
_PATIENCE_S = 60.0
"""For another root's transaction, which may be a large one on a slow disk."""

_OPENING = threading.Lock()
"""SQLite does not wait for another connection that makes or removes the write-ahead log."""


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, or make it; one of an earlier release is changed to be of this one.

    :raises WherryError: the file is not ours, or of a later release.
    """
    opened = sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None)
    try:
        with _OPENING:
            _prepare(opened, path)
    except sqlite3.DatabaseError as error:
        opened.close()
        damaged = not isinstance(error, sqlite3.OperationalError)
        raise WherryError(
            f"{path} cannot be read: {error}",
            hint="move it away; what differs on both sides is then a conflict" if damaged else "",
        ) from error
    except BaseException:
        opened.close()
        raise
    return opened


def close(opened: sqlite3.Connection) -> None:
    """Close a database; safe to call twice."""
    with _OPENING:
        opened.close()


def _prepare(opened: sqlite3.Connection, path: Path) -> None:
    opened.execute("PRAGMA journal_mode = WAL").close()
    # Not only consistent after a loss of power but complete: "begin" is relied on.
    opened.execute("PRAGMA synchronous = FULL").close()
    ((version,),) = opened.execute("PRAGMA user_version").fetchall()
    from_5 = _WITHHELD + _OWED
    from_4 = _FROM_4 + from_5
    from_3 = _COPIES + from_4
    changes = {
        0: _SCHEMA + _COPIES + _WITHHELD,
        1: _FROM_1 + _FROM_2 + from_3,
        2: _FROM_2 + from_3,
        3: from_3,
        4: from_4,
        5: from_5,
    }.get(version)
    if changes is not None:
        opened.executescript(f"BEGIN IMMEDIATE;{changes}PRAGMA user_version = {_VERSION};COMMIT;")
    elif version != _VERSION:
        raise WherryError(
            f"{path} is of another release of wherry (version {version})",
            hint="install that release, or remove the file to compare both sides anew",
        )


class Transaction:
    """A transaction, on the disk at its end; or at the end of a later one, if it is lazy."""

    def __init__(self, database: sqlite3.Connection, *, lazy: bool = False) -> None:
        self._database = database
        self._lazy = lazy

    def __enter__(self) -> None:
        if self._lazy:
            # With a write-ahead log this waits for the disk at a checkpoint alone.
            self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")
        if self._lazy:
            self._database.execute("PRAGMA synchronous = FULL")
