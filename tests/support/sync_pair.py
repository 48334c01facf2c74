"""Two directories that are kept equal, and crashes and losses of power for them."""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sync_trees import read

from wherry.sync.core.cycle import Cycle, Outcome
from wherry.sync.core.keep import Keep
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.core.store import Store
from wherry.sync.core.traits import Traits
from wherry_sync.apply import Policy
from wherry_sync.entry import FILE
from wherry_sync.ignore import NOTHING, Ignore
from wherry_sync.local import LocalEndpoint


def scratch() -> Path:
    """Return a new directory, in memory where that is possible: rounds wait for the disk a lot."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="wherry-sync-", dir=memory if memory.is_dir() else None))


class Crash(BaseException):
    """The process ends here; nothing that runs afterwards may tidy up."""


class Oldest(random.Random):
    """Chooses for a loss of power: what is lost is all that can be."""

    def choice(self, seq: Sequence[Any]) -> Any:
        """Return what is on the disk."""
        return seq[0]


class Fuse:
    """Ends the process, as it were, at the n-th point where something changes."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.points: list[str] = []
        self.action: Callable[[str], None] | None = None

    def __call__(self, point: str) -> None:
        self.points.append(point)
        if self.action is not None:
            self.action(point)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Crash(point)


class Pair:
    """A host's directory, a guest's directory, and all that keeps them equal.

    :param file: whether the roots are a single file each.
    """

    def __init__(
        self,
        directory: Path,
        *,
        ignore: Ignore = NOTHING,
        traits: Traits | None = None,
        file: bool = False,
    ) -> None:
        self.directory = directory
        self.host = directory / "host"
        self.guest = directory / "guest"
        if not file:
            self.host.mkdir(parents=True)
            self.guest.mkdir()
        self.ignore = ignore
        self.traits = traits
        self.fuse = Fuse()
        self.boots = ["host-1", "guest-1"]
        self.on_disk = [self.image(HOST), self.image(GUEST)]
        self.open()

    def open(self) -> None:
        """Start the process."""
        self.store = Store(self.directory / "sync.db", 1, self.fuse)
        self.trash = Keep(self.directory / "trash")
        self.conflicts = Keep(self.directory / "conflicts")
        self.ends = [
            LocalEndpoint(
                os.fspath(root),
                os.fspath(self.directory / f"{root.name}-stage"),
                boot,
                ignore=self.ignore,
                policy=Policy(keep=self.trash.take, links_stay=False) if side == HOST else None,
                checkpoint=self.fuse,
            )
            for side, (root, boot) in enumerate(
                zip((self.host, self.guest), self.boots, strict=True)
            )
        ]
        self.cycle = Cycle(*self.ends, self.store, self.conflicts, self.traits, self.fuse)

    def close(self) -> None:
        """End the process."""
        for part in (*self.ends, self.store, self.trash, self.conflicts):
            part.close()

    def restart(self) -> None:
        """End the process and start it again."""
        self.close()
        self.fuse.left = None
        self.open()

    def run(self) -> Outcome:
        """Do one round."""
        return self.cycle.run()

    def settle(self, rounds: int = 12) -> Outcome:
        """Do rounds until nothing changes; return the last one's outcome, all its conflicts."""
        conflicts: list[str] = []
        for _ in range(rounds):
            outcome = self.run()
            conflicts += outcome.conflicts
            if outcome.quiescent or outcome.halt:
                outcome.conflicts = conflicts
                return outcome
        raise AssertionError(f"not quiescent after {rounds} rounds: {outcome}")

    def flush(self, side: int) -> None:
        """Flush a side; what it has now survives a loss of power."""
        ticket = self.store.ticket()
        self.ends[side].flush()
        self.on_disk[side] = self.image(side)
        self.store.confirm(side, ticket)

    def trees(self) -> tuple[dict[str, object], dict[str, object]]:
        """Return what is on both sides."""
        return read(self.host), read(self.guest)

    def saved(self) -> set[str]:
        """Return the contents of all that was kept."""
        return {
            b"".join(keep.open(kept)).decode()
            for keep in (self.trash, self.conflicts)
            for kept in keep
            if kept.leaf.kind == FILE
        }

    def image(self, side: int) -> dict[str, tuple[str, bytes, int]]:
        """Return what is in a side's tree: kind, contents, mode by path."""
        found: dict[str, tuple[str, bytes, int]] = {}
        root = (self.host, self.guest)[side]
        if not root.is_dir():
            return found
        for path in root.rglob("*"):
            status = path.lstat()
            name = os.fspath(path.relative_to(root))
            if stat.S_ISLNK(status.st_mode):
                found[name] = ("link", os.fsencode(path.readlink()), 0)
            elif stat.S_ISDIR(status.st_mode):
                found[name] = ("directory", b"", status.st_mode)
            elif stat.S_ISREG(status.st_mode):
                found[name] = ("file", path.read_bytes(), status.st_mode)
        return found

    def lose_power(self, choices: random.Random, side: int = GUEST) -> None:
        """Let a side forget some of what it has not flushed, and boot anew.

        Each path gets, by choice, what is on the disk, what it has now, or nothing in it; on the
        host also the first half.
        """
        self.close()
        self.fuse.left = None
        now, on_disk = self.image(side), self.on_disk[side]
        root = (self.host, self.guest)[side]
        # The root itself stays: another one in its place would not be believed.
        for child in root.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
        after: dict[str, tuple[str, bytes, int]] = {}
        for name in sorted(now.keys() | on_disk.keys()):
            old, new = on_disk.get(name), now.get(name)
            picked = old
            if old != new:
                parts: list[tuple[str, bytes, int] | str | None] = [old, new]
                # A file that has only got another mode since has its contents on the disk.
                if old is None or new is None or old[:2] != new[:2]:
                    parts += ["0", "1"] if side == HOST else ["0"]
                found = choices.choice(parts)
                if isinstance(found, str):
                    like = new or old
                    if like is not None and like[0] == "file":
                        picked = ("file", like[1][: int(found) * len(like[1]) // 2], 0o100644)
                else:
                    picked = found
            parent = os.fspath(Path(name).parent)
            if picked is not None and (parent == "." or after.get(parent, ("",))[0] == "directory"):
                after[name] = picked
        for name, (kind, contents, mode) in after.items():
            path = root / name
            if kind == "directory":
                path.mkdir()
            elif kind == "link":
                path.symlink_to(os.fsdecode(contents))
            else:
                path.write_bytes(contents)
                path.chmod(stat.S_IMODE(mode))
        self.boots[side] += "+"
        self.on_disk[side] = self.image(side)
        self.open()
