r"""Named pipes as local streams, in the way of Docker's clients for Windows.

Those are written in Go with go-winio, whose convention is kept: a pipe carries messages but
is read as bytes, and a message without bytes says that the sender sends no more ("CloseWrite"
in go-winio's pipe.go). That one must be alone in the pipe: who reads bytes is given several
messages at once and would not see it among them. So its sender waits until all before it was
read.

This module decides; :mod:`wherry.platform.windows.kernel` makes the calls.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import threading
from pathlib import Path
from typing import Any, Protocol

PENDING = 64
"""Instances that wait for a client: as many may come at one moment. One that finds none
waits or tries again, some of them (docker-py) after a second."""

_WAKE = 0
_RETRY_S = 0.01
_SCRATCH_BYTES = 4096

Handle = Any


class Calls(Protocol):
    """What is needed of the system; all raise OSError."""

    def make_instance(self, name: str, *, first: bool) -> Handle:
        """Make an instance of a pipe; the first one fails where the name has any."""

    def make_port(self) -> Handle:
        """Make a queue of numbers."""

    def put(self, port: Handle, key: int) -> None:
        """Put a number into the queue."""

    def take(self, port: Handle) -> int:
        """Wait for a number; any thread may."""

    def await_client(self, instance: Handle, port: Handle, key: int) -> object:
        """Put ``key`` into the queue once a client is there, or was.

        :returns: what must be kept until then.
        """

    def open(self, name: str, timeout_s: float) -> Handle:
        """Connect to a pipe of this user's, waiting for an instance."""

    def make_event(self) -> Handle:
        """Make an event, not set."""

    def set_event(self, event: Handle) -> None:
        """Set it for good."""

    def read(self, pipe: Handle, buffer: memoryview, stop: Handle) -> int:
        """Wait for bytes until the event ``stop`` is set; 0 for a message without any."""

    def available(self, pipe: Handle) -> int:
        """Return how many bytes there are to read."""

    def write(self, pipe: Handle, data: memoryview, stop: Handle) -> None:
        """Write a message, waiting for room until the event ``stop`` is set."""

    def flush(self, pipe: Handle) -> None:
        """Wait until the other side has read everything."""

    def cancel(self, pipe: Handle) -> None:
        """End a :meth:`flush` that waits in another thread."""

    def close(self, handle: Handle) -> None:
        """Release a handle; what was written can still be read."""


def pipe_name(path: Path, known_as: str = "") -> str:
    r"""Return a pipe's name: ``\\.\pipe\`` and the name given, else a digest of the path.

    Pipes of all users and programs have one directory.
    """
    digest = hashlib.sha256(str(path).casefold().encode()).hexdigest()[:16]
    return rf"\\.\pipe\{known_as or f'wherry-{digest}'}"


def docker_host(path: Path, known_as: str = "") -> str:
    """Return a pipe's address as Docker's clients write it: ``npipe:////./pipe/…``."""
    return "npipe://" + pipe_name(path, known_as).replace("\\", "/")


