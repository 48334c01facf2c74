"""What requests may take that have not gone on: memory, and time for their heads."""

from __future__ import annotations

import threading

HEAD_TIMEOUT_S = 300.0
"""How long a head may take from its first byte on; dockerd's ``ReadHeaderTimeout``."""

ROOM_BYTES = 16 << 20
"""What all requests of an endpoint may take together, beyond what each may."""

OWN_BYTES = 64 * 1024
"""What each request may take; hardly any is longer."""


class HeadRoom:
    """The room that an endpoint's connections share for long requests; thread-safe.

    What is held is a head that is not whole, or one that waits, with the body that a hook reads:
    for a hook, or for an engine that takes nothing.

    :param size: bytes.
    """

    def __init__(self, size: int = ROOM_BYTES) -> None:
        self._lock = threading.Lock()
        self._left = size

    def take(self, size: int) -> bool:
        """Take bytes; False when there are not so many left."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._left += size
