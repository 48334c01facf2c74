"""Which roots there are, and what is left of them between two lives of a machine."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from sync_guest import Guest, Stream
from sync_trees import read, write

from wherry.core.errors import WherryError
from wherry.sync import roots
from wherry.sync.barrier import Ticket, hold, hold_required
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.core.store import Store
from wherry.sync.remote import Place, RemoteEndpoint
from wherry.sync.roots import Roots
from wherry.sync.session import Session

pytestmark = pytest.mark.timeout(60)


class Machine:
    """Its roots, over and over again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start("guest-1")

    def start(self, boot: str) -> None:
        self.guest = Guest(self.directory / "guest", boot)
        self.boot = boot
        self.open()

    def stop(self, *, orderly: bool) -> None:
        """End the guest; a loss of its power is what the caller then makes of its files."""
        if not orderly:
            self.guest.process.kill()
        self.roots.close()
        if orderly:
            self.roots.guest_ended(self.boot)
        self.guest.close()

    def open(self, boot: str = "host-1") -> None:
        self.roots = Roots(
            self.directory / "sync",
            self.directory / "sync.db",
            lambda place, ordered, progress: RemoteEndpoint(
                Stream(self.guest.connect()), place, ordered=ordered, progress=progress
            ),
            boot=boot,
            private=self.directory / "user" / ".local" / "w",
        )

    def barrier(self) -> None:
        hold(self.roots.all(), fresh=True)

    def copy(self, path: Path) -> object:
        return read(self.guest.tree(Place("", str(path))))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.roots.close()
    made.guest.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = tmp_path / "src"
    (found / "in").mkdir(parents=True)
    (found / "f").write_text("f")
    (found / "in" / "g").write_text("g")
    return found


def test_what_is_in_a_root_belongs_to_it(machine: Machine, source: Path) -> None:
    outer = machine.roots.require(str(source))
    assert machine.roots.require(str(source / "in")) is outer
    assert machine.roots.holding(str(source / "in" / "g")) is outer
    assert machine.roots.holding(str(source) + "-else") is None
    assert len(machine.roots.all()) == 1


def test_a_root_around_others_takes_their_place(machine: Machine, source: Path) -> None:
    inner = machine.roots.require(str(source / "in"))
    machine.barrier()
    outer = machine.roots.require(str(source))
    assert machine.roots.all() == [outer]
    with pytest.raises(WherryError, match="not synchronised any more"):
        hold([inner], fresh=True)
    machine.barrier()
    assert machine.copy(source) == read(source)


def test_a_file_that_is_mounted_keeps_its_inode_in_a_directory(
    machine: Machine, source: Path
) -> None:
    machine.roots.require(str(source))
    machine.barrier()
    there = machine.guest.tree(Place("", str(source / "f")))
    before = there.stat().st_ino
    machine.roots.require(str(source / "f"))
    new = source / "new"
    new.write_text("another")
    new.replace(source / "f")
    machine.barrier()
    assert (there.read_text(), there.stat().st_ino) == ("another", before)