class PipeStream:
    """One end of a connected pipe; see :class:`wherry.platform.base.UnpolledStream`.

    When the other side is gone, and did not only end its direction, reading raises
    ConnectionResetError: there is no other way to learn of it.

    :param pipe: owned from now on.
    """

    def __init__(self, calls: Calls, pipe: Handle) -> None:
        self._calls = calls
        self._pipe = pipe
        self._stop = calls.make_event()
        self._ended = False
        self._writing = threading.Lock()
        # Guards what follows; the condition is notified when a flush is over.
        self._lock = threading.Lock()
        self._flushed = threading.Condition(self._lock)
        self._users = 0
        self._stopped = False
        self._closed = False
        self._flushing = False
        self._finished = False

    def recv(self, size: int, /) -> bytes:
        """Wait for bytes; none at the end of the stream."""
        buffer = bytearray(size)
        count = self.recv_into(memoryview(buffer))
        return bytes(buffer[:count])

    def recv_into(self, buffer: memoryview, /) -> int:
        """Wait for bytes; 0 at the end of the stream."""
        if self._ended or not len(buffer):
            return 0
        self._enter()
        try:
            count = self._calls.read(self._pipe, buffer, self._stop)
        finally:
            self._leave()
        self._ended = not count
        return count

    def recv_ready(self, buffer: memoryview, /) -> int | None:
        """Read without waiting, in the only thread that reads; None when there are no bytes."""
        self._enter()
        try:
            if not self._ended and not self._calls.available(self._pipe):
                return None
        finally:
            self._leave()
        return self.recv_into(buffer)

    def send(self, data: memoryview | bytes, /) -> int:
        """Send all of ``data``."""
        self.sendall(data)
        return len(data)

    def sendall(self, data: memoryview | bytes, /) -> None:
        """Send all of ``data``, as one message."""
        if not len(data):
            return  # it would say that this was the end
        with self._writing:
            self._enter()
            try:
                if self._finished:
                    raise BrokenPipeError(errno.EPIPE, "this direction was ended")
                self._calls.write(self._pipe, memoryview(data), self._stop)
            finally:
                self._leave()

    def shutdown(self, how: int, /) -> None:
        """End this direction, once the other side has read all; or end both at once."""
        if how == socket.SHUT_WR:
            self._finish()
        else:
            self._hang_up()

    def fileno(self) -> int:
        """-1: a pipe cannot be polled."""
        return -1

    def await_gone(self) -> None:
        """Wait until the other side has closed the pipe, and not its own direction alone."""
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._enter()
        try:
            while True:
                self._calls.read(self._pipe, scratch, self._stop)
        except ConnectionResetError:
            pass
        finally:
            self._leave()

    def close(self) -> None:
        """Release the pipe, as soon as no thread uses it; safe to call twice."""
        self._hang_up()
        with self._lock:
            was, self._closed = self._closed, True
            release = not was and not self._users
        if release:
            self._release()

    def _finish(self) -> None:
        with self._writing:
            self._enter()
            try:
                if self._finished:
                    return
                with self._lock:
                    self._check()
                    self._flushing = True
                try:
                    self._calls.flush(self._pipe)
                finally:
                    with self._flushed:
                        self._flushing = False
                        self._flushed.notify_all()
                self._calls.write(self._pipe, memoryview(b""), self._stop)
                self._finished = True
            finally:
                self._leave()

    def _hang_up(self) -> None:
        with self._flushed:
            if self._closed:
                return
            if not self._stopped:
                self._stopped = True
                self._calls.set_event(self._stop)
            while self._flushing:
                # Again until it has gone: it may not have begun to wait.
                self._calls.cancel(self._pipe)
                self._flushed.wait(_RETRY_S)

    def _check(self) -> None:
        if self._stopped:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the connection was ended here")

    def _enter(self) -> None:
        """Keep the handles while they are used: others would get their numbers."""
        with self._lock:
            self._check()
            self._users += 1

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            release = self._closed and not self._users
        if release:
            self._release()

    def _release(self) -> None:
        self._calls.close(self._pipe)
        self._calls.close(self._stop)


class PipeListener:
    """A pipe at which this user alone can connect.

    Instances wait for clients in the kernel and are announced by a completion port. It
    gives each to one of the threads in :meth:`accept`, and instances that belong to one
    outlive the threads that made them: without one, a thread's end cancels what it began.

    :param name: the whole name, ``\\\\.\\pipe\\…``.
    :raises OSError: another program has a pipe of that name.
    """

    def __init__(self, calls: Calls, name: str, pending: int = PENDING) -> None:
        self._calls = calls
        self._name = name
        self._wanted = pending
        self._lock = threading.Lock()
        self._closed = False
        self._keys = _WAKE
        self._pending: dict[int, tuple[Handle, object]] = {}
        # Closed with the last thread that waits there, not by close().
        self._port = calls.make_port()
        self._add(first=True)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def accept(self) -> PipeStream:
        """Wait for a client; OSError once the listener is closed."""
        while True:
            key = self._calls.take(self._port)
            with self._lock:
                if self._closed:
                    # For the next one who waits.
                    self._calls.put(self._port, _WAKE)
                    raise OSError(errno.EBADF, "the listener is closed")
                pipe, _ = self._pending.pop(key)
                try:
                    self._fill()
                except OSError as error:
                    # As long as one waits, the next client brings the others back.
                    if not self._pending:
                        self._pending[key] = pipe, None
                        self._calls.put(self._port, key)
                        reason = f"no more instances: {error}"
                        raise OSError(errno.ENOBUFS, reason) from error
                return PipeStream(self._calls, pipe)

    def close(self) -> None:
        """Stop listening and wake all who wait; clients that were not accepted are cut off."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # What the kernel may still write to is kept until the port has gone.
            for pipe, _ in self._pending.values():
                self._calls.close(pipe)
            self._calls.put(self._port, _WAKE)

    def _fill(self) -> None:
        while len(self._pending) < self._wanted:
            self._add(first=False)

    def _add(self, *, first: bool) -> None:
        pipe = self._calls.make_instance(self._name, first=first)
        self._keys += 1
        try:
            kept = self._calls.await_client(pipe, self._port, self._keys)
        except BaseException:
            self._calls.close(pipe)
            raise
        self._pending[self._keys] = pipe, kept


def listen(calls: Calls, path: Path, known_as: str = "") -> PipeListener:
    """Listen at the pipe that :func:`pipe_name` names.

    :raises OSError: another program has a pipe of that name.
    """
    return PipeListener(calls, pipe_name(path, known_as))


def connect(calls: Calls, name: str, timeout_s: float) -> PipeStream:
    """Connect to a pipe.

    :raises OSError: there is none, it is another user's, or it has no time for us.
    """
    return PipeStream(calls, calls.open(name, timeout_s))
