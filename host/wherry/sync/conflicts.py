"""What is known of the files that conflicts left, without asking the thread that keeps them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from wherry.sync.core.keep import Keep

log = logging.getLogger(__name__)

DIRECTORY = "conflicts"
"""Of a session's state: where the files are."""


def has_conflicts(state: Path) -> bool:
    """Whether the state of a session has files that conflicts left."""
    try:
        return any(path.name.isdigit() for path in (state / DIRECTORY).iterdir())
    except OSError:
        return False


class Conflicts:
    """The paths of the conflicts of a root that are not resolved.

    :param root: what they are in, on the host.
    :ivar last: the number of the newest one ever; see :class:`~wherry.sync.core.keep.Keep`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}
        self.last = 0

    def __len__(self) -> int:
        return len(self._paths)

    def update(self, kept: Keep) -> None:
        """Take note of what is there now, and say so of what is new."""
        paths = {each.number: str(self._root / each.path) for each in kept}
        with self._lock:
            for number in sorted(paths.keys() - self._paths.keys()):
                if number > self.last:
                    log.warning("both sides changed %s; the guest's is kept", paths[number])
            self._paths, self.last = paths, kept.last

    def since(self, number: int) -> list[str]:
        """Return the paths of those after a number, as far as they are not resolved."""
        with self._lock:
            return [path for each, path in self._paths.items() if each > number]
