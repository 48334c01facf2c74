"""A program under a terminal of its own, as a person sits before it (pty(7))."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence


class Terminal:
    """Runs a program whose input, output and controlling terminal are a new pseudo-terminal.

    Use it as a context manager: the program is killed at the end if it still runs.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._master, slave = os.openpty()
        self.screen = b""
        """Everything that was printed."""
        self._seen = 0
        self.resize(24, 80)
        try:
            self.process = subprocess.Popen(
                argv,
                env={**env, "TERM": "xterm"},
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                # In its new session the program takes the terminal as its controlling one.
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
            )
        finally:
            os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._master)

    def resize(self, rows: int, columns: int) -> None:
        """Make the window another size; the kernel tells the program by SIGWINCH."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def expect(self, text: str, timeout_s: float = 60) -> None:
        """Wait until something new is on the screen, and leave it behind."""
        end = time.monotonic() + timeout_s
        while (found := self.screen.find(text.encode(), self._seen)) < 0:
            left = end - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"no {text!r} in {self.screen[self._seen :]!r}")
        self._seen = found + len(text.encode())

    def wait(self, timeout_s: float = 60) -> int:
        """Read to the end of the output and return the exit status."""
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0 and self._read(left):
            pass
        return self.process.wait(max(0.1, end - time.monotonic()))

    def _read(self, timeout_s: float) -> bool:
        """Read what there is; False at the end of the output or of the time."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        data = b""
        # Linux reports a terminal that nobody holds any more with EIO.
        with contextlib.suppress(OSError):
            data = os.read(self._master, 65536)
        self.screen += data
        return bool(data)
