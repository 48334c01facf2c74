"""Whether a session gets on, for those who wait for it: see :mod:`wherry.sync.barrier`."""

from __future__ import annotations

import time

from wherry.sync.core.transfer import Transfer


class Progress:
    """When a session got on last. Its thread says so; any other one may ask."""

    def __init__(self) -> None:
        self._moved_at = self._heard_at = time.monotonic()
        # What the guest is at, since then.
        self._busy_at = ""

    def moved(self, point: str = "") -> None:
        """Learn that something was done; ``point`` is what the sync's steps are called."""
        self._moved_at = time.monotonic()
        self._busy_at = ""

    def busy(self, path: str) -> None:
        """Learn that the guest is at work, on this path."""
        if path != self._busy_at:
            self.moved()
            self._busy_at = path
        self._heard_at = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since it last made progress, or the guest said that it is at work."""
        return time.monotonic() - max(self._moved_at, self._heard_at)

    @property
    def busy_s(self) -> float:
        """Seconds since it last made progress; the guest may be at work on one path since."""
        return time.monotonic() - self._moved_at

    def where(self, transfer: Transfer | None) -> str:
        """Return what it is at, as the end of a sentence that says that it is stalled."""
        if transfer is None or not transfer.path:
            return f" at {self._busy_at}, which is being read in the guest" if self._busy_at else ""
        return f" at {transfer.path}, after {transfer.done_files} of {transfer.total_files} files"
