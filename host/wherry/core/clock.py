"""Time, so that tests can hold it still, and deadlines, so that every wait has a bound."""

from __future__ import annotations

import time
from collections.abc import Callable

Monotonic = Callable[[], float]


class Deadline:
    """A point on the monotonic clock that a chain of waits must not pass.

    :param seconds: from now until the deadline.
    :param now: the clock, in seconds.
    """

    def __init__(self, seconds: float, now: Monotonic = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self.seconds = seconds

    @property
    def elapsed(self) -> float:
        """Seconds since this deadline was set."""
        return self._now() - self._start

    @property
    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.seconds - self.elapsed)

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self.elapsed >= self.seconds
