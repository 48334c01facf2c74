"""The calls that pipes are made of, through pywin32; its errors become OSError.

Reading and writing are overlapped, so that another thread can end them: whoever waits, waits
for an event as well. That one cannot be missed, as a cancellation could be that comes between
looking and waiting.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pywintypes
import win32con
import win32event
import win32file
import win32pipe
import win32security
import winerror

from wherry.platform.windows import security

assert sys.platform == "win32"  # Type checkers look on for Windows alone.

Handle = Any

_BUFFER_BYTES = 64 * 1024
_PIPE_REJECT_REMOTE_CLIENTS = 0x8
_FILE_FLAG_FIRST_PIPE_INSTANCE = 0x80000
# A server could act as who connects to it, unless that is told not to be wanted.
_SECURITY_SQOS_PRESENT_ANONYMOUS = 0x100000

_INTERRUPT_MS = 100
"""A Ctrl-C is noticed between two calls of the main thread alone."""


class Kernel:
    """See :class:`wherry.platform.windows.pipes.Calls`."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._attributes = security.attributes(security.PIPE)

    def make_instance(self, name: str, *, first: bool) -> Handle:
        """CreateNamedPipe, for this user and this computer alone."""
        mode = win32pipe.PIPE_ACCESS_DUPLEX | win32file.FILE_FLAG_OVERLAPPED
        if first:
            mode |= _FILE_FLAG_FIRST_PIPE_INSTANCE
        with _os_errors(name):
            return win32pipe.CreateNamedPipe(
                name,
                mode,
                win32pipe.PIPE_TYPE_MESSAGE
                | win32pipe.PIPE_READMODE_BYTE
                | _PIPE_REJECT_REMOTE_CLIENTS,
                win32pipe.PIPE_UNLIMITED_INSTANCES,
                _BUFFER_BYTES,
                _BUFFER_BYTES,
                0,
                self._attributes,
            )

    def make_port(self) -> Handle:
        """CreateIoCompletionPort."""
        with _os_errors():
            return win32file.CreateIoCompletionPort(win32file.INVALID_HANDLE_VALUE, None, 0, 0)

    def put(self, port: Handle, key: int) -> None:
        """PostQueuedCompletionStatus."""
        with _os_errors():
            win32file.PostQueuedCompletionStatus(port, 0, key, None)

    def take(self, port: Handle) -> int:
        """GetQueuedCompletionStatus; that a client was there and has left is no error here."""
        with _os_errors():
            _, _, key, _ = win32file.GetQueuedCompletionStatus(port, win32event.INFINITE)
        return int(key)

    def await_client(self, instance: Handle, port: Handle, key: int) -> object:
        """ConnectNamedPipe, which tells the port only of clients that come after it."""
        overlapped = pywintypes.OVERLAPPED()
        with _os_errors():
            win32file.CreateIoCompletionPort(instance, port, key, 0)
            try:
                status = win32pipe.ConnectNamedPipe(instance, overlapped)
            except pywintypes.error as error:
                status = error.winerror
                if status != winerror.ERROR_NO_DATA:
                    raise
        if status in (winerror.ERROR_PIPE_CONNECTED, winerror.ERROR_NO_DATA):
            # It was faster, or has even left: the first to read from it finds out.
            self.put(port, key)
        return overlapped

    def open(self, name: str, timeout_s: float) -> Handle:
        """CreateFile, and WaitNamedPipe while all instances are taken."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                pipe = win32file.CreateFile(
                    name,
                    win32con.GENERIC_READ | win32con.GENERIC_WRITE,
                    0,
                    None,
                    win32con.OPEN_EXISTING,
                    win32file.FILE_FLAG_OVERLAPPED | _SECURITY_SQOS_PRESENT_ANONYMOUS,
                    None,
                )
                break
            except pywintypes.error as error:
                left = deadline - time.monotonic()
                if error.winerror != winerror.ERROR_PIPE_BUSY or left <= 0:
                    raise _os_error(error, name) from error
            # It may be taken again by then, or be gone.
            with contextlib.suppress(pywintypes.error):
                win32pipe.WaitNamedPipe(name, max(1, int(left * 1000)))
        with _os_errors(name):
            owner = security.owner(pipe, win32security.SE_KERNEL_OBJECT)
        if owner not in security.own_sids():
            pipe.Close()
            raise PermissionError(errno.EPERM, "the pipe is another user's", name)
        return pipe

    def make_event(self) -> Handle:
        """CreateEvent: a manual one."""
        with _os_errors():
            return win32event.CreateEvent(None, True, False, None)

    def set_event(self, event: Handle) -> None:
        """SetEvent."""
        with _os_errors():
            win32event.SetEvent(event)

    def read(self, pipe: Handle, buffer: memoryview, stop: Handle) -> int:
        """ReadFile."""

        def start(overlapped: Any) -> int:
            return int(win32file.ReadFile(pipe, buffer, overlapped)[0])

        with _resets():
            return self._transfer(pipe, start, stop)

    def available(self, pipe: Handle) -> int:
        """PeekNamedPipe."""
        with _resets(), _os_errors():
            return int(win32pipe.PeekNamedPipe(pipe, 0)[1])

    def write(self, pipe: Handle, data: memoryview, stop: Handle) -> None:
        """WriteFile."""

        def start(overlapped: Any) -> int:
            return int(win32file.WriteFile(pipe, data, overlapped)[0])

        self._transfer(pipe, start, stop)

    def flush(self, pipe: Handle) -> None:
        """FlushFileBuffers."""
        with _os_errors():
            win32file.FlushFileBuffers(pipe)

    def cancel(self, pipe: Handle) -> None:
        """CancelIoEx, which pywin32 lacks."""
        # It fails when there is nothing to cancel.
        ctypes.WinDLL("kernel32").CancelIoEx(ctypes.c_void_p(int(pipe)), None)

    def close(self, handle: Handle) -> None:
        """CloseHandle."""
        handle.Close()

    def _transfer(self, pipe: Handle, start: Callable[[Any], int], stop: Handle) -> int:
        event = self._event()
        overlapped = pywintypes.OVERLAPPED()
        # The bit keeps the completion from the port that the pipe may belong to (Remarks of
        # GetQueuedCompletionStatus).
        overlapped.hEvent = int(event) | 1
        with _os_errors():
            if start(overlapped) == winerror.ERROR_IO_PENDING:
                stopped = True
                try:
                    stopped = _wait(event, stop)
                finally:
                    if stopped:
                        # Of what this thread began; the buffer is the kernel's until then.
                        win32file.CancelIo(pipe)
                        win32event.WaitForSingleObject(event, win32event.INFINITE)
            return int(win32file.GetOverlappedResult(pipe, overlapped, True))

    def _event(self) -> Handle:
        """Return the event of this thread, which does one transfer at a time."""
        event = getattr(self._own, "event", None)
        if event is None:
            event = self._own.event = self.make_event()
        return event


def _wait(event: Handle, stop: Handle) -> bool:
    """Wait for either and tell whether it was ``stop`` alone."""
    timeout_ms = win32event.INFINITE
    if threading.current_thread() is threading.main_thread():
        timeout_ms = _INTERRUPT_MS
    while True:
        found = win32event.WaitForMultipleObjects((event, stop), False, timeout_ms)
        if found != win32event.WAIT_TIMEOUT:
            return bool(found != win32event.WAIT_OBJECT_0)


@contextlib.contextmanager
def _resets() -> Iterator[None]:
    """Have the end of the other side raise what it does to who reads a socket."""
    try:
        yield
    except BrokenPipeError as error:
        raise ConnectionResetError(errno.ECONNRESET, "the other side has gone") from error


@contextlib.contextmanager
def _os_errors(name: str | None = None) -> Iterator[None]:
    try:
        yield
    except pywintypes.error as error:
        raise _os_error(error, name) from error


def _os_error(error: Any, name: str | None = None) -> OSError:
    # With this argument the interpreter chooses errno and the subclass.
    return OSError(0, error.strerror, name, error.winerror)
