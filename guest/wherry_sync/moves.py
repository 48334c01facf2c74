"""Moves between the stage and the tree, by which nothing is lost that somebody writes meanwhile.

What is displaced is looked at once more when it is in the stage, where nobody writes by its name:
if it is not what was checked before, it goes back.
"""

from __future__ import annotations

import os
import stat
import time

from wherry_sync import kernel, records
from wherry_sync.operation import Stale

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from wherry_sync.entry import Leaf
    from wherry_sync.stage import Stage


class Moves:
    """Moves of one stage and its tree; ``fd`` is always the directory of a name in the tree.

    The stage's journal is the caller's to write, before.

    :param checkpoint: called between any two steps that change something.
    """

    def __init__(self, stage: Stage, checkpoint: Callable[[str], None]) -> None:
        self._stage = stage
        self._checkpoint = checkpoint

    def place(self, made: str, fd: int, name: str) -> None:
        """Move a file from the stage to a name that has nothing."""
        if not kernel.rename_exclusive(self._stage.fd, made, fd, name):
            os.link(made, name, src_dir_fd=self._stage.fd, dst_dir_fd=fd, follow_symlinks=False)
            self._stage.discard(made)

    def displace(self, fd: int, name: str, path: str, before: Leaf, status: os.stat_result) -> str:
        """Take a file or link out of the tree; return its name in the stage.

        It is moved, so those who watch hear that it has left (``IN_MOVED_FROM``). They would
        hear of a deletion if it were unlinked in the tree, but that takes whatever has the name
        at that moment, and what somebody had just renamed to it could not be put back.

        :param status: of what was checked.
        :raises Stale: it is not that any more, and still in the tree.
        """
        taken = self._stage.name("t")
        self._checkpoint("displace")
        os.rename(name, taken, src_dir_fd=fd, dst_dir_fd=self._stage.fd)
        self._checkpoint("displaced")
        if not self._is_still(taken, before, status):
            self.put_back(taken, fd, name, path)
            raise Stale("it was written at the last moment")
        return taken

    def swap(
        self,
        fd: int,
        name: str,
        path: str,
        before: Leaf,
        status: os.stat_result,
        made: str,
        ours: os.stat_result,
    ) -> None:
        """Put a file or link of the stage in the place of another, which has its name then.

        :param status: of what was checked, and ``ours`` of the one in the stage.
        :raises Stale: what was there is not that any more, and still in the tree.
        """
        self._checkpoint("exchange")
        try:
            self._exchange(made, fd, name)
        except OSError:
            self._stage.discard(made)
            raise
        self._checkpoint("exchanged")
        if not self._is_still(made, before, status):
            # What is in the stage was written after the check: it goes back where it was,
            # and what comes out in exchange is ours, unless that was written to as well.
            self._exchange(made, fd, name)
            back = os.stat(made, dir_fd=self._stage.fd, follow_symlinks=False)
            if _same_status(ours, back):
                self._stage.discard(made)
            else:
                self._stage.rescue(made, path)
            raise Stale("it was written at the last moment")

    def _exchange(self, made: str, fd: int, name: str) -> None:
        """Swap a file in the stage with one in the tree.

        The name in the tree comes first, for those who watch its directory. Linux tells of an
        exchange as of two moves, that of the first name before that of the second
        (``vfs_rename`` in ``fs/namei.c``): they hear that the old file has left the name, and
        then that ours has come to it. The other way round, the last they hear is that the name
        has gone. The order decides nothing else: both names change at once before anybody is
        told, so a name that is looked up is there all the time, and what has been displaced is
        in the stage to be looked at.

        Where the filesystem cannot, the displaced file is held by a second name; that misses
        a file that is itself replaced between the two steps.
        """
        if kernel.exchange(fd, name, self._stage.fd, made):
            return
        held = self._stage.name("t")
        os.link(name, held, src_dir_fd=fd, dst_dir_fd=self._stage.fd, follow_symlinks=False)
        os.rename(made, name, src_dir_fd=self._stage.fd, dst_dir_fd=fd)
        os.rename(held, made, src_dir_fd=self._stage.fd, dst_dir_fd=self._stage.fd)

    def put_back(self, taken: str, fd: int, name: str, path: str) -> None:
        """Return what was displaced to the tree; if its name is taken, keep it for the user."""
        try:
            self.place(taken, fd, name)
        except OSError:
            self._stage.rescue(taken, path)

    def _is_still(self, taken: str, before: Leaf, checked: os.stat_result) -> bool:
        """Whether a displaced file is what was checked before it was displaced."""
        status = os.stat(taken, dir_fd=self._stage.fd, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and _same_status(checked, status):
            # A rename changes the time of change, so it is the other time that has to be old
            # enough to tell of a write.
            if status.st_mtime_ns < time.time_ns() - 5 * records.COARSE_NS:
                return True
        elif not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
            return False
        return self._stage.leaf(taken) == before


def _same_status(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_mode, one.st_ino, one.st_size, one.st_mtime_ns) == (
        other.st_mode,
        other.st_ino,
        other.st_size,
        other.st_mtime_ns,
    )
