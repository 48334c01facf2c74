"""What watchers have in common on systems that watch a whole tree by one handle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from wherry.platform.base import ChangeSink

_KEPT = 10_000


class Teller:
    """Tells a sink which directories to look at, given the paths that the system names.

    :ivar path: the directory to watch.
    :ivar single: whether the root is a file in it, so nothing below that matters.
    """

    def __init__(self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]) -> None:
        real = root.resolve()
        self._only = "" if real.is_dir() else real.name
        self.path = os.fspath(real.parent if self._only else real)
        self.single = bool(self._only)
        self._sink = sink
        self._skipped = skipped
        self._hidden: dict[str, bool] = {"": False}

    def tell(self, path: str, *, contents: bool, is_directory: bool) -> None:
        """Tell that something has changed at a path below :attr:`path`, separated by ``/``.

        :param contents: it was written to, and neither made nor removed.
        """
        if self._only:
            if path == self._only:
                self._sink.dirty("")
            return
        parent = path.rpartition("/")[0]
        if self._is_hidden(parent) or (contents and self._skipped(path, is_directory)):
            return
        self._sink.dirty(parent)
        if is_directory and not self._is_hidden(path):
            self._sink.dirty(path)

    def _is_hidden(self, directory: str) -> bool:
        """Whether a directory, or one that it is in, is skipped."""
        known = self._hidden.get(directory)
        if known is None:
            parent = directory.rpartition("/")[0]
            known = self._is_hidden(parent) or self._skipped(directory, True)
            if len(self._hidden) >= _KEPT:
                self._hidden = {"": False}
            self._hidden[directory] = known
        return known
