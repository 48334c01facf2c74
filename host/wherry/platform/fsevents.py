"""Changes in a tree, told by macOS (FSEvents), through watchdog's binding.

Of watchdog's own emitter only the stream is used: it drops the flags that say that events were
lost, and looks at each path again. FSEvents tells when it likes to, some 10 ms late and without
a bound, so nothing is ever proved by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from watchdog.observers.api import EventQueue, ObservedWatch
from watchdog.observers.fsevents import FSEventsEmitter

from wherry.platform.base import ChangeSink
from wherry.platform.changes import Teller

# CoreServices/FSEvents/FSEvents.h: kFSEventStreamEventFlag…
_MUST_SCAN_SUBDIRS, _USER_DROPPED, _KERNEL_DROPPED, _IDS_WRAPPED = 0x1, 0x2, 0x4, 0x8
_ROOT_CHANGED, _MOUNT, _UNMOUNT = 0x20, 0x40, 0x80
_CREATED, _REMOVED, _RENAMED, _IS_DIRECTORY = 0x100, 0x200, 0x800, 0x20000
_LOST = _MUST_SCAN_SUBDIRS | _USER_DROPPED | _KERNEL_DROPPED | _IDS_WRAPPED | _MOUNT | _UNMOUNT
_NAMES = _CREATED | _REMOVED | _RENAMED

_JOIN_S = 10.0


class _Emitter(FSEventsEmitter):
    """A stream in a thread, whose events go to one function."""

    def __init__(
        self, path: str, take: Callable[[str, int], None], end: Callable[[str], None]
    ) -> None:
        super().__init__(EventQueue(), ObservedWatch(path, recursive=True))
        self._take = take
        self._end = end

    def events_callback(
        self,
        paths: Sequence[bytes | str],
        inodes: Sequence[int],
        flags: Sequence[int],
        ids: Sequence[int],
    ) -> None:
        """Called by the stream."""
        for path, flag in zip(paths, flags, strict=True):
            self._take(os.fsdecode(path), flag)
        self._end("")

    def run(self) -> None:
        """Run the stream until it is stopped."""
        super().run()
        if self.should_keep_running() and self._startup_error is None:
            self._end("the system ended the watch")


class FSEventsWatcher:
    """Watches a directory with all that is below it, or a single file.

    :raises OSError: it cannot be watched.
    """

    exact = False

    def __init__(self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]) -> None:
        self._sink = sink
        self._teller = Teller(root, sink, skipped)
        self._emitter = _Emitter(self._teller.path, self._take, self._end)
        try:
            self._emitter.start()
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{root} cannot be watched: {error}") from error

    def catch_up(self) -> None:
        """Do nothing: there is no way to ask."""

    def close(self) -> None:
        """Stop the thread and release all; safe to call twice."""
        self._emitter.stop()
        if self._emitter.is_alive():
            self._emitter.join(_JOIN_S)

    def _take(self, path: str, flags: int) -> None:
        root = self._teller.path
        if flags & _ROOT_CHANGED:
            self._sink.failed(f"{root}: it was moved, removed or unmounted")
        elif flags & _LOST or not (path == root or path.startswith(f"{root.rstrip('/')}/")):
            self._sink.lost()
        elif path == root:
            if not self._teller.single:
                self._sink.dirty("")
        else:
            self._teller.tell(
                path[len(root.rstrip("/")) + 1 :].rstrip("/"),
                contents=not flags & _NAMES,
                is_directory=bool(flags & _IS_DIRECTORY),
            )

    def _end(self, reason: str) -> None:
        if reason:
            self._sink.failed(f"{self._teller.path}: {reason}")
        self._sink.notify()
