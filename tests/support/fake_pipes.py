"""Named pipes of Windows in memory, as :class:`wherry.platform.windows.pipes.Calls` has them.

Faithful in what that module must get right: bytes are read across messages, and a message
without bytes among others is lost; an instance takes a client before anybody waits for one,
and the port is not told of that; the end of a thread cancels nothing here.
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

QUOTA_BYTES = 64 * 1024
BOUND_S = 20


class Way:
    """One direction of a pipe."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.reader_gone = False
        self.writer_gone = False

    @property
    def queued(self) -> int:
        return sum(map(len, self.messages))


class End:
    """A handle of one side."""

    def __init__(self, into: Way, out: Way) -> None:
        self.into = into
        self.out = out
        self.closed = False
        self.cancelled = False


class Instance(End):
    """A server's side."""

    def __init__(self, name: str) -> None:
        super().__init__(Way(), Way())
        self.name = name
        self.taken = False
        self.tell: Callable[[], None] | None = None


class FakePipes:
    """The system's calls; :attr:`open_handles` are those that nobody has closed."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.instances: list[Instance] = []
        self.open_handles = 0
        self.limit = 1000
        """Instances that can be made in all."""
        self.on_made: Callable[[Instance], None] = lambda instance: None
        """Called when an instance was made, before anybody waits for its client."""

    def make_instance(self, name: str, *, first: bool) -> Instance:
        with self.news:
            if first and any(each.name == name for each in self.instances):
                raise PermissionError(errno.EACCES, "Access is denied.")
            if self.limit <= 0:
                raise OSError(errno.EINVAL, "Insufficient system resources exist.")
            self.limit -= 1
            made = Instance(name)
            self.instances.append(made)
            self.open_handles += 1
            self.news.notify_all()
        self.on_made(made)
        return made

    def make_port(self) -> queue.SimpleQueue[int]:
        return queue.SimpleQueue()

    def put(self, port: queue.SimpleQueue[int], key: int) -> None:
        port.put(key)

    def take(self, port: queue.SimpleQueue[int]) -> int:
        return port.get(timeout=BOUND_S)

    def await_client(self, instance: Instance, port: queue.SimpleQueue[int], key: int) -> object:
        with self.news:
            if instance.taken:
                port.put(key)
            else:
                instance.tell = lambda: port.put(key)
        return object()

    def open(self, name: str, timeout_s: float) -> End:
        deadline = time.monotonic() + timeout_s
        with self.news:
            while True:
                found = [each for each in self.instances if each.name == name]
                if not found:
                    raise FileNotFoundError(errno.ENOENT, "There is no such pipe.", name)
                free = [each for each in found if not each.taken]
                if free:
                    break
                if not self.news.wait(max(0.0, deadline - time.monotonic())):
                    raise OSError(errno.EPIPE, "All pipe instances are busy.")
            instance = free[0]
            instance.taken = True
            self.open_handles += 1
            if instance.tell is not None:
                instance.tell()
            return End(instance.out, instance.into)

    def make_event(self) -> threading.Event:
        self.open_handles += 1
        return threading.Event()

    def set_event(self, event: threading.Event) -> None:
        with self.news:
            event.set()
            self.news.notify_all()

    def read(self, pipe: End, buffer: memoryview, stop: threading.Event) -> int:
        way = pipe.into
        with self.news:
            self._wait(pipe, stop, lambda: bool(way.messages) or way.writer_gone)
            if not way.messages:
                raise ConnectionResetError(errno.ECONNRESET, "The pipe has been ended.")
            count = 0
            while way.messages and count < len(buffer):
                message = way.messages.popleft()
                part = message[: len(buffer) - count]
                buffer[count : count + len(part)] = part
                count += len(part)
                if len(part) < len(message):
                    way.messages.appendleft(message[len(part) :])
            self.news.notify_all()
            return count

    def available(self, pipe: End) -> int:
        with self.news:
            assert not pipe.closed, "a handle was used after it was closed"
            if not pipe.into.messages and pipe.into.writer_gone:
                raise ConnectionResetError(errno.ECONNRESET, "The pipe has been ended.")
            return pipe.into.queued

    def write(self, pipe: End, data: memoryview, stop: threading.Event) -> None:
        way = pipe.out
        with self.news:
            if way.reader_gone:
                raise BrokenPipeError(errno.EPIPE, "The pipe is being closed.")
            # What has no room waits with its writer, but can be read.
            way.messages.append(bytes(data))
            self.news.notify_all()
            self._wait(pipe, stop, lambda: way.queued <= QUOTA_BYTES or way.reader_gone)
            if way.reader_gone:
                raise BrokenPipeError(errno.EPIPE, "The pipe is being closed.")

    def flush(self, pipe: End) -> None:
        with self.news:
            pipe.cancelled = False
            never = threading.Event()
            self._wait(
                pipe, never, lambda: pipe.cancelled or not pipe.out.messages or pipe.out.reader_gone
            )
            if pipe.out.messages:
                raise OSError(errno.EINVAL, "The I/O operation has been aborted.")

    def cancel(self, pipe: End) -> None:
        with self.news:
            pipe.cancelled = True
            self.news.notify_all()

    def close(self, handle: End | threading.Event) -> None:
        with self.news:
            self.open_handles -= 1
            if isinstance(handle, threading.Event):
                return
            assert not handle.closed, "somebody else's handle would have been closed"
            handle.closed = True
            handle.into.reader_gone = True
            handle.out.writer_gone = True
            if isinstance(handle, Instance):
                self.instances.remove(handle)
            self.news.notify_all()

    def _wait(self, pipe: End, stop: threading.Event, until: Callable[[], bool]) -> None:
        assert not pipe.closed, "a handle was used after it was closed"
        assert self.news.wait_for(lambda: until() or stop.is_set(), BOUND_S)
        assert not pipe.closed, "a handle was closed while it was used"
        if not until():
            raise OSError(errno.EINVAL, "The I/O operation has been aborted.")
