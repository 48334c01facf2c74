"""How much the guest may send ahead of us: on a stream, and on all of a connection together.

What the guest has sent and we have not read waits in one queue, of whatever stream it is: in
sshd, in both kernels, in what is between. A small answer waits there for all that was sent before
it, which with a whole window for each of many streams is more than ``ssh -L`` has it wait for. A
window cannot be taken back (RFC 4254 §5.2), but be given back later.
"""

from __future__ import annotations

import threading
import time

from wherry.core.clock import Monotonic

WINDOW_BYTES = 2 * 1024 * 1024
"""How much the guest may send ahead of a reader; also OpenSSH's own choice (``channels.h``)."""

LEAST_BYTES = 128 * 1024
"""How much it may send on a stream among very many: a few packets, while more is asked for."""

PORTION_BYTES = WINDOW_BYTES // 4
"""How much has to be due, at most, before it is given back. paramiko would give back each tenth of
the window; each costs a packet and the guest's time. With a quarter, three quarters are in flight
meanwhile."""

BUSY_S = 0.1
"""How long a stream counts after it was given window."""


class Windows:
    """Divides a window among the streams that bring much; every method is thread-safe.

    One that brings little is left what it has: it takes no part, and has no need to.
    """

    def __init__(self, now: Monotonic = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._busy: dict[int, float] = {}
        """When a stream was last given window, the longest ago first."""

    def give(self, stream: int, owed: int) -> int:
        """Return how much window a stream gets back now; 0 if it is to be asked again later.

        Invariant: what the guest may still send stays above a half of the stream's share, so
        that more bytes come, and with them the next question.

        :param owed: how many bytes were taken of it and not yet given back.
        """
        with self._lock:
            now, busy = self._now(), self._busy
            while busy and busy[first := next(iter(busy))] < now - BUSY_S:
                del busy[first]
            sharing = len(busy) + (stream not in busy)
            share = max(WINDOW_BYTES // sharing, LEAST_BYTES)
            due = owed - (WINDOW_BYTES - share)
            if due <= min(share // 2, PORTION_BYTES):
                return 0
            busy.pop(stream, None)
            busy[stream] = now
        return due
