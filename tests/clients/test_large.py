"""Much data through ``docker cp``, ``save`` and ``load``, and the service's memory meanwhile.

An emulated guest moves some 20 MB/s, so 1 GB takes a quarter of an hour. What is moved as a
rule is a part of that, and still more than the bound.
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

GROWTH = 32_000_000
"""What the service's resident memory may grow by, in bytes."""

PAUSE_S = 4.0
"""Long enough for the guest to send more than the bound, were it let."""

SLOW_BYTES, SLOW_S = 256 * 1024, 0.02
"""And then so much at a time, with a pause after each."""


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
    """Write what the CLI prints to a file; nothing is read for a while, and the rest slowly."""
    with (
        target.open("wb") as file,
        subprocess.Popen(
            [clients.program, *arguments], env=clients.env, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        file.write(process.stdout.read(1))
        time.sleep(PAUSE_S)
        while chunk := process.stdout.read(SLOW_BYTES):
            file.write(chunk)
            time.sleep(SLOW_S)
    assert process.returncode == 0


def digest(path: Path, skip: int = 0, size: int | None = None) -> str:
    """The SHA-256 of a file, or of a part of it, which need not fit in memory."""
    found = hashlib.sha256()
    left = path.stat().st_size - skip if size is None else size
    with path.open("rb") as file:
        file.seek(skip)
        while left:
            block = file.read(min(left, 1 << 20))
            assert block, f"{path} ends too early"
            found.update(block)
            left -= len(block)
    return found.hexdigest()


@pytest.mark.parametrize(
    ("size", "timeout_s"),
    [
        pytest.param(60_000_000, 120, id="60 MB"),
        pytest.param(
            1_000_000_000, 900, id="1 GB", marks=[pytest.mark.endurance, pytest.mark.timeout(3600)]
        ),
    ],
)
def test_memory_is_bounded(
    clients: Clients, memory: Memory, tmp_path: Path, size: int, timeout_s: float
) -> None:
    def docker(*arguments: str | Path) -> str:
        return clients.docker(*arguments, timeout=timeout_s).stdout.decode().strip()

    with (tmp_path / "data").open("wb") as file:
        for at in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - at)))
    wanted = digest(tmp_path / "data")
    docker("run", "-d", "--name", "box", "busybox", "sleep", "100000")
    docker("cp", tmp_path / "data", "box:/data")
    read_slowly(clients, tmp_path / "copied.tar", "cp", "box:/data", "-")
    # One member: a header of one block, then the data.
    assert digest(tmp_path / "copied.tar", 512, size) == wanted
    (tmp_path / "copied.tar").unlink()

    docker("commit", "box", "large:1")
    read_slowly(clients, tmp_path / "saved.tar", "save", "large:1")
    identity = docker("image", "inspect", "-f", "{{.Id}}", "large:1")
    docker("rmi", "large:1")
    # The guest, which has to write it, is slower than this computer.
    assert docker("load", "-i", tmp_path / "saved.tar") == "Loaded image: large:1"
    assert docker("image", "inspect", "-f", "{{.Id}}", "large:1") == identity
    assert docker("run", "--rm", "large:1", "sha256sum", "/data").split()[0] == wanted
    docker("rmi", "-f", "large:1")
    assert memory.most - memory.before <= GROWTH
