"""Clients beyond the limit: one thread tells all of them so, and waits for none.

An answer that comes before the request is none to Go's clients (``net/http`` logs it as
unsolicited, and fails the request that was about to be sent), and a client that is cut off
while it sends may not read what it was told (RFC 9112 §9.6). So each has a moment to ask,
and another one to read.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from wherry.api.local import LocalEnd
from wherry.relay.pump import Spawn

MOST = 512
"""Clients that are given time at once; for each one more the oldest has had enough."""

_MOMENT_S = 1.0
_LOOK_S = 0.01
_SCRATCH_BYTES = 64 * 1024
_LAST_READS = 16


@dataclass(eq=False)
class _Refused:
    end: LocalEnd
    due: float
    told: bool = False


class Refusals:
    """Answers clients, whatever they ask, and closes them.

    :param answer: the bytes of the answer.
    :param spawn: runs the one helper while there are any.
    """

    def __init__(self, answer: bytes, spawn: Spawn) -> None:
        self._answer = answer
        self._spawn = spawn
        self._closing = threading.Event()
        # Guards what follows, and is held while anything is done to a client: nothing waits.
        self._lock = threading.Lock()
        self._clients: list[_Refused] = []
        self._running = False
        self._scratch = bytearray(_SCRATCH_BYTES)

    def add(self, end: LocalEnd) -> None:
        """Take a client, which is owned from now on; does not wait."""
        now = time.monotonic()
        client = _Refused(end, now + _MOMENT_S)
        with self._lock:
            if self._closing.is_set():
                end.close()
                return
            if not self._look(client, now):
                self._dismiss(client)
                return
            self._clients.append(client)
            if len(self._clients) > MOST:
                self._dismiss(self._clients.pop(0))
            if self._running:
                return
            try:
                self._spawn(self._run)
            except RuntimeError:
                # The system has no more threads, so nobody is given time.
                self._dismiss(self._clients.pop())
            else:
                self._running = True

    def close(self) -> None:
        """Hang up on all."""
        self._closing.set()
        with self._lock:
            for client in self._clients:
                client.end.close()
            self._clients.clear()

    def _run(self) -> None:
        try:
            while not self._closing.wait(_LOOK_S) and self._look_at_all():
                pass
        except BaseException:
            with self._lock:
                self._running = False  # the next client has another helper
            raise

    def _look_at_all(self) -> bool:
        """Go on with each client; False when there are no more."""
        now = time.monotonic()
        with self._lock:
            kept = []
            for client in self._clients:
                if self._look(client, now):
                    kept.append(client)
                else:
                    self._dismiss(client)
            self._clients = kept
            self._running = bool(kept)
            return self._running

    def _look(self, client: _Refused, now: float) -> bool:
        """Tell a client once it has asked, or can wait no longer; False when it is over."""
        try:
            count = client.end.read_some(self._scratch)
            if client.told:
                return count != 0 and now < client.due
            if count is not None or now >= client.due:
                self._tell(client)
                client.due = now + _MOMENT_S
        except OSError:
            return False
        return count != 0

    def _tell(self, client: _Refused) -> None:
        client.told = True
        client.end.send_some([memoryview(self._answer)])
        if client.end.socket is not None:
            client.end.end_writing()  # of a pipe, that waits until all was read

    def _dismiss(self, client: _Refused) -> None:
        try:
            if not client.told:
                self._tell(client)
            # What is unread at the close may make a client's next read fail.
            for _ in range(_LAST_READS):
                if not client.end.read_some(self._scratch):
                    break
        except OSError:
            pass  # it did not wait for it
        client.end.close()