@pytest.mark.parametrize("when", ["before it is asked", "while it is waited for"])
def test_who_waits_for_a_root_waits_for_the_one_that_takes_its_place(
    when: str, machine: Machine, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers are made at the same time, and the second one mounts what is around."""
    monkeypatch.setattr(roots, "_LAST_BARRIER_S", 0.05)
    inner = machine.roots.require(str(source / "in"))
    at_work = threading.Event()

    def work(_: object) -> None:
        at_work.set()
        while not inner.is_closed:
            time.sleep(0.01)

    busy = threading.Thread(target=inner.do, args=(work,))
    if when == "while it is waited for":
        busy.start()
        at_work.wait()
    asked: list[Session] = []

    def require() -> list[Session]:
        asked.append(machine.roots.require(str(source / "in")))
        if when == "before it is asked" and len(asked) == 1:
            machine.roots.require(str(source))
        return asked[-1:]

    def wait(event: threading.Event, timeout_s: float) -> bool:
        machine.roots.require(str(source))
        return event.wait(timeout_s)

    hold_required(require, fresh=True, wait=wait)
    assert asked == [inner, *machine.roots.all()]
    assert asked[1].root.path == source
    assert machine.copy(source) == read(source)
    if busy.ident:
        busy.join()


def test_a_new_connection_is_told_to_a_root_that_is_ending(
    machine: Machine, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last barrier waits for a guest that has become silent, perhaps for very long."""
    inner = machine.roots.require(str(source / "in"))
    machine.barrier()
    silent, waits, told = Ticket(1, True), threading.Event(), threading.Event()

    def ask(*, fresh: bool) -> Ticket:
        waits.set()
        return silent

    monkeypatch.setattr(inner, "ask", ask)
    monkeypatch.setattr(inner, "disconnect", told.set)
    ending = threading.Thread(target=machine.roots.require, args=(str(source),))
    ending.start()
    waits.wait()
    learning = threading.Thread(target=machine.roots.disconnect)
    learning.start()
    learning.join(1)
    try:
        assert told.is_set()
        assert not learning.is_alive()
        assert ending.is_alive()
    finally:
        silent.finish(None)
        ending.join()
        learning.join()
    assert inner.is_over
    machine.barrier()


@pytest.mark.parametrize("how", ["around", "rules"])
def test_who_takes_the_place_of_another_does_what_that_did(
    machine: Machine, source: Path, how: str
) -> None:
    """A container that runs has mounted a file, and writes; then another one comes."""
    if how == "around":
        machine.roots.require(str(source / "in" / "g"))
    else:
        machine.roots.require(str(source))
        machine.roots.require(str(source / "in" / "g"))
        (source / ".wherryignore").write_text("nothing\n")
    machine.barrier()
    there = machine.guest.tree(Place("", str(source / "in" / "g")))
    before = there.stat().st_ino
    session = machine.roots.require(str(source), read_only=True)
    assert machine.roots.all() == [session]
    new = source / "new"
    new.write_text("another")
    new.replace(source / "in" / "g")
    machine.barrier()
    assert (there.read_text(), there.stat().st_ino) == ("another", before)
    there.write_text("back")
    machine.barrier()
    assert (source / "in" / "g").read_text() == "back"


class MountedFile:
    """A file of the guest that a container mounts by itself, so only that inode shows there."""

    def __init__(self, machine: Machine, path: Path) -> None:
        self.path = path
        self.inode = machine.guest.tree(Place("", str(path)))
        self.number = self.inode.stat().st_ino

    def replace(self, text: str) -> None:
        """Write it on the host as editors do."""
        new = self.path.with_name("new")
        new.write_text(text)
        new.replace(self.path)

    def shows(self, text: str) -> bool:
        return (self.inode.read_text(), self.inode.stat().st_ino) == (text, self.number)


@pytest.mark.parametrize("reason", ["its rules", "the database"])
def test_a_root_that_cannot_begin_leaves_what_is_in_it_to_the_next_one(
    reason: str, machine: Machine, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = machine.roots.require(str(source / "in" / "g"))
    machine.barrier()
    mounted = MountedFile(machine, source / "in" / "g")
    with monkeypatch.context() as patched:
        if reason == "its rules":
            (source / ".wherryignore").write_text("!\n")
        else:
            full = sqlite3.OperationalError("database or disk is full")
            patched.setattr(Store, "take", Mock(side_effect=full))
        with pytest.raises(WherryError):
            machine.roots.require(str(source))
    if reason == "its rules":
        hold([inner], fresh=True)
    (source / ".wherryignore").unlink(missing_ok=True)
    machine.roots.require(str(source))
    machine.barrier()
    mounted.replace("another")
    machine.barrier()
    assert mounted.shows("another")


def test_one_that_is_begun_again_after_a_failure_does_what_it_did(
    machine: Machine, source: Path
) -> None:
    machine.roots.require(str(source))
    failing = machine.roots.require(str(source / "in" / "g"))
    machine.barrier()
    mounted = MountedFile(machine, source / "in" / "g")
    full = sqlite3.OperationalError("database or disk is full")
    with patch.object(Store, "begin", side_effect=full):
        mounted.replace("another")
        with pytest.raises(WherryError, match="disk is full"):
            machine.barrier()
        failing._thread.join(20)
    # Of what is in it somebody needs another part now, and only to read.
    session = machine.roots.require(str(source / "in"), read_only=True)
    assert session.root.path == source
    machine.barrier()
    assert mounted.shows("another")
    mounted.inode.write_text("back")
    machine.barrier()
    assert mounted.path.read_text() == "back"


def test_a_file_that_is_mounted_is_known_before_the_first_round_of_the_next_service(
    machine: Machine, source: Path
) -> None:
    machine.roots.require(str(source))
    machine.roots.require(str(source / "in" / "g"))
    machine.barrier()
    mounted = MountedFile(machine, source / "in" / "g")
    machine.roots.close()
    mounted.replace("another")
    machine.open()
    machine.roots.require(str(source))
    machine.barrier()
    assert mounted.shows("another")
    # A container that is being made is not known to the engine yet.
    for used, idle_s, pinned in (
        ([source, source / "in" / "g"], 0, True),
        ([source], 60, True),
        ([source], 0, False),
    ):
        machine.roots.release(map(str, used), [], idle_s=idle_s)
        pins = json.loads((machine.directory / "sync" / "roots.json").read_text())["pins"]
        assert pins == [str(mounted.path)] * pinned


def test_changes_while_nothing_ran_are_told_apart_from_loss(machine: Machine, source: Path) -> None:
    machine.roots.require(str(source))
    machine.barrier()
    machine.roots.close()
    with closing(Store(machine.directory / "sync.db", 1)) as store:
        # Our own end was in order; the guest's is not known yet.
        assert (store.boot(HOST), store.boot(GUEST) != "") == ("", True)
    machine.roots.guest_ended(machine.boot)
    with closing(Store(machine.directory / "sync.db", 1)) as store:
        assert store.boot(GUEST) == ""
    (source / "f").unlink()
    (source / "in" / "new").write_text("n")
    machine.open()
    machine.roots.require(str(source))
    machine.barrier()
    assert machine.copy(source) == read(source) == {"in": {"g": "g", "new": "n"}}


def test_a_stop_does_not_speak_for_roots_that_were_not_there(
    machine: Machine, source: Path, tmp_path: Path
) -> None:
    """What they lost in the boot before is found out when they begin again."""
    machine.roots.require(str(source))
    machine.barrier()
    machine.stop(orderly=True)
    machine.start("guest-2")
    machine.roots.require(str(source))
    machine.barrier()
    (source / "f").write_text("hours of work")
    machine.barrier()
    machine.stop(orderly=False)
    machine.guest.tree(Place("", str(source / "f"))).write_text("")

    machine.start("guest-3")
    (tmp_path / "other").mkdir()
    machine.roots.require(str(tmp_path / "other"))
    machine.barrier()
    machine.stop(orderly=True)

    machine.start("guest-4")
    machine.roots.require(str(source))
    machine.barrier()
    assert machine.copy(source) == read(source)
    assert (source / "f").read_text() == "hours of work"


def test_a_root_that_is_halted_does_not_end_in_order(machine: Machine, source: Path) -> None:
    """What the host lost with its power is found out when its disk is there again."""
    (source / "more").write_text("more")
    machine.roots.require(str(source))
    machine.barrier()
    machine.roots.close()
    machine.open()
    machine.roots.require(str(source))
    machine.barrier()
    there = machine.guest.tree(Place("", str(source / "f")))
    there.write_text("the result of a long build")
    machine.barrier()
    assert (source / "f").read_text() == "the result of a long build"
    shutil.copytree(machine.directory / "sync", machine.directory / "cut")
    with closing(sqlite3.connect(machine.directory / "sync.db")) as database:
        database.execute("VACUUM INTO ?", (str(machine.directory / "cut.db"),))
    machine.roots.close()
    shutil.rmtree(machine.directory / "sync")
    (machine.directory / "cut").rename(machine.directory / "sync")
    for path in machine.directory.glob("sync.db*"):
        path.unlink()
    (machine.directory / "cut.db").rename(machine.directory / "sync.db")
    (source / "f").write_text("")

    away = source.rename(source.with_name("away"))
    source.mkdir()
    machine.open("host-2")
    machine.roots.require(str(source))
    with pytest.raises(WherryError, match="halted"):
        machine.barrier()
    machine.roots.close()
    source.rmdir()
    away.rename(source)

    machine.open("host-2")
    machine.roots.require(str(source))
    machine.barrier()
    assert machine.copy(source) == read(source)
    assert (source / "f").read_text() == "the result of a long build"


def test_a_root_that_is_kept_is_known_the_next_time(machine: Machine, source: Path) -> None:
    machine.roots.require(str(source))
    machine.roots.keep(str(source))
    machine.roots.close()
    machine.open()
    assert machine.roots.kept == [str(source)]
    machine.roots.require(str(source))
    machine.roots.remove(str(source))
    assert (machine.roots.kept, machine.roots.all()) == ([], [])
    with pytest.raises(WherryError, match="is not synchronised; see: wherry sync list"):
        machine.roots.remove(str(source))
    assert machine.copy(source) == read(source)


@pytest.mark.parametrize("released", [False, True])
def test_a_root_that_is_halted_can_be_begun_anew(
    released: bool, machine: Machine, source: Path
) -> None:
    machine.roots.require(str(source))
    machine.barrier()
    shutil.rmtree(source)
    source.mkdir()
    for _ in range(2):
        with pytest.raises(WherryError, match=f"halted.*wherry sync remove {source}"):
            machine.barrier()
        machine.roots.release([], [], idle_s=-1)
        machine.roots.require(str(source))
    if released:
        machine.roots.release([], [], idle_s=-1)
    machine.roots.remove(str(source))
    (source / "mine").write_text("mine")
    machine.roots.require(str(source))
    machine.barrier()
    assert machine.copy(source) == read(source) == {"f": "f", "in": {"g": "g"}, "mine": "mine"}


def test_what_no_container_mounts_ends_and_is_ready_again(machine: Machine, source: Path) -> None:
    other = source.parent / "other"
    other.mkdir()
    kept = source.parent / "kept"
    kept.mkdir()
    session = machine.roots.require(str(source))
    machine.roots.require(str(other))
    machine.roots.require(str(kept))
    machine.roots.keep(str(kept))
    machine.barrier()
    machine.roots.release([], [])
    assert len(machine.roots.all()) == 3, "somebody needed them just now"
    machine.roots.release([str(source / "in")], [str(source / "in")], idle_s=0)
    assert machine.roots.holding(str(source)) is session
    assert machine.roots.holding(str(other)) is None
    assert machine.roots.holding(str(kept)) is not None
    machine.roots.release([], [], idle_s=0)
    assert machine.roots.holding(str(source)) is None
    # Meanwhile both sides go their own ways, and what was deleted is not taken for new.
    (source / "f").unlink()
    (machine.guest.tree(Place("", str(source))) / "new").write_text("n")
    machine.roots.require(str(source))
    machine.barrier()
    assert machine.copy(source) == read(source) == {"in": {"g": "g"}, "new": "n"}


def test_a_root_s_own_rules_hold_until_it_is_removed(machine: Machine, source: Path) -> None:
    path, here = str(source), source / "in"
    machine.roots.require(path)
    machine.barrier()
    with pytest.raises(WherryError, match="is synchronised as a part of"):
        machine.roots.ignore(str(here), ["*"])
    with pytest.raises(WherryError, match="ignore setting, line 1"):
        machine.roots.ignore(path, ["!"])
    machine.roots.ignore(path, ["*.log", "!keep.log"])
    for when in ("at once", "after a start"):
        machine.roots.require(path)
        (here / "a.log").write_text(when)
        (here / "keep.log").write_text(when)
        machine.barrier()
        assert machine.copy(source) == {"f": "f", "in": {"g": "g", "keep.log": when}}
        machine.roots.close()
        machine.open()
    machine.roots.require(path)
    machine.roots.remove(path)
    machine.roots.require(path)
    machine.barrier()
    assert machine.copy(source) == read(source)


def test_what_conflicts_left_can_be_listed_though_no_container_mounts_it(
    machine: Machine, source: Path
) -> None:
    there = machine.guest.tree(Place("", str(source)))
    machine.roots.require(str(source))
    machine.barrier()
    machine.roots.release([], [], idle_s=0)
    (source / "f").write_text("host")
    (there / "f").write_text("guest")
    session = machine.roots.require(str(source))
    count = session.conflict_count
    machine.barrier()
    assert session.conflicts_since(count) == [str(source / "f")]
    assert session.conflicts_since(session.conflict_count) == []
    machine.roots.release([], [], idle_s=0)
    assert machine.roots.all() == [session]
    machine.roots.close()
    machine.open()
    assert machine.roots.with_conflicts == [str(source)]
    session = machine.roots.require(str(source))
    session.do(lambda conflicts: [conflicts.forget(kept) for kept in conflicts])
    assert machine.roots.with_conflicts == []


@pytest.mark.parametrize("writes", [False, True])
def test_files_that_roots_had_one_after_the_other_are_not_changed_back(
    writes: bool, machine: Machine, source: Path
) -> None:
    def mount(path: Path) -> Session:
        """Have one root alone, as if the containers before had been removed long ago."""
        machine.roots.release([], [], idle_s=-1)
        session = machine.roots.require(str(path), read_only=not writes)
        machine.barrier()
        return session

    inner = source / "in"
    mount(source)
    mount(inner)
    # Another branch, which the inner root alone has seen, and back again while none is mounted.
    (inner / "g").write_text("feature")
    (inner / "new").write_text("only on feature")
    machine.barrier()
    machine.roots.release([], [], idle_s=-1)
    (inner / "g").write_text("g")
    (inner / "new").unlink()
    mount(source)
    assert machine.copy(source) == read(source) == {"f": "f", "in": {"g": "g"}}
    # And the other way round.
    (inner / "g").write_text("feature")
    (source / "f").write_text("feature")
    machine.barrier()
    machine.roots.release([], [], idle_s=-1)
    (inner / "g").write_text("g")
    assert mount(inner).status().conflicts == 0
    assert machine.copy(inner) == read(inner) == {"g": "g"}
    (source / "f").unlink()
    session = mount(source)
    assert machine.copy(source) == read(source) == {"in": {"g": "g"}}
    assert session.status().conflicts == 0


def test_a_root_around_another_one_knows_what_that_knew_from_the_first_time_on(
    machine: Machine, source: Path
) -> None:
    inner = source / "in"
    write(inner, {"edited": "1"})
    machine.roots.require(str(inner))
    machine.barrier()
    machine.roots.release([], [], idle_s=-1)
    (inner / "g").unlink()
    (inner / "edited").write_text("2")
    outer = machine.roots.require(str(source))
    machine.barrier()
    assert machine.copy(source) == read(source) == {"f": "f", "in": {"edited": "2"}}
    assert outer.status().conflicts == 0
    # It is its own knowledge from now on.
    (inner / "edited").unlink()
    machine.guest.cut()
    machine.barrier()
    assert machine.copy(source) == read(source) == {"f": "f", "in": {}}


@pytest.mark.parametrize("lost", ["disk", "all", "inner", "halfway", "markers", "unknown"])
def test_what_a_guest_has_not_that_lost_its_copies_was_not_deleted(
    lost: str, machine: Machine, source: Path
) -> None:
    inner, deep = source / "in", source / "in" / "deep"
    write(deep, {"h": "h"})
    machine.roots.require(str(inner))
    machine.barrier()
    machine.roots.release([], [], idle_s=-1)
    wanted = read(source)
    tree, stage = machine.guest.tree(Place("", str(source))), machine.guest.directory / "stage"
    first = source
    if lost == "disk":
        for path in (stage, machine.guest.directory / "tree"):
            shutil.rmtree(path)
            path.mkdir()
    elif lost == "all":
        shutil.rmtree(tree)
    elif lost == "inner":
        shutil.rmtree(tree / "in")
    elif lost == "halfway":
        # It is new, and the host has not come to know that before the connection was cut.
        shutil.rmtree(tree / "in" / "deep")
        first = deep
        machine.roots._connect(Place("r2", str(deep)), False, lambda size: None).close()
    else:
        # A disk as it was before that root was known, or as an earlier release has left it.
        shutil.rmtree(tree / "in")
        (tree / "in").mkdir()
        for marker in stage.glob("*.known"):
            marker.unlink() if lost == "markers" else marker.write_bytes(b"")
    for path in (first, source):
        machine.roots.require(str(path))
        machine.barrier()
        machine.roots.release([], [], idle_s=-1)
    assert machine.copy(source) == read(source) == wanted


@pytest.mark.parametrize("late", [False, True])
def test_one_that_this_computer_failed_is_begun_again(
    late: bool, machine: Machine, source: Path
) -> None:
    (machine.directory / "sync.db").write_bytes(b"not a database" * 100)
    failing = machine.roots.require(str(source))
    if late:
        failing._thread.join(20)
    with pytest.raises(WherryError, match=r"cannot be synchronised.*sync\.db.*move it away"):
        hold([failing], fresh=True)
    (machine.directory / "sync.db").unlink()
    hold([machine.roots.require(str(source))], fresh=True)
    assert machine.copy(source) == read(source)


def test_rules_that_are_changed_hold_from_the_next_command_on(
    machine: Machine, source: Path
) -> None:
    there = machine.guest.tree(Place("", str(source)))

    def command() -> None:
        session = machine.roots.require(str(source))
        hold([session], fresh=True)

    command()
    (source / ".wherryignore").write_text("in\n")
    (source / "in" / "g").write_text("host's own")
    command()
    (there / "in" / "g").write_text("guest's own")
    (there / "in" / "made").write_text("m")
    command()
    assert read(source / "in") == {"g": "host's own"}
    assert read(there / "in") == {"g": "guest's own", "made": "m"}
    # Taken back: both are there, so what differs is a conflict, and nothing is lost.
    (source / ".wherryignore").unlink()
    command()
    command()
    assert read(source / "in") == read(there / "in") == {"g": "host's own", "made": "m"}
    (kept,) = machine.roots.require(str(source)).do(
        lambda conflicts: [b"".join(conflicts.open(kept)) for kept in conflicts]
    )
    assert kept == b"guest's own"
    # As costs nothing while nothing changes.
    assert machine.roots.require(str(source)) is machine.roots.require(str(source / "in"))


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_what_others_write_where_containers_only_read_stays_in_the_guest(
    around: bool, ended: bool, machine: Machine, source: Path
) -> None:
    inner, there = source / "in", machine.guest.tree(Place("", str(source / "in")))
    session = machine.roots.require(str(inner), read_only=True)
    machine.barrier()
    (there / "g").write_text("other's")
    (there / "new").write_text("other's")
    if ended:
        machine.roots.close()
        machine.open()
    session = machine.roots.require(str(source if around else inner), first=True)
    machine.barrier()
    (there / "made").write_text("made")
    machine.barrier()
    assert read(inner) == {"g": "g", "made": "made"}
    assert sorted(Path(each.path).name for each in session.status().problems) == ["g", "new"]
    # As long as a container is there that may write; then it is as at first.
    machine.roots.release([str(inner)], [str(inner)], idle_s=-1)
    assert session.writes
    machine.roots.release([str(inner)], [])
    assert session.writes, "one that is being made may write"
    machine.roots.release([str(inner)], [], idle_s=-1)
    assert not session.writes
    machine.barrier()
    (there / "made").write_text("other's")
    machine.roots.require(str(inner), first=True)
    machine.barrier()
    assert read(inner) == {"g": "g", "made": "made"}
    (there / "new").write_text("made")
    machine.barrier()
    assert read(inner) == {"g": "g", "made": "made", "new": "made"}


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_what_others_write_when_the_last_container_that_may_is_gone_stays_so_too(
    busy: bool, read_only: bool, machine: Machine, source: Path
) -> None:
    there = machine.guest.tree(Place("", str(source)))
    session = machine.roots.require(str(source))
    machine.barrier()
    # Somebody works on the host all the time.
    session.forbid_writes(0)
    if busy:
        (source / "f").write_text("f")
        machine.barrier()
    else:
        machine.roots.release([], [], idle_s=-1)
    (there / "f").write_text("other's")
    machine.roots.require(str(source), read_only=read_only, first=True)
    machine.barrier()
    machine.barrier()
    assert (source / "f").read_text() == "f"


def test_a_container_that_is_not_known_to_write_loses_nothing(
    machine: Machine, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on, and is known again when it is asked for. Only others begin, which read."""
    there = machine.guest.tree(Place("", str(source)))
    count = 0

    def lose(forget: Callable[[], object]) -> None:
        nonlocal count
        count += 1
        path = str(source / "in")
        machine.roots.require(path)
        machine.barrier()
        forget()
        (source / "in").mkdir(exist_ok=True)
        machine.roots.require(path, read_only=True)
        machine.barrier()
        machine.barrier()
        (there / "in" / f"{count}").write_text("container")
        machine.barrier()
        machine.roots.require(path)
        machine.barrier()
        machine.barrier()
        assert (source / "in" / f"{count}").exists()

    def forget_by_a_restart() -> None:
        """As if the containers that run could not be asked for."""
        machine.roots.close()
        machine.open()

    def forget_by_a_fault() -> None:
        with monkeypatch.context() as patched:
            failing = Mock(side_effect=sqlite3.OperationalError("disk is full"))
            patched.setattr(Store, "take", failing)
            with pytest.raises(WherryError):
                machine.roots.require(str(source), read_only=True)

    lose(lambda: machine.roots.remove(str(source / "in")))
    lose(forget_by_a_restart)
    lose(forget_by_a_fault)


def test_what_is_owed_by_a_root_that_is_halted_and_begun_anew(
    machine: Machine, source: Path, tmp_path: Path
) -> None:
    there = machine.guest.tree(Place("", str(source)))
    machine.roots.require(str(source))
    machine.barrier()
    away = tmp_path / "away"
    source.rename(away)
    with pytest.raises(WherryError, match="halted"):
        machine.barrier()
    (there / "made").write_text("container")
    machine.roots.remove(str(source))
    away.rename(source)
    machine.roots.require(str(source), read_only=True)
    machine.barrier()
    machine.barrier()
    assert (source / "made").exists()


def test_what_is_owed_by_a_root_is_so_by_one_in_it(machine: Machine, source: Path) -> None:
    machine.roots.require(str(source))
    machine.barrier()
    machine.guest.allowed = False
    machine.guest.cut()
    write(machine.guest.tree(Place("", str(source))), {"new": {"made": "container"}})
    machine.roots.close()
    machine.guest.allowed = True
    machine.open()
    (source / "new").mkdir()
    machine.roots.require(str(source / "new"), read_only=True)
    machine.barrier()
    machine.barrier()
    assert read(source / "new") == {"made": "container"}


def test_rules_that_cannot_be_read_are_named(machine: Machine, source: Path) -> None:
    (source / ".wherryignore").write_bytes(b"\xff\xfe")
    with pytest.raises(WherryError, match=r"\.wherryignore cannot be read"):
        machine.roots.require(str(source))
    (source / ".wherryignore").unlink()
    machine.roots.require(str(source / "in"))
    (source / "in" / ".wherryignore").write_text("fine\n!\n")
    with pytest.raises(WherryError, match=r"src/in: \.wherryignore, line 2"):
        machine.roots.require(str(source))


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("how", ["settings", "file"])
def test_what_is_each_side_s_own_stays_so_in_a_root_around_it(
    how: str, ended: bool, machine: Machine, source: Path
) -> None:
    inner, there = source / "in", machine.guest.tree(Place("", str(source / "in")))
    write(source, {"own": "not in the inner one"})
    write(inner, {"own": "host's", "deep": {"own": {"h": "host's"}}})
    if how == "settings":
        machine.roots.ignore(str(inner), ["own"])
    else:
        (inner / ".wherryignore").write_text("own\n")
    machine.roots.require(str(inner))
    # A file among them has no rules.
    machine.roots.require(str(source / "f"))
    machine.barrier()
    write(there, {"own": "guest's", "deep": {"own": {"g": "guest's"}}})
    if ended:
        machine.roots.release([], [], idle_s=-1)
        machine.roots.close()
        machine.open()
    host, guest = read(inner), read(there)
    outer = machine.roots.require(str(source))
    machine.barrier()
    machine.barrier()
    assert (read(inner), read(there), outer.status().conflicts) == (host, guest, 0)
    assert (there.parent / "own").read_text() == "not in the inner one"
    assert machine.roots.require(str(source)) is outer
    with pytest.raises(WherryError, match="in/own is ignored"):
        machine.roots.require(str(inner / "own"))


def test_what_a_root_leaves_out_cannot_be_mounted_in_it(
    machine: Machine, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, {".wherryignore": "dist/\n", "dist": {"page": "p"}, "away": "->/", "drive": {}})
    write(source, {"to": {"in": "->../in", "dist": "->../dist", "self": "->.."}})
    outer = machine.roots.require(str(source))
    for inside in ("in", "in/g", "to/in", "to/in/g", "to/self", "missing/dist"):
        assert machine.roots.require(str(source / inside)) is outer
    for inside, reason in (
        ("dist", r"dist is ignored, by \.wherryignore"),
        ("dist/page", r"dist is ignored, by \.wherryignore"),
        ("to/dist", r"dist is ignored, by \.wherryignore"),
        ("away", "away is a link that leads out of it"),
        ("away/tmp", "away is a link that leads out of it"),
    ):
        with pytest.raises(WherryError, match=f"{inside} cannot be mounted while .*: .*{reason}"):
            machine.roots.require(str(source / inside))
    status = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        """As if another filesystem were mounted at one of the directories."""
        found = status(path)
        if path.name == "drive":
            return os.stat_result((*found[:2], found.st_dev + 1, *found[3:]))
        return found

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(WherryError, match="drive is on another filesystem"):
        machine.roots.require(str(source / "drive"))
    monkeypatch.undo()
    # The user takes the line back, which holds from the next command on.
    (source / ".wherryignore").write_text("")
    session = machine.roots.require(str(source / "dist"))
    assert session.root.path == source
    hold([session], fresh=True)
    assert machine.copy(source / "dist") == {"page": "p"}


def test_a_link_that_leads_in_a_circle_cannot_be_mounted(machine: Machine, source: Path) -> None:
    """A container has made it of a directory that another one mounts."""
    machine.roots.require(str(source))
    (source / "circle").symlink_to("in/back")
    (source / "in" / "back").symlink_to("../circle")
    for inside in ("circle", "circle/f", "in/back"):
        with pytest.raises(WherryError, match="is a link that leads in a circle"):
            machine.roots.require(str(source / inside))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no watch is relied on")
def test_a_disk_that_is_mounted_in_a_root_later_is_named(machine: Machine, source: Path) -> None:
    at = source / "in" / "disk"
    at.mkdir()
    session = machine.roots.require(str(source))
    machine.barrier()
    # At rest: no round that would look at it anyway is due.
    machine.barrier()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", at], check=False)
    if done.returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        (at / "input").write_text("1,2,3")
        with pytest.raises(WherryError, match=r"in/disk cannot be brought.*another filesystem"):
            hold([session], fresh=True)
    finally:
        subprocess.run(["umount", "-l", at], check=True)
    (at / "input").write_text("4,5,6")
    machine.barrier()
    assert machine.copy(source) == read(source)


def test_what_wherry_keeps_is_never_sent(machine: Machine, tmp_path: Path) -> None:
    user, link = tmp_path / "user", tmp_path / "link"
    rules = "!/.local/\n!w/\n!key\n"
    write(user, {".local": {"w": {"key": "private"}, "w2": "2"}, ".wherryignore": rules})
    link.symlink_to(user)
    for path in (user, link):
        session = machine.roots.require(str(path))
        machine.barrier()
        assert machine.copy(path) == {".local": {"w2": "2"}, ".wherryignore": rules}
        assert machine.roots.require(str(path)) is session
    for path in (user / ".local" / "w", user / ".local" / "w" / "key", link / ".local" / "w"):
        with pytest.raises(WherryError, match=r"w.* cannot be mounted: in .*w is what wherry"):
            machine.roots.require(str(path))


def test_a_list_of_roots_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "roots.json").write_text("{")
    with pytest.raises(WherryError, match=r"roots\.json cannot be read"):
        Roots(tmp_path, tmp_path / "sync.db", None, boot="b")  # type: ignore[arg-type]
