"""Flushes of a filesystem that nobody waits for: one may take many seconds."""

from __future__ import annotations

import errno
import os
import threading

from wherry_sync import kernel


class Flushes:
    """Has what was written to a filesystem on its disk, in a thread, one flush after the other.

    :param fd: of anything on it; the thread has a duplicate of it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._wanted = self._done = 0
        self._error: OSError | None = None
        self._runs = False

    def begin(self) -> None:
        """Begin one of all that was written up to now; after the one that runs, if one does.

        :raises OSError: there is no thread for it.
        """
        with self._lock:
            self._wanted += 1
            if not self._runs:
                fd = os.dup(self._fd)
                try:
                    threading.Thread(target=self._run, args=[fd], name="flush", daemon=True).start()
                except RuntimeError as error:
                    os.close(fd)
                    raise OSError(errno.EAGAIN, str(error)) from error
                self._runs = True

    def is_done(self) -> bool:
        """Whether the last one that was begun is; False if none was.

        :raises OSError: the disk failed.
        """
        with self._lock:
            error, self._error = self._error, None
            if error is not None:
                raise error
            return 0 < self._wanted == self._done

    def _run(self, fd: int) -> None:
        try:
            while True:
                with self._lock:
                    wanted = self._wanted
                    if wanted == self._done or self._error is not None:
                        self._runs = False
                        return
                try:
                    kernel.flush(fd)
                except Exception as error:
                    with self._lock:
                        self._error = OSError(f"the disk cannot be flushed: {error!r}")
                else:
                    with self._lock:
                        self._done = wanted
        finally:
            os.close(fd)
