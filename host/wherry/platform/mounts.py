"""What is mounted in a directory, told by Linux (proc_pid_mountinfo(5)).

Of a filesystem that is mounted, or not any more, inotify(7) tells nothing, though the files at all
paths in it are other ones. The kernel counts such changes before the system call returns, for
every open file of the table; poll(2) tells of those since that file was polled last.
"""

from __future__ import annotations

import os
import re
import select
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")


class Mounts:
    """The mounts below a directory, as they were when last looked at. Costs nothing at rest.

    :ivar wake_fd: to be polled by another thread for ``POLLPRI``. It has its own count, so that
        thread takes nothing from :meth:`changed`.
    :raises OSError: there is no such table.
    """

    def __init__(self) -> None:
        self._path = ""
        self._found: dict[bytes, bytes] = {}
        self._fd = self.wake_fd = -1
        try:
            self._fd = os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)
            self.wake_fd = os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)

    def close(self) -> None:
        """Release all; safe to call twice."""
        for fd in (self._fd, self.wake_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self.wake_fd = -1

    def know(self, path: str) -> None:
        """Take note of what is mounted below a directory, of which all links were followed."""
        self._path = path
        self._found = _below(path, _TABLE.read_bytes())

    def has(self, path: str) -> bool:
        """Whether a path below that directory is a place where something is mounted."""
        return bool(self._found) and _escaped(path) in self._found

    def changed(self) -> bool:
        """Whether that is something else by now."""
        if not self._poll.poll(0):
            return False
        before = self._found
        self.know(self._path)
        return self._found != before


def _below(path: str, table: bytes) -> dict[bytes, bytes]:
    """Return, by each place below a path where something is mounted, what says what that is."""
    found = {}
    start = _escaped(path.rstrip("/")) + b"/"
    for line in table.splitlines():
        # The mount's id and its parent's, the device, the directory on it, where it is mounted.
        *what, place = line.split(b" ")[:5]
        if place.startswith(start):
            # The last one of several hides the others.
            found[place] = b" ".join(what)
    return found


def _escaped(path: str) -> bytes:
    """Return a path as the table has it: fields and lines end at what is octal in it."""
    return re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(path))
