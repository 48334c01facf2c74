"""Which roots there are, and what is left of them between two lives of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sync_guest import Guest, Stream
from sync_trees import read

from wherry.core.errors import WherryError
from wherry.sync.barrier import hold
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.core.store import Store
from wherry.sync.remote import Place, RemoteEndpoint
from wherry.sync.roots import Roots

pytestmark = pytest.mark.timeout(60)


class Machine:
    """Its roots, over and over again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.guest = Guest(directory / "guest")
        self.open()

    def open(self) -> None:
        self.roots = Roots(
            self.directory / "sync",
            self.directory / "sync.db",
            lambda place, ordered, progress: RemoteEndpoint(
                Stream(self.guest.connect()), place, ordered=ordered, progress=progress
            ),
            boot="host-1",
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


def test_changes_while_nothing_ran_are_told_apart_from_loss(machine: Machine, source: Path) -> None:
    machine.roots.require(str(source))
    machine.barrier()
    machine.roots.close()
    with closing(Store(machine.directory / "sync.db", 1)) as store:
        # Our own end was in order; the guest's is not known yet.
        assert (store.boot(HOST), store.boot(GUEST) != "") == ("", True)
    machine.roots.guest_ended()
    with closing(Store(machine.directory / "sync.db", 1)) as store:
        assert store.boot(GUEST) == ""
    (source / "f").unlink()
    (source / "in" / "new").write_text("n")
    machine.open()
    machine.roots.require(str(source))
    machine.barrier()
    assert machine.copy(source) == read(source) == {"in": {"g": "g", "new": "n"}}


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


def test_rules_that_cannot_be_read_are_named(machine: Machine, source: Path) -> None:
    (source / ".wherryignore").write_bytes(b"\xff\xfe")
    with pytest.raises(WherryError, match=r"\.wherryignore cannot be read"):
        machine.roots.require(str(source))


def test_a_list_of_roots_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "roots.json").write_text("{")
    with pytest.raises(WherryError, match=r"roots\.json cannot be read"):
        Roots(tmp_path, tmp_path / "sync.db", None, boot="b")  # type: ignore[arg-type]
