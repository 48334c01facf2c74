"""The guest's end of a root over a connection, without a guest: what is new is built there."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from wherry.sync.core import cycle
from wherry.sync.core.cycle import Cycle
from wherry.sync.core.keep import Keep
from wherry.sync.core.store import Store
from wherry.sync.remote import Place, RemoteEndpoint
from wherry_guest import packing
from wherry_guest.sync import serve
from wherry_sync import hashing, wire
from wherry_sync.entry import file
from wherry_sync.local import LocalEndpoint
from wherry_wire.frames import Decoder
from wherry_wire.messages import SyncStageLocal

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the agent is Linux's"),
    pytest.mark.timeout(60),
]


class Stream:
    """A socket that counts what is sent.

    :ivar frames: the types of all frames that were sent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.recv = connection.recv
        self.sent = 0
        self.frames: list[int] = []
        self._decoder = Decoder()

    def sendall(self, data: bytes) -> None:
        self.sent += len(data)
        self.frames += [frame.type for frame in self._decoder.feed(data)]
        self._connection.sendall(data)

    def close(self) -> None:
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._connection.close()


class NoWatcher:
    """All scans here are full ones."""

    def add(self, tree: str, root: str) -> None:
        pass

    def remove(self, tree: str) -> None:
        pass

    def take(self, tree: str) -> None:
        pass


class Pair:
    """A host's directory, and its copy behind a connection."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = directory / "host"
        self.host.mkdir()
        self.guest = directory / "guest" / "tree" / "copy"
        ours, theirs = socket.socketpair()
        self.stream = Stream(ours)
        self.agent = threading.Thread(
            target=serve, args=(theirs, f"{directory}/guest", NoWatcher())
        )
        self.agent.start()
        self.remote = RemoteEndpoint(self.stream, Place("r1", "/copy"))
        self.local = LocalEndpoint(os.fspath(self.host), f"{directory}/stage", "boot")
        self.store = Store(directory / "sync.db", 1)
        self.keep = Keep(directory / "conflicts")
        self.cycle = Cycle(self.local, self.remote, self.store, self.keep)

    def close(self) -> None:
        self.remote.close()
        self.agent.join(10)
        self.local.close()
        self.store.close()
        self.keep.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with closing(Pair(tmp_path)) as made:
        yield made


def contents(directory: Path) -> dict[str, bytes]:
    return {
        os.fspath(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def fill(directory: Path) -> int:
    chance = random.Random(1)
    size = 0
    for number in range(200):
        path = directory / f"d{number % 7}" / f"e{number % 3}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"%d the same words again " % number * chance.choice((0, 1, 100, 20_000))
        path.write_bytes(data)
        size += len(data)
    (directory / "random").write_bytes(chance.randbytes(3_000_000))
    return size + 3_000_000


def test_a_first_synchronisation_builds_all_of_it_in_the_guest(pair: Pair) -> None:
    size = fill(pair.host)
    outcome = pair.cycle.run()
    assert not outcome.failed
    assert not outcome.requeue
    assert contents(pair.guest) == contents(pair.host)
    assert pair.cycle.run().quiescent
    if packing.available():
        assert pair.stream.sent < size / 2
    assert os.listdir(pair.directory / "guest" / "stage" / "r1") == ["journal"]  # noqa: PTH208


def test_what_is_new_in_the_guest_is_verified_and_built_on_the_host(pair: Pair) -> None:
    pair.cycle.run()
    fill(pair.guest)
    assert not pair.cycle.run().failed
    assert contents(pair.guest) == contents(pair.host)


def test_a_file_that_changes_while_it_is_sent_comes_with_the_next_round(pair: Pair) -> None:
    directory = pair.host / "new"
    directory.mkdir()
    for name in "abc":
        (directory / name).write_bytes(name.encode() * 1_000_000)
    read = pair.local.read

    def reading(path: str) -> tuple[int, Iterator[bytes]]:
        if path == "new/b":
            (directory / "b").write_bytes(b"B" * 1_000_000)
        return read(path)

    pair.local.read = reading  # type: ignore[method-assign]
    outcome = pair.cycle.run()
    pair.local.read = read  # type: ignore[method-assign]
    assert outcome.requeue == {"new/b"}
    assert set(contents(pair.guest)) == {"new/a", "new/c"}
    pair.cycle.run()
    assert contents(pair.guest) == contents(pair.host)


@pytest.mark.parametrize(("at_once", "lists"), [(2000, 1), (100, 5)])
def test_a_directory_that_was_renamed_takes_no_round_trip_for_each_file(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, at_once: int, lists: int
) -> None:
    monkeypatch.setattr(cycle, "_LOCAL_AT_ONCE", at_once)
    directory = pair.host / "before"
    directory.mkdir()
    for number in range(500):
        (directory / f"f{number}").write_bytes(b"%d " % number * 100)
    assert not pair.cycle.run().failed
    directory.rename(pair.host / "after")
    pair.stream.frames.clear()
    assert not pair.cycle.run().failed
    assert contents(pair.guest) == contents(pair.host)
    frames = pair.stream.frames
    bulk = (wire.ROWS, wire.CONTENTS, wire.PACKED)
    assert frames.count(SyncStageLocal.TYPE) == lists
    assert len([found for found in frames if found not in bulk]) < lists + 10
    assert frames.count(wire.CONTENTS) == frames.count(wire.PACKED) == 0


def test_what_a_copy_has_not_at_other_paths_is_told_apart(pair: Pair) -> None:
    for name in "abcd":
        (pair.host / name).write_text(name)
    assert not pair.cycle.run().failed
    leaves = {name: file(False, 1, hashing.digest(name.encode())) for name in "abcd"}
    (pair.guest / "b").write_text("B")
    (pair.guest / "c").unlink()
    taken = pair.remote.stage_local([(name, leaves[name]) for name in "abcd"])
    assert taken == {leaves["a"].digest, leaves["d"].digest}
    assert pair.remote.missing(leaves.values()) == [leaves["b"], leaves["c"]]
    assert pair.remote.stage_local([]) == set()
