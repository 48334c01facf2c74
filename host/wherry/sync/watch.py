"""The host's watch of one root."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

_JOIN_S = 5.0


class HostWatch(FileSystemEventHandler):
    """Collects the directories of a root whose entries may have changed.

    :param changed: called in a thread of the watch when there is something to take.
    """

    def __init__(self, root: Path, changed: Callable[[], None]) -> None:
        self._root = os.fspath(root)
        self._changed = changed
        self._lock = threading.Lock()
        self._seen: set[str] | None = None
        self.problem: str | None = None
        self._observer = Observer()
        try:
            self._observer.schedule(self, self._root, recursive=True)
            self._observer.start()
        except OSError as error:
            self.problem = str(error)

    def take(self) -> set[str] | None:
        """Return the directories since the last call, relative to the root; None for all."""
        with self._lock:
            seen, self._seen = self._seen, set()
            return None if self.problem else seen

    def close(self) -> None:
        """End the watch; safe to call twice."""
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join(_JOIN_S)

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Note what an event is about."""
        if event.event_type in ("opened", "closed_no_write"):
            return
        with self._lock:
            if self._seen is None:
                return
            for path in (event.src_path, event.dest_path):
                if path:
                    relative = os.path.relpath(os.fsdecode(path), self._root)
                    self._seen.add("" if relative == "." else relative.rpartition(os.sep)[0])
        self._changed()
