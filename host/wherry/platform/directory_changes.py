"""Changes in a tree, told by Windows (ReadDirectoryChangesW), through watchdog's reader.

Of watchdog only the reader is used, and what it would queue is looked at in its own thread. Its
emitter skips an answer of zero bytes, which says that the system's buffer ran over and all of it
was dropped; it goes on collecting until nothing has changed for a second; and when the reader
fails its thread ends without a word. The reader takes an overflow that is told as an error, the
other way that the documentation has, for the end of the directory.

A call's change may be told some time after the call has returned, so nothing is proved.
"""

from __future__ import annotations

import ctypes
import queue
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from watchdog.observers import winapi

from wherry.platform.base import ChangeSink
from wherry.platform.changes import Teller

_RETRY_S = 0.05
_ERROR_NOTIFY_ENUM_DIR = 1022

# The system may name a file by its short name ("The file name", in the documentation of
# FILE_NOTIFY_INFORMATION), which no scan knows.
_SHORT_NAME = re.compile(r"~\d")


class _Handed(queue.Queue[tuple[bytes, bool]]):
    """In place of the reader's queue: the first item says that it reads; the rest are handed on."""

    def __init__(self, take: Callable[[bytes, bool], None]) -> None:
        super().__init__()
        self._take = take
        self._reads = False

    def put(
        self, item: tuple[bytes, bool], block: bool = True, timeout: float | None = None
    ) -> None:
        if self._reads:
            self._take(*item)
        else:
            self._reads = True
            super().put(item, block, timeout)


class _Reader(winapi.DirectoryChangeReader):
    """A thread that reads.

    :ivar problem: why it ended.
    """

    def __init__(
        self,
        path: str,
        recursive: bool,
        take: Callable[[bytes, bool], None],
        end: Callable[[str], None],
    ) -> None:
        super().__init__(path, recursive=recursive)
        self._end = end
        self._buf_queue = _Handed(take)
        self.problem: OSError | None = None

    def _run(self) -> None:
        try:
            super()._run()
        except OSError as error:
            self.problem = error
            self._end(error.strerror or str(error))
            # If it never read: who waits for that waits no longer.
            queue.Queue.put(self._buf_queue, (b"", False))

    def _run_inner(self, handle: Any, event_buffer: Any, nbytes: Any) -> None:
        try:
            self._read(handle, event_buffer, nbytes)
        except OSError as error:
            number = getattr(error, "winerror", None)
            if number == winapi.ERROR_OPERATION_ABORTED or self._should_stop:
                return
            if number != _ERROR_NOTIFY_ENUM_DIR:
                if winapi._is_observed_path_deleted(handle, self._path):
                    raise OSError("it was moved, removed or unmounted") from error
                raise
            nbytes.value = 0
        self._buf_queue.put((event_buffer.raw[: nbytes.value], self._extended))

    def _read(self, handle: Any, buffer: Any, count: Any) -> None:
        """Wait for changes; where the filesystem has no extended ones, for plain ones."""
        to_fill = (handle, ctypes.byref(buffer), len(buffer), self._recursive)
        wanted = (winapi.WATCHDOG_FILE_NOTIFY_FLAGS, ctypes.byref(count), None, None)
        if self._extended and winapi.ReadDirectoryChangesExW is not None:
            kind = winapi.READ_DIRECTORY_NOTIFY_EXTENDED_INFORMATION
            try:
                winapi.ReadDirectoryChangesExW(*to_fill, *wanted, kind)
                return
            except OSError as error:
                lacking = (winapi.ERROR_INVALID_FUNCTION, winapi.ERROR_NOT_SUPPORTED)
                if getattr(error, "winerror", None) not in lacking:
                    raise
            self._extended = False
        winapi.ReadDirectoryChangesW(*to_fill, *wanted)

    def stop(self) -> None:
        """End the thread; safe to call twice.

        It is cancelled until it has ended: watchdog does so once, which may be just before
        the next read begins, and then waits for ever.
        """
        with self._lock:
            self._should_stop = True
            thread, self._reader_thread = self._reader_thread, None
        while thread is not None and thread.is_alive():
            with self._lock:
                if self._handle is not None:
                    winapi._cancel_handle_io(self._handle)
            thread.join(_RETRY_S)


class DirectoryChangesWatcher:
    """Watches a directory with all that is below it, or a single file.

    :raises OSError: it cannot be watched.
    """

    exact = False

    def __init__(self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]) -> None:
        self._sink = sink
        self._teller = Teller(root, sink, skipped)
        path, single = self._teller.path, self._teller.single
        self._reader = _Reader(path, not single, self._take, self._end)
        try:
            self._reader.start()
        except queue.Empty:
            self._reader.stop()
            raise OSError(f"{root} cannot be watched: the reader did not start") from None
        if self._reader.problem is not None:
            raise self._reader.problem

    def catch_up(self) -> None:
        """Do nothing: there is no way to ask."""

    def close(self) -> None:
        """Stop the thread and release all; safe to call twice."""
        self._reader.stop()

    def _take(self, data: bytes, extended: bool) -> None:
        if not data:
            self._sink.lost()
            self._sink.notify()
            return
        if extended:
            events = winapi._parse_extended_event_buffer(data)
        else:
            plain = winapi._parse_event_buffer(data)
            events = [(action, name, False) for action, name in plain]
        for action, name, _ in events:
            if _SHORT_NAME.search(name):
                self._sink.lost()
            else:
                self._teller.tell(
                    name.replace("\\", "/"),
                    contents=action == winapi.FILE_ACTION_MODIFIED,
                    is_directory=False,
                )
        self._sink.notify()

    def _end(self, reason: str) -> None:
        self._sink.failed(f"{self._teller.path}: {reason}")
        self._sink.notify()
