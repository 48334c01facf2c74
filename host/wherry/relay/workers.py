"""Threads that are kept for the next job, since starting one costs more than a wake-up."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

Job = Callable[[], None]

STACK_BYTES = 512 * 1024
"""A pump is a shallow loop; systems reserve 8 to 16 MiB for a thread without being told."""

_IDLE_S = 10.0

_logger = logging.getLogger(__name__)
_stack_size_lock = threading.Lock()


class Workers:
    """Runs each job at once, in a thread of its own; every method is thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Job | None]] = []
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._made = 0

    def spawn(self, job: Job) -> None:
        """Run ``job``; what it raises is logged.

        :raises RuntimeError: closed, or the system has no more threads; the job is not run.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers are closed")
            if self._idle:
                # The last to become idle is the warmest; the first ones time out.
                self._idle.pop().put(job)
                return
            self._made += 1
            thread = threading.Thread(
                target=self._work, args=(job,), name=f"{self._name}-{self._made}", daemon=True
            )
            # Under the lock, so that close() sees no thread that cannot be joined yet,
            # and none ends before it is noted.
            with _stack_size_lock:
                before = threading.stack_size(STACK_BYTES)
                try:
                    thread.start()
                finally:
                    threading.stack_size(before)
            self._threads = {each for each in self._threads if each.is_alive()} | {thread}

    def close(self, timeout_s: float) -> bool:
        """Take no more jobs and wait for the running ones; tell whether all ended in time."""
        with self._lock:
            self._closed = True
            for inbox in self._idle:
                inbox.put(None)
            self._idle.clear()
            threads = list(self._threads)
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _work(self, job: Job | None) -> None:
        inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        while job is not None:
            try:
                job()
            except Exception:
                _logger.exception("a relay's job failed")
            # Nothing of a finished job may stay alive while the thread idles.
            job = None
            with self._lock:
                if self._closed:
                    break
                self._idle.append(inbox)
            try:
                job = inbox.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if inbox in self._idle:
                        self._idle.remove(inbox)
                        break
                job = inbox.get()  # was handed over at the last moment
