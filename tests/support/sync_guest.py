"""The agent's end of the synchronisation in a process of its own, on this computer."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from wherry.sync.remote import Place
from wherry.sync.session import Session

AGENT = """
import sys
from wherry_guest import sync, system
from wherry_wire.messages import SyncListen

# What the test machine's own paths show is not to be mounted over.
system.bind = lambda source, target: None
if sys.argv[2]:
    system.boot_id = lambda: sys.argv[2]
roots = sync.Roots(lambda message, id: print(message.root, flush=True))
print(roots.listen(SyncListen(directory=sys.argv[1])).socket, flush=True)
sys.stdin.read()
"""
"""A process of its own, as what the agent itself writes is nobody's edit."""


class Guest:
    """Serves roots below a directory.

    :param boot: the id of its boot; this computer's if empty.
    """

    def __init__(self, directory: Path, boot: str = "") -> None:
        self.directory = directory
        self.sessions: list[Session] = []
        self.streams: list[socket.socket] = []
        self.allowed = True
        self._argv = [sys.executable, "-c", AGENT, str(directory), boot]
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.path = self.process.stdout.readline().strip()
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self.reader.start()

    def kill(self) -> None:
        """End the agent by SIGKILL; see :meth:`restart`."""
        self.process.kill()
        self.close()

    def restart(self) -> None:
        """Start another agent in the same boot, after :meth:`kill`."""
        self._start()

    def close(self) -> None:
        self.process.communicate()
        self.reader.join()
        Path(self.path).unlink()

    def _read(self, lines: Iterable[str]) -> None:
        for root in lines:
            for session in self.sessions:
                if session.root.place.root == root.strip():
                    session.guest_changed()

    def connect(self) -> socket.socket:
        if not self.allowed:
            raise ConnectionRefusedError("the guest is away")
        ours = socket.socket(socket.AF_UNIX)
        try:
            ours.connect(self.path)
        except OSError:
            ours.close()
            raise
        self.streams.append(ours)
        return ours

    def tree(self, place: Place) -> Path:
        return self.directory / "tree" / place.path.lstrip("/")

    def cut(self) -> None:
        for stream in self.streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        self.streams.clear()


class Stream:
    """A socket as the tunnel's streams are."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def recv(self, size: int, /) -> bytes:
        return self._sock.recv(size)

    def sendall(self, data: bytes, /) -> None:
        self._sock.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
