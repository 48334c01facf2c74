"""A flush of a filesystem that nobody waits for: it may take many seconds."""

from __future__ import annotations

import os
import threading

from wherry_sync import kernel


class Flush:
    """Has all that was written to a filesystem up to now on its disk, in a thread of its own.

    :param fd: of anything on it; another one is opened for the thread.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether it is on the disk.

        :raises OSError: the disk failed.
        """
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def _run(self) -> None:
        try:
            kernel.flush(self._fd)
        except OSError as error:
            self._error = error
        finally:
            os.close(self._fd)
