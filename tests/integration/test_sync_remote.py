"""The guest's end of a root over a real socket, and sessions that use it, without a guest.

The agent's own code serves, in a thread here; its watch needs no more than root on Linux.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sync_guest import Guest, Stream
from sync_trees import read, write

from wherry.core.errors import WherryError
from wherry.platform.linux import Linux
from wherry.service.syncing import describe
from wherry.sync import flushing
from wherry.sync import session as session_module
from wherry.sync.core.cycle import Cycle
from wherry.sync.core.keep import Keep
from wherry.sync.core.reconcile import HOST
from wherry.sync.core.store import Store
from wherry.sync.model import Paths, Root
from wherry.sync.remote import Place, RemoteEndpoint
from wherry.sync.session import Session
from wherry_guest import packing
from wherry_guest import system as agent_system
from wherry_guest.sync import _Root as AgentRoot
from wherry_sync import hashing
from wherry_sync.entry import file
from wherry_sync.local import LocalEndpoint
from wherry_wire.frames import Frame
from wherry_wire.messages import Done, SyncFlushed, SyncScanned, pack

pytestmark = pytest.mark.timeout(60)

WAIT_S = 20.0


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path / "guest")
    yield made
    made.close()


class Pair:
    """A host's directory and the session that keeps it equal to the guest's."""

    def __init__(self, guest: Guest, directory: Path, *, single: bool = False) -> None:
        self.guest = guest
        self.directory = directory
        self.host = directory / "host"
        if not single:
            self.host.mkdir()
        self.place = Place("r1", str(self.host), single)
        self.there = guest.tree(self.place)
        self.open()

    def open(self) -> None:
        self.session = Session(
            Root(1, self.host, self.place),
            Paths(self.directory / "state", self.directory / "sync.db"),
            lambda place, ordered, progress: RemoteEndpoint(
                Stream(self.guest.connect()), place, ordered=ordered, progress=progress
            ),
            boot="host-1",
            writes=True,
        )
        self.guest.sessions[:] = [self.session]

    def barrier(self, *, fresh: bool = True) -> None:
        ticket = self.session.ask(fresh=fresh)
        assert ticket.done.wait(WAIT_S), "the barrier neither held nor failed"
        ticket.check()


@pytest.fixture
def pair(guest: Guest, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(guest, tmp_path)
    yield made
    made.session.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def scribble(choose: random.Random, root: Path, tag: str) -> None:
    """Change a tree at random."""
    for _ in range(choose.randint(1, 6)):
        paths = [path for path in root.rglob("*") if not path.is_symlink()]
        files = [path for path in paths if path.is_file()]
        places = [root, *(path for path in paths if path.is_dir())]
        new = choose.choice(places) / f"{tag}{choose.randint(0, 30)}"
        action = choose.choice(
            ["new", "new", "rewrite", "remove", "move", "mkdir", "chmod", "replace"]
        )
        try:
            if action == "mkdir":
                new.mkdir()
            elif action == "new" or not files:
                new.write_text(choose.randbytes(choose.choice([0, 3, 2048, 200_000])).hex())
            elif action == "rewrite":
                choose.choice(files).write_text(choose.randbytes(choose.randint(0, 50)).hex())
            elif action == "remove":
                path = choose.choice(paths)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif action == "move":
                choose.choice(paths).rename(new)
            elif action == "replace":
                # As a build does: the new directory may get the old one's inode.
                path = choose.choice(places[1:] or [new])
                new = path.with_name(f"{tag}new")
                shutil.rmtree(path, ignore_errors=True)
                new.mkdir(exist_ok=True)
                if choose.random() < 0.5:
                    (new / "built").write_text(f"{tag}{choose.random()}")
                new.rename(path)
            else:
                choose.choice(files).chmod(choose.choice([0o755, 0o644]))
        except OSError:
            continue


@pytest.mark.parametrize("seed", range(3))
def test_barriers_make_both_sides_equal(pair: Pair, seed: int) -> None:
    choose = random.Random(seed)
    for number in range(60):
        scribble(choose, pair.host, "h")
        expected = read(pair.host)
        pair.barrier()
        assert read(pair.there) == expected, f"round {number}"
        scribble(choose, pair.there, "g")
        expected = read(pair.there)
        pair.barrier(fresh=False)
        assert read(pair.host) == expected, f"round {number}"


def test_changes_travel_without_a_barrier(pair: Pair) -> None:
    pair.barrier()
    (pair.host / "h").write_text("h")
    until(lambda: (pair.there / "h").exists())
    (pair.there / "g").write_text("g")
    until(lambda: (pair.host / "g").exists())


def test_at_rest_there_are_no_rounds(pair: Pair) -> None:
    (pair.host / "f").write_text("f")
    pair.barrier()
    (pair.there / "g").write_text("g")
    until(lambda: (pair.host / "g").exists())
    time.sleep(0.3)
    rounds = pair.session.status().rounds
    time.sleep(1)
    assert pair.session.status().rounds == rounds


@pytest.mark.parametrize("seed", range(3))
def test_a_connection_that_is_cut_at_any_moment_loses_nothing(pair: Pair, seed: int) -> None:
    choose = random.Random(seed)
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(choose.random() / 20):
            pair.guest.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        for _ in range(20):
            scribble(choose, pair.host, "h")
            scribble(choose, pair.there, "g") if pair.there.exists() else None
            with contextlib.suppress(WherryError):
                pair.barrier()
    finally:
        stop.set()
        cutter.join()
    until(lambda: pair.session.status().state != "disconnected")
    pair.barrier()
    pair.barrier()
    assert read(pair.host) == read(pair.there)


class Side:
    """Writes to its own files of a tree, and knows what they have to be."""

    def __init__(self, choose: random.Random, tag: str) -> None:
        self._choose = choose
        self._tag = tag
        self._number = 0
        self.files: dict[str, str] = {}

    def edit(self, root: Path) -> None:
        for _ in range(self._choose.randint(1, 12)):
            self._number += 1
            name = f"{self._tag}{self._choose.randint(0, 9)}"
            path = root / name
            action = self._choose.choice(["write", "write", "append", "replace", "remove"])
            if action == "remove":
                path.unlink(missing_ok=True)
                self.files.pop(name, None)
                continue
            text = f"{self._number}\n" * self._choose.choice([1, 100, 100_000])
            self.files[name] = (self.files.get(name, "") if action == "append" else "") + text
            if action == "replace":
                new = root / f"{self._tag}new"
                new.write_text(text)
                new.rename(path)
            else:
                with path.open("a" if action == "append" else "w") as file:
                    file.write(text)


@pytest.mark.parametrize("seed", range(2))
def test_59_an_agent_that_is_killed_at_any_moment_loses_nothing(pair: Pair, seed: int) -> None:
    """Neither side ever gets something older, and no staging rubbish stays."""
    choose = random.Random(seed)
    host, there = Side(choose, "h"), Side(choose, "g")
    pair.barrier()
    stage = pair.guest.directory / "stage" / "r1"
    for number in range(15):
        host.edit(pair.host)
        there.edit(pair.there)
        ticket = pair.session.ask(fresh=True)
        time.sleep(choose.random() * 0.06)
        pair.guest.kill()
        # What is written while there is none.
        host.edit(pair.host)
        there.edit(pair.there)
        pair.guest.restart()
        # It may hold; if it does not, the next one does.
        assert ticket.done.wait(WAIT_S)
        until(lambda: pair.session.status().state == "watching")
        pair.barrier()
        assert read(pair.host) == read(pair.there) == {**host.files, **there.files}, number
        assert {path.name for path in stage.iterdir()} == {"journal"}
    # What was being written in place may have been edited since, so it is kept; nothing else is.
    kept = pair.session.conflicts_since(0)
    assert [path for path in kept if not Path(path).name.startswith("h")] == []


def test_what_ext4_can_and_the_host_need_not_stays_in_the_guest(pair: Pair) -> None:
    """Devices, fifos, sockets, owners and modes: after edits on the host, and after another agent
    has read and compared everything."""
    for name in ("f", "tool", "d/in"):
        (pair.host / name).parent.mkdir(exist_ok=True)
        (pair.host / name).write_text("1")
    (pair.host / "tool").chmod(0o755)
    pair.barrier()
    there = pair.there
    os.mknod(there / "null", stat.S_IFCHR | 0o640, os.makedev(1, 3))
    os.mkfifo(there / "d" / "pipe", 0o620)
    os.mknod(there / "socket", stat.S_IFSOCK | 0o600)
    (there / "d").chmod(0o1770)
    (there / "f").chmod(0o640)
    (there / "tool").chmod(0o710)
    for name in ("null", "d", "d/pipe", "d/in", "socket", "f", "tool"):
        os.chown(there / name, 70, 71)

    def kept() -> dict[str, tuple[int, ...]]:
        found = {path: path.lstat() for path in there.rglob("*")}
        return {
            str(path.relative_to(there)): (each.st_mode, each.st_uid, each.st_gid, each.st_rdev)
            for path, each in found.items()
        }

    mine = kept()
    pair.barrier(fresh=False)
    for way in ("in place", "by rename"):
        for name in ("f", "tool", "d/in"):
            path = pair.host / name
            if way == "in place":
                path.write_text(f"{name} {way}")
            else:
                (pair.host / "new").write_text(f"{name} {way}")
                (pair.host / "new").chmod(path.stat().st_mode)
                (pair.host / "new").rename(path)
        pair.barrier()
        assert kept() == mine
    pair.guest.kill()
    pair.guest.restart()
    pair.session.disconnect()
    (pair.host / "f").write_text("2")
    pair.barrier()
    assert kept() == mine
    both = {"f": "2", "tool": "tool by rename*", "d": {"in": "d/in by rename"}}
    assert read(pair.host) == both
    assert sorted(path.name for path in pair.host.rglob("*")) == ["d", "f", "in", "tool"]


@pytest.mark.parametrize("told", ["disconnect", "guest_changed"])
def test_what_changes_while_no_agent_runs_travels_by_itself(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """Nobody tells of it, and nobody waits for it; not even the disk comes first."""
    monkeypatch.setattr(flushing, "_CALM_S", 0.0)
    monkeypatch.setattr(flushing, "_ASK_S", 0.01)
    (pair.host / "f").write_text("f")
    pair.barrier()
    # Until the round that follows is over, and all is on the disk: else either brings it.
    until(lambda: not (pair.session._follow_up or not pair.session._flushing.is_idle))
    pair.guest.kill()
    (pair.there / "g").write_text("g")
    pair.guest.restart()
    getattr(pair.session, told)()
    until(lambda: (pair.host / "g").exists())


@pytest.mark.skipif(not packing.available(), reason="the agent needs libzstd.so.1")
def test_what_comes_from_the_guest_comes_compressed(pair: Pair) -> None:
    pair.barrier()
    before = pair.session.status().bytes_moved
    data = b"some text that comes again\n" * 8000
    (pair.there / "f").write_bytes(data)
    pair.barrier()
    assert (pair.host / "f").read_bytes() == data
    assert pair.session.status().bytes_moved - before < len(data) / 10


def test_when_work_is_done_its_memory_is_given_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back = []
    monkeypatch.setattr(flushing, "_CALM_S", 0.0)
    monkeypatch.setattr(flushing, "_ASK_S", 0.01)
    monkeypatch.setattr(Linux, "give_memory_back", lambda self: given_back.append("host"))
    monkeypatch.setattr(agent_system, "give_memory_back", lambda: given_back.append("guest"))
    (pair.host / "f").write_text("f")
    pair.barrier()
    until(lambda: not (pair.session._follow_up or not pair.session._flushing.is_idle))
    assert given_back == ["host"]
    # The agent is a process of its own, so what it does is looked at here.
    agent = AgentRoot(None, "", None)  # type: ignore[arg-type]
    agent._endpoint = SimpleNamespace(flushed=lambda: True)  # type: ignore[assignment]
    agent._flushed(SyncFlushed())
    assert given_back == ["host", "guest"]


def test_a_barrier_fails_at_once_while_the_guest_is_away(pair: Pair) -> None:
    pair.barrier()
    pair.guest.allowed = False
    pair.guest.cut()
    began = time.monotonic()
    with pytest.raises(WherryError, match="is not synchronised"):
        pair.barrier()
    assert time.monotonic() - began < 2
    pair.guest.allowed = True
    (pair.host / "f").write_text("f")
    until(lambda: (pair.there / "f").exists())


def test_a_session_that_begins_anew_knows_what_was_deleted(pair: Pair) -> None:
    for name in "abcd":
        (pair.host / name).write_text(name)
    pair.barrier()
    pair.session.close()
    (pair.host / "a").unlink()
    (pair.there / "b").unlink()
    pair.open()
    pair.barrier()
    assert sorted(read(pair.host)) == sorted(read(pair.there)) == ["c", "d"]
    trash = Keep(pair.directory / "state" / "trash")
    assert [kept.path for kept in trash] == ["b"]
    trash.close()


def test_a_copy_that_is_gone_is_made_again_and_deletes_nothing(pair: Pair) -> None:
    for name in "abc":
        (pair.host / name).write_text(name)
    pair.barrier()
    pair.session.close()
    shutil.rmtree(pair.guest.directory / "tree")
    shutil.rmtree(pair.guest.directory / "stage")
    pair.open()
    pair.barrier()
    assert read(pair.host) == read(pair.there) == {"a": "a", "b": "b", "c": "c"}


def test_a_root_that_vanished_fails_barriers_and_comes_back(pair: Pair) -> None:
    (pair.host / "f").write_text("f")
    pair.barrier()
    away = pair.directory / "away"
    pair.host.rename(away)
    with pytest.raises(WherryError, match=r"halted.*not there any more"):
        pair.barrier()
    assert (pair.there / "f").exists()
    away.rename(pair.host)
    pair.barrier()
    assert pair.session.status().state == "watching"


def test_a_path_that_cannot_be_written_is_named(pair: Pair) -> None:
    (pair.host / "d").mkdir()
    (pair.host / "d" / "f").write_text("f")
    pair.barrier()
    subprocess.run(["chattr", "+i", pair.there / "d"], check=True)
    try:
        (pair.host / "d" / "late").write_text("l")
        (pair.host / "other").write_text("o")
        with pytest.raises(WherryError, match=r"host/d/late cannot be brought .*not permitted"):
            pair.barrier()
        assert (pair.there / "other").read_text() == "o"
        # It is tried once more by itself, and no oftener.
        time.sleep(0.3)
        rounds = pair.session.status().rounds
        time.sleep(0.5)
        assert pair.session.status().rounds == rounds
    finally:
        subprocess.run(["chattr", "-i", pair.there / "d"], check=True)
    pair.barrier()
    assert (pair.there / "d" / "late").read_text() == "l"


def test_a_single_file(guest: Guest, tmp_path: Path) -> None:
    pair = Pair(guest, tmp_path, single=True)
    try:
        pair.host.write_text("one")
        pair.barrier()
        assert pair.there.read_text() == "one"
        inode = pair.there.stat().st_ino
        new = tmp_path / "new"
        new.write_text("another")
        new.replace(pair.host)
        pair.barrier()
        assert pair.there.read_text() == "another"
        assert pair.there.stat().st_ino == inode
        pair.there.write_text("back")
        pair.barrier(fresh=False)
        assert pair.host.read_text() == "back"
    finally:
        pair.session.close()


def test_what_is_mapped_is_read_again(pair: Pair) -> None:
    import mmap

    (pair.host / "m").write_bytes(b"a" * 4096)
    pair.barrier()
    with (pair.there / "m").open("r+b") as file, mmap.mmap(file.fileno(), 4096) as area:
        area[0] = ord("b")
        pair.barrier(fresh=False)
        area[1] = ord("c")
    pair.barrier(fresh=False)
    assert (pair.host / "m").read_bytes()[:3] == b"bca"


class Hostile:
    """A guest that answers with what a test gives."""

    def __init__(self, *answers: bytes) -> None:
        self.ours, theirs = socket.socketpair()

        def serve() -> None:
            with theirs:
                for answer in answers:
                    if not theirs.recv(1 << 20):
                        return
                    theirs.sendall(answer)
                while theirs.recv(1 << 20):
                    pass

        threading.Thread(target=serve, daemon=True).start()


def opened() -> bytes:
    from wherry_wire.messages import SyncOpened

    return pack(SyncOpened(boot_id="b", packed=False), 0)


def rows(*fields: bytes) -> bytes:
    data = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return Frame(0x80, 0, data).encode()


def scanned(changes: int, *, present: bool = True) -> bytes:
    return pack(
        SyncScanned(
            present=present, device=1, files_read=0, bytes_read=0, changes=changes, rescued=False
        ),
        0,
    )


@pytest.mark.parametrize(
    "answer",
    [
        rows(b"../../etc/passwd", b"D") + scanned(1),
        rows(b"/etc", b"D") + scanned(1),
        rows(b"a/../../b", b"D") + scanned(1),
        rows(b"f", b"F") + scanned(1),
        rows(b"", b"D") + scanned(2),
        rows(b"", b"D") + scanned(-1),
        rows(b"x") + scanned(0),
        scanned(0),
        b"\xff\xff\xff\xff\x80\0\0\0\0\0",
        pack(Done(), 0),
        Frame(0x7F, 0, b"{}").encode(),
    ],
)
def test_a_hostile_guest_ends_the_connection(answer: bytes) -> None:
    end = RemoteEndpoint(Stream(Hostile(opened(), answer).ours), Place("r1", "/r"))
    with pytest.raises(OSError, match=r"broke the protocol|connection to the guest was lost"):
        end.scan()
    with pytest.raises(OSError, match="lost"):
        end.flush()
    end.close()


def test_a_guest_that_falls_silent_is_given_up() -> None:
    end = RemoteEndpoint(Stream(Hostile(opened()).ours), Place("r1", "/r"), silence_s=0.3)
    with pytest.raises(OSError, match="said nothing"):
        end.flush()
    end.close()


def test_a_hostile_file_does_not_lead_out_of_the_root(tmp_path: Path) -> None:
    """Its directory is a link that the host follows nowhere."""
    host = tmp_path / "host"
    host.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (host / "d").mkdir()
    ours = LocalEndpoint(os.fspath(host), os.fspath(tmp_path / "stage"), "b")
    answers = [
        opened(),
        rows(b"", b"D", b"d", b"D", b"d/l", b"L" + os.fsencode(outside)) + scanned(3),
        pack(Done(), 0),
    ]
    end = RemoteEndpoint(Stream(Hostile(*answers).ours), Place("r1", "/r"))
    store = Store(tmp_path / "sync.db", 1)
    keep = Keep(tmp_path / "conflicts")
    try:
        cycle = Cycle(ours, end, store, keep)
        cycle.run()
        assert (host / "d" / "l").is_symlink()
        assert list(outside.iterdir()) == []
        assert store.pending(HOST)
    finally:
        keep.close()
        store.close()
        ours.close()
        end.close()


def test_a_host_that_ends_before_it_has_forgotten_an_earlier_copy_deletes_nothing(
    pair: Pair,
) -> None:
    for name in "abc":
        (pair.host / name).write_text(name)
    pair.barrier()
    pair.session.close()
    for part in ("tree", "stage"):
        shutil.rmtree(pair.guest.directory / part)
    # It has opened the new copy, and that is all.
    RemoteEndpoint(Stream(pair.guest.connect()), pair.place).close()
    pair.open()
    pair.barrier()
    assert read(pair.host) == read(pair.there) == {"a": "a", "b": "b", "c": "c"}


def test_a_copy_that_was_made_for_one_inside_is_a_new_one(pair: Pair) -> None:
    """The disk of the guest is another one; a root in the root is opened first."""
    (pair.host / "d").mkdir()
    for name in ("a", "b", "d/c"):
        (pair.host / name).write_text(name)
    pair.barrier()
    pair.session.close()
    for part in ("tree", "stage"):
        shutil.rmtree(pair.guest.directory / part)
    RemoteEndpoint(Stream(pair.guest.connect()), Place("r2", str(pair.host / "d"))).close()
    pair.open()
    pair.barrier()
    assert read(pair.host) == read(pair.there) == {"a": "a", "b": "b", "d": {"c": "d/c"}}


@pytest.mark.parametrize("side", ["host", "guest"])
def test_38_of_a_change_only_what_has_changed_is_sent(pair: Pair, side: str) -> None:
    """A megabyte in a big file by blocks, and what a small one got at its end."""
    (pair.host / "big").write_bytes(os.urandom(16_000_000))
    (pair.host / "log").write_bytes(os.urandom(200_000))
    pair.barrier()
    here, there = (pair.host, pair.there) if side == "host" else (pair.there, pair.host)
    for position in (8_000_000, 16_000_000):
        inodes = [(there / name).stat().st_ino for name in ("big", "log")]
        before = pair.session.status().bytes_moved
        with (here / "big").open("r+b") as file:
            file.seek(position)
            file.write(os.urandom(1_000_000))
        with (here / "log").open("ab") as file:
            file.write(b"one more line\n")
        pair.barrier()
        for name in ("big", "log"):
            assert (there / name).read_bytes() == (here / name).read_bytes()
        # Whole blocks, and the other way a small file is sent as a whole.
        limit = 1_600_000 if side == "host" else 1_800_000
        assert 1_000_000 < pair.session.status().bytes_moved - before < limit
        kept = [(there / name).stat().st_ino for name in ("big", "log")]
        assert (kept[0] == inodes[0]) == (position == 16_000_000)
        assert kept[1] == inodes[1]


@pytest.mark.parametrize("answer", [b"", b"x" * 32, b"x" * 64, b"x" * 96])
def test_sums_of_a_hostile_guest_are_those_of_the_file_or_none(answer: bytes) -> None:
    leaf = file(False, 2 * hashing.CHUNK_BYTES, hashing.root(b"y" * 64))
    reply = (rows(answer) if answer else b"") + pack(Done(), 0)
    end = RemoteEndpoint(Stream(Hostile(opened(), reply).ours), Place("r1", "/r"))
    if answer:
        with pytest.raises(OSError, match="broke the protocol"):
            end.sums("f", leaf)
    else:
        assert end.sums("f", leaf) == b""
    end.close()


def test_rounds_that_nobody_waits_for_rest_after_a_long_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.barrier()
    monkeypatch.setattr(session_module, "_SHORT_S", 0.0)
    monkeypatch.setattr(session_module, "min", max, raising=False)
    # Whatever it took, it rests for as long as it may.
    monkeypatch.setattr(session_module, "_LONGEST_REST_S", WAIT_S)
    (pair.host / "first").write_text("1")
    until(lambda: (pair.there / "first").exists())
    until(lambda: pair.session.status().state == "watching")
    (pair.host / "second").write_text("2")
    time.sleep(0.3)
    assert not (pair.there / "second").exists()
    pair.barrier()
    assert (pair.there / "second").exists()


def test_both_sides_hold_the_same_objects_for_what_is_equal(pair: Pair) -> None:
    """Or a root of many files takes twice the memory."""
    write(pair.host, {"d": {"a": "a", "b": "b"}, "c": "c"})
    for _ in range(2):  # the second one has looked at what the first one has made
        pair.barrier()
    cycle = pair.session._cycle
    assert cycle is not None
    host, guest = cycle._ends
    assert isinstance(host, LocalEndpoint)
    assert isinstance(guest, RemoteEndpoint)
    known, _ = host._scanner.known()
    assert guest._known is known.entry
    assert cycle._ancestor is known.entry


def test_a_first_round_tells_what_it_is_at(guest: Guest, tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []
    begun = threading.Event()

    class Watched(Stream):
        def sendall(self, data: bytes, /) -> None:
            assert begun.wait(WAIT_S)
            found = describe(pair.session)
            seen.append((found["state"], found["transfer"] is not None))
            super().sendall(data)

    class Watching(Pair):
        def open(self) -> None:
            (self.host / "d").mkdir()
            (self.host / "d" / "f").write_text("f")
            self.session = Session(
                Root(1, self.host, self.place),
                Paths(self.directory / "state", self.directory / "sync.db"),
                lambda place, ordered, progress: RemoteEndpoint(
                    Watched(guest.connect()), place, ordered=ordered, progress=progress
                ),
                boot="host-1",
            )

    pair = Watching(guest, tmp_path)
    begun.set()
    try:
        pair.barrier()
        assert list(dict.fromkeys(seen)) == [
            ("connecting", False),
            ("scanning", False),
            ("sending", True),
        ]
        assert describe(pair.session)["state"] == "watching"
        seen.clear()
        (pair.host / "d" / "f").write_text("changed")
        pair.barrier()
        assert {state for state, _ in seen} == {"watching", "sending"}
    finally:
        pair.session.close()
