"""One watch of all roots' copies: what their next scans have to look at, and when to tell the host.

It is drained when a scan begins: what a process did before it ended is in its queue by then, so a
scan that is asked for after a container's end sees all that the container wrote.
"""

from __future__ import annotations

import _thread
import select
import time

from wherry_sync.fanotify import Changes, Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Events come in bursts; the host is told of the first ones when the burst is over, nearly.
_SETTLE_S = 0.01
# While very much changes, as in a first synchronisation or an installation, the watch takes a
# fifth of a processor at most: it rests so many times as long as it worked. A scan that somebody
# waits for does not wait for that.
_REST = 4
_LONGEST_REST_S = 0.25


class Watcher:
    """The one watch of all roots, and what it has seen of each since its last scan.

    :param changed: called with a root's id when there is something new for its next scan.
    """

    def __init__(self, directory: str, changed: Callable[[str], None]) -> None:
        self._watch = Watch(directory)
        self._changed = changed
        self._lock = _thread.allocate_lock()
        self._ids: dict[str, str] = {}
        self._seen: dict[str, Changes] = {}
        self._told: set[str] = set()
        _thread.start_new_thread(self._run, ())

    def add(self, tree: str, root: str) -> None:
        """Watch a root's copy from now on; its next scan has to be a full one."""
        with self._lock:
            self._ids[tree] = root
            self._watch.add(tree)

    def remove(self, tree: str) -> None:
        """Watch it no longer."""
        with self._lock:
            self._watch.remove(tree)
            self._ids.pop(tree, None)
            self._seen.pop(tree, None)
            self._told.discard(tree)

    def take(self, tree: str) -> Changes | None:
        """Return what has changed up to now since the last call; None for nothing."""
        with self._lock:
            self._drain()
            self._told.discard(tree)
            return self._seen.pop(tree, None)

    def _drain(self) -> list[str]:
        """Empty the queue; return the roots of which the host has to be told."""
        news = []
        for tree, changes in self._watch.drain().items():
            seen = self._seen.get(tree)
            if seen is None:
                self._seen[tree] = changes
            else:
                seen.add(changes)
            if (changes.foreign or changes.lost) and tree in self._ids and tree not in self._told:
                self._told.add(tree)
                news.append(self._ids[tree])
        return news

    def _run(self) -> None:
        while True:
            select.select([self._watch.fileno()], [], [])
            time.sleep(_SETTLE_S)
            begun = time.monotonic()
            with self._lock:
                news = self._drain()
            for root in news:
                self._changed(root)
            time.sleep(min(_LONGEST_REST_S, _REST * (time.monotonic() - begun)))
