"""A root with very many files, and one that is very large. Minutes each, so only when named."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sync_guest import Guest, Stream

from wherry.sync.barrier import hold
from wherry.sync.remote import RemoteEndpoint
from wherry.sync.roots import Roots
from wherry_sync.entry import count
from wherry_sync.ignore import NOTHING
from wherry_sync.scan import Scanner

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(3600)]

FILES = 300_000


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path / "guest")
    yield made
    made.close()


def opened(tmp_path: Path, guest: Guest) -> Roots:
    return Roots(
        tmp_path / "sync",
        tmp_path / "sync.db",
        lambda place, ordered, progress: RemoteEndpoint(
            Stream(guest.connect()), place, ordered=ordered, progress=progress
        ),
        boot="host-1",
    )


class Clock:
    """Prints how long each step took."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def tell(self, what: str) -> float:
        now = time.monotonic()
        took, self.last = now - self.last, now
        print(f"{what}: {took:.2f} s")
        return took


def test_300_000_files(tmp_path: Path, guest: Guest) -> None:
    source = tmp_path / "src"
    for number in range(FILES):
        if number % 300 == 0:
            directory = source / f"{number % 9000 // 300}" / f"{number // 300}"
            directory.mkdir(parents=True)
        (directory / f"{number}.txt").write_text(f"{number}")
    clock = Clock()
    roots = opened(tmp_path, guest)
    session = roots.require(str(source))
    hold([session], fresh=True)
    clock.tell("first")
    there = guest.tree(session.root.place)

    def files(root: Path) -> int:
        scanner = Scanner(NOTHING)
        fd = os.open(root, os.O_RDONLY)
        try:
            found = scanner.scan(fd)
        finally:
            os.close(fd)
        return count(found.root)

    wanted = 1 + FILES + FILES // 300 + 30
    assert files(source) == files(there) == wanted
    clock.tell("counting")
    times = []
    for number in range(10):
        (source / "0" / "0" / "0.txt").write_text(f"edit {number}")
        hold([session], fresh=True)
        assert (there / "0" / "0" / "0.txt").read_text() == f"edit {number}"
        (there / "0" / "0" / "1.txt").write_text(f"back {number}")
        hold([session], fresh=False)
        assert (source / "0" / "0" / "1.txt").read_text() == f"back {number}"
        times.append(clock.tell("an edit each way"))
    assert sorted(times)[5] < 5
    roots.close()
    clock.tell("closing")
    (source / "0" / "0" / "2.txt").write_text("while nothing ran")
    roots = opened(tmp_path, guest)
    session = roots.require(str(source))
    hold([session], fresh=True)
    assert (there / "0" / "0" / "2.txt").read_text() == "while nothing ran"
    clock.tell("again after a restart")
    roots.close()


def test_29_a_file_of_5_gb(tmp_path: Path, guest: Guest) -> None:
    """Sparse, as its copy has to be; its bytes travel all the same."""
    source = tmp_path / "src"
    source.mkdir()
    size = 5 << 30
    with (source / "large").open("wb") as file:
        file.truncate(size)
        for position in (0, size // 2, size - 8):
            file.seek(position)
            file.write(b"%08d" % (position % 10**8))
    clock = Clock()
    roots = opened(tmp_path, guest)
    try:
        session = roots.require(str(source))
        hold([session], fresh=True)
        clock.tell("first")
        there = guest.tree(session.root.place) / "large"
        assert there.stat().st_size == size
        assert there.stat().st_blocks * 512 < 1 << 20
        digests = []
        for path in (source / "large", there):
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
        assert digests[0] == digests[1]
        clock.tell("comparing")
        with there.open("r+b") as file:
            file.seek(size // 3)
            file.write(b"edit")
        hold([session], fresh=False)
        with (source / "large").open("rb") as file:
            file.seek(size // 3)
            assert file.read(4) == b"edit"
        clock.tell("an edit back")
    finally:
        roots.close()
