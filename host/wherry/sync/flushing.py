"""When what rounds have done goes to the two disks: once things have calmed down, or in the end.

Rounds go on meanwhile, and so do barriers, but for the one before the first container that may
write (:mod:`wherry.sync.core.withhold`): to write all that is in a guest's page cache can take
many seconds, of which most is not even ours.
"""

from __future__ import annotations

import time

from wherry.sync.core.cycle import Cycle

_CALM_S = 5.0
_LATEST_S = 30.0
"""However much goes on."""

_ASK_S = 1.0
"""How often the two sides are asked whether they are done."""


class Flushing:
    """The flushes of one root, one after the other. One thread at a time."""

    def __init__(self) -> None:
        # When something changed first that no flush is for; 0 if nothing did.
        self._since = 0.0
        # When to ask about the flush that was begun; 0 if none was.
        self._ask_at = 0.0

    def changed(self) -> None:
        """Learn that a round has changed something."""
        self._since = self._since or time.monotonic()

    def lost(self) -> None:
        """Learn that a side cannot be asked any more."""
        if self._ask_at:
            self._ask_at = 0.0
            self.changed()

    @property
    def is_idle(self) -> bool:
        """Whether all that was done is on both disks."""
        return not self._since and not self._ask_at

    @property
    def step_at(self) -> float:
        """When :meth:`step` has something to do, by the monotonic clock; 0 if it has not."""
        if self.is_idle:
            return 0.0
        return self._ask_at or self._since + _CALM_S

    def step(self, cycle: Cycle, *, calm: bool) -> bool:
        """Begin a flush that is due, or ask about one; whether one has ended.

        :param calm: whether nothing else is to be done.
        :raises OSError: a side cannot be reached, or its disk fails.
        """
        now = time.monotonic()
        if self._ask_at:
            if now < self._ask_at:
                return False
            if not cycle.flushed():
                self._ask_at = now + _ASK_S
                return False
            self._ask_at = 0.0
            return True
        if self._since and now >= self._since + (_CALM_S if calm else _LATEST_S):
            # While a root is halted it may not be known yet what a loss of power has done to it:
            # what is pending stays so.
            if cycle.met:
                cycle.begin_flush()
                self._ask_at = now + _ASK_S
            self._since = 0.0
        return False
