"""What has changed in a tree of the host since it was last asked.

A watch says where to look, never what is there. It hides no loss: whatever is not known to be
told makes :meth:`HostWatch.take` say that everything is to be scanned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from wherry.platform import Platform, TreeWatcher, current
from wherry_sync.entry import TEMPORARY_PREFIX, split
from wherry_sync.ignore import NOTHING, Ignore


class HostWatch:
    """Watches a directory with all that is below it, or a single file.

    Safe to use from several threads. What :class:`~wherry_sync.ignore.Ignore` ignores is not
    watched, so other rules need another watch.

    :param changed: called in a thread of the watch when :meth:`take` has something to say for
        the first time after it was asked; must be quick, and must not call :meth:`take`.
    :ivar problem: why nothing is watched any more; then :meth:`take` always asks for
        everything, and the caller has to scan by the clock. None if all is well.
    """

    def __init__(
        self,
        root: Path,
        changed: Callable[[], None],
        *,
        ignore: Ignore = NOTHING,
        platform: Platform | None = None,
    ) -> None:
        self.problem: str | None = None
        self._changed = changed
        self._ignore = ignore
        self._lock = threading.Lock()
        self._dirty: set[str] | None = None
        self._told = False
        self._watcher: TreeWatcher | None = None
        try:
            self._watcher = (platform or current()).watch_tree(root, self, self._skipped)
        except OSError as error:
            self.failed(f"{error.filename or root}: {error.strerror or error}")

    @property
    def exact(self) -> bool:
        """Whether what :meth:`take` gives covers every change by system calls that returned
        before it was called. If not, a barrier has to scan everything."""
        return self.problem is None and self._watcher is not None and self._watcher.exact

    def take(self) -> set[str] | None:
        """Return the directories whose own entries may have changed since the last call.

        The paths are from the root, whose own is empty. None asks for a scan of everything: at
        the start, when the system lost events, and while there is a :attr:`problem`.
        """
        if self._watcher is not None:
            self._watcher.catch_up()
        with self._lock:
            dirty, self._dirty, self._told = self._dirty, set(), False
            return None if self.problem is not None else dirty

    def close(self) -> None:
        """Stop watching; safe to call twice."""
        if self._watcher is not None:
            self._watcher.close()

    # What the watcher tells

    def dirty(self, directory: str) -> None:
        """Take note of a directory."""
        with self._lock:
            if self._dirty is not None:
                self._dirty.add(directory)

    def lost(self) -> None:
        """Take note that anything may have changed."""
        with self._lock:
            self._dirty = None

    def failed(self, reason: str) -> None:
        """Take note that nothing will be told any more."""
        with self._lock:
            self._dirty = None
            self.problem = reason

    def notify(self) -> None:
        """Say that there is something to take, once."""
        with self._lock:
            due = self._dirty is None or bool(self._dirty)
            told, self._told = self._told, self._told or due
        if due and not told:
            self._changed()

    def _skipped(self, path: str, is_directory: bool) -> bool:
        name = split(path)[1]
        return name.startswith(TEMPORARY_PREFIX) or self._ignore(path, is_directory)
