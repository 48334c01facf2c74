"""Whether the other end of a connection on this computer is gone."""

from __future__ import annotations

import select
import socket
import sys

if sys.platform == "darwin":
    import contextlib
    import time

    def hangs_up(connection: socket.socket, timeout_s: float) -> bool:
        """Wait for the other program to close the connection; False if it did not in time.

        macOS' poll(2) watches nothing when it is asked for nothing. The end of our writing
        is that of the other side's reading, so of its half-close this does not tell
        (kqueue(2), EVFILT_WRITE). Room for writing wakes us too, once for each change.
        """
        flags = select.KQ_EV_ADD | select.KQ_EV_CLEAR
        changes = [select.kevent(connection.fileno(), select.KQ_FILTER_WRITE, flags)]
        deadline = time.monotonic() + timeout_s
        with contextlib.closing(select.kqueue()) as queue:
            while True:
                left = max(0.0, deadline - time.monotonic())
                found = queue.control(changes, 1, left)
                if any(event.flags & select.KQ_EV_EOF for event in found):
                    return True
                if not found or not left:
                    return False
                changes = []

else:

    def hangs_up(connection: socket.socket, timeout_s: float) -> bool:
        """Wait for the other program to close the connection; False if it did not in time.

        Nothing is asked for: a poll tells of a hang-up all the same (poll(2)), and on Linux
        that is the end of both directions, not of one.
        """
        poller = select.poll()
        poller.register(connection.fileno(), 0)
        found = poller.poll(timeout_s * 1000)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in found)
