"""Files that must not get lost: the guest's side of conflicts, and what a container deleted.

A directory with the contents under numbers and an index of JSON lines that says what they were.
A line is written before its file arrives, so a file is never without one; a line whose file
never came is dropped when the index is read. A file gets its number when all of it is there.
Paths are data here, never names, so whatever the guest calls its files does no harm.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from wherry.core.files import write_atomic
from wherry_sync.entry import Leaf, is_file
from wherry_sync.stage import Damaged, fill

_INDEX = "index"
_SPARE_LINES = 100


@dataclass(frozen=True, slots=True)
class Kept:
    """A file or link that is kept.

    :ivar time_s: when, since the epoch.
    :ivar path: where it was in the tree.
    :ivar entry: the leaf, in hexadecimal.
    """

    number: int
    time_s: float
    path: str
    entry: str

    @property
    def leaf(self) -> Leaf:
        """What it is."""
        return Leaf(bytes.fromhex(self.entry))


class Keep:
    """A directory of kept files. One thread at a time.

    :param limit_bytes: the oldest go when there is more; None to keep all. What is larger by
        itself takes the place of nothing, and stays until something else comes: whatever was
        kept last is there.
    :param limit_files: likewise of their number.
    :raises OSError: the directory cannot be made or read.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit_bytes: int | None = None,
        limit_files: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._limit_files = limit_files
        self._now = now
        self._kept = {kept.number: kept for kept in self._read()}
        self._bytes = sum(kept.leaf.size for kept in self._kept.values())
        self._number = max(self._kept, default=0)
        self._part = directory / "part"
        self._write()
        for path in directory.iterdir():
            if path.name != _INDEX and not (path.name.isdigit() and int(path.name) in self._kept):
                path.unlink()
        self._index = self._open_index()

    def close(self) -> None:
        """Close the index; safe to call twice."""
        self._index.close()

    @property
    def last(self) -> int:
        """The number that was given last."""
        return self._number

    def __iter__(self) -> Iterator[Kept]:
        return iter(list(self._kept.values()))

    def open(self, kept: Kept) -> Iterator[bytes]:
        """Return the contents of a kept file."""
        with self._path(kept.number).open("rb") as file:
            while data := file.read(1 << 20):
                yield data

    def save(self, path: str, leaf: Leaf, chunks: Iterable[bytes], *, again: bool = False) -> bool:
        """Keep contents, on the disk when this returns; the same ones are not kept twice.

        Those that were kept before get another number, so that they count as new.

        :param again: it is the same event as the last time; then they stay as they are.
        :returns: False if they are not the leaf's contents, and nothing was kept.
        :raises OSError: the disk is full, or failed.
        """
        for old in self._of(path, leaf):
            if not again:
                self._renumber(old)
            return True
        with self._part.open("wb") as file:
            if is_file(leaf):
                try:
                    fill(file.fileno(), leaf, chunks)
                except Damaged:
                    return False
            os.fsync(file.fileno())
        kept = self._announce(path, leaf)
        os.fsync(self._index.fileno())
        target = self._path(kept.number)
        self._part.rename(target)
        with target.open("rb+") as file:
            # The new name as well: it has changed the file's status.
            os.fsync(file.fileno())
        self._add(kept)
        return True

    def take(self, fd: int, name: str, path: str, leaf: Leaf) -> None:
        """Move a file in here that is about to be removed; fits ``Policy.keep``.

        :param fd: the directory that it is in.
        :raises OSError: it can be neither moved nor copied.
        """
        kept = self._announce(path, leaf)
        target = self._path(kept.number)
        if is_file(leaf):
            try:
                os.rename(name, target, src_dir_fd=fd)
            except OSError:
                # Another filesystem, most likely.
                source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                with os.fdopen(source, "rb") as old, self._part.open("wb") as file:
                    shutil.copyfileobj(old, file)
                self._part.rename(target)
        else:
            target.write_bytes(b"")
        self._add(kept)

    def forget(self, kept: Kept) -> None:
        """Remove a kept file."""
        if self._kept.pop(kept.number, None) is not None:
            self._bytes -= kept.leaf.size
            self._path(kept.number).unlink(missing_ok=True)

    def drop(self, path: str, leaf: Leaf) -> None:
        """Remove what was kept of a path, if it was kept."""
        for kept in self._of(path, leaf):
            self.forget(kept)

    def _of(self, path: str, leaf: Leaf) -> Iterator[Kept]:
        entry = leaf.hex()
        return (kept for kept in self if (kept.path, kept.entry) == (path, entry))

    def _renumber(self, old: Kept) -> None:
        kept = self._announce(old.path, old.leaf)
        os.fsync(self._index.fileno())
        self._path(old.number).rename(self._path(kept.number))
        self._kept[kept.number] = kept
        del self._kept[old.number]

    def _announce(self, path: str, leaf: Leaf) -> Kept:
        self._lines += 1
        if self._lines > 2 * len(self._kept) + _SPARE_LINES:
            self._index.close()
            try:
                self._write()
            finally:
                self._index = self._open_index()
        self._number += 1
        kept = Kept(self._number, self._now(), path, leaf.hex())
        self._index.write(json.dumps(asdict(kept)) + "\n")
        self._index.flush()
        return kept

    def _add(self, kept: Kept) -> None:
        self._kept[kept.number] = kept
        self._bytes += kept.leaf.size
        room = self._limit_bytes
        if room is not None:
            for old in self:
                if old is not kept and old.leaf.size > room:
                    self.forget(old)
            if kept.leaf.size > room:
                room += kept.leaf.size
        while len(self._kept) > 1 and (
            (room is not None and self._bytes > room)
            or (self._limit_files is not None and len(self._kept) > self._limit_files)
        ):
            self.forget(next(iter(self._kept.values())))

    def _read(self) -> Iterator[Kept]:
        try:
            text = (self._directory / _INDEX).read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                kept = Kept(**json.loads(line))
            except (ValueError, TypeError):
                # The last line of a crash.
                continue
            if self._path(kept.number).exists():
                yield kept

    def _write(self) -> None:
        """Begin an index without the lines of what is gone."""
        lines = [json.dumps(asdict(kept)) + "\n" for kept in self._kept.values()]
        write_atomic(self._directory / _INDEX, "".join(lines).encode())
        self._lines = len(lines)

    def _open_index(self) -> TextIO:
        return (self._directory / _INDEX).open("a", encoding="utf-8")

    def _path(self, number: int) -> Path:
        return self._directory / str(number)
