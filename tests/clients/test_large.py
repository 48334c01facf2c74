"""Much data through ``docker cp``, ``save`` and ``load``, and the service's memory meanwhile.

An emulated guest moves some 20 MB/s, so it is a part of the 1 GB that goes through the proxy
in ``tests/integration/test_api_limits.py``; it is still more than the bound.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from docker_clients import Clients

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SIZE = 60_000_000
GROWTH = 32_000_000
"""What the service's resident memory may grow by, in bytes."""

PAUSE_S = 4.0
"""Long enough for the guest to send more than the bound, were it let."""


class Memory:
    """The most resident memory that a process has had."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.most = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, self._process.memory_info().rss)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def memory(clients: Clients) -> Iterator[Memory]:
    """The service's, from here on."""
    made = Memory(clients.machine.status()["service_pid"])
    yield made
    made.close()


def read_slowly(clients: Clients, target: Path, *arguments: str) -> None:
    """Write what the CLI prints to a file; nothing is read for a while."""
    with (
        target.open("wb") as file,
        subprocess.Popen(
            [clients.program, *arguments], env=clients.env, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        file.write(process.stdout.read(1))
        time.sleep(PAUSE_S)
        while chunk := process.stdout.read(1 << 20):
            file.write(chunk)
    assert process.returncode == 0


def test_memory_is_bounded(clients: Clients, memory: Memory, tmp_path: Path) -> None:
    data = os.urandom(SIZE)
    (tmp_path / "data").write_bytes(data)
    clients.docker("run", "-d", "--name", "box", "busybox", "sleep", "100000")
    clients.docker("cp", tmp_path / "data", "box:/data")
    read_slowly(clients, tmp_path / "copied.tar", "cp", "box:/data", "-")
    with (tmp_path / "copied.tar").open("rb") as copied:
        # One member: a header of one block, then the data.
        assert copied.read()[512 : 512 + SIZE] == data

    clients.docker("commit", "box", "large:1")
    read_slowly(clients, tmp_path / "saved.tar", "save", "large:1")
    identity = clients.said("image", "inspect", "-f", "{{.Id}}", "large:1")
    clients.docker("rmi", "large:1")
    # The guest, which has to write it, is slower than this computer.
    assert clients.said("load", "-i", tmp_path / "saved.tar") == "Loaded image: large:1"
    assert clients.said("image", "inspect", "-f", "{{.Id}}", "large:1") == identity
    digest = clients.said("run", "--rm", "large:1", "sha256sum", "/data").split()[0]
    assert digest == hashlib.sha256(data).hexdigest()
    clients.docker("rmi", "-f", "large:1")
    assert memory.most - memory.before <= GROWTH
