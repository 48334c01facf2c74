"""What changes in the guest while no container may write: it never comes to the host by itself."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sync_pair import Crash, Oldest, Pair, scratch
from sync_trees import read, write

from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.core.withhold import REASON
from wherry_sync.operation import FAILED, Result

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="directory descriptors")


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two sides that are equal, with a container that mounts them to read."""
    place = scratch()
    found = Pair(place)
    write(found.host, {"f": "1", "g": "1", "d": {"a": "1", "b": "1"}, "x": {"y": {"z": "1"}}})
    found.cycle.writes = False
    found.settle()
    yield found
    found.close()
    shutil.rmtree(place)


def let_write(pair: Pair) -> None:
    """Do what happens before a container starts that may write."""
    pair.cycle.writes = pair.cycle.first = True
    pair.run()
    tick(pair.directory)


def tick(place: Path) -> None:
    """Wait until the filesystem's clock goes on, as it has when a container is up."""
    probe = place / "probe"
    probe.touch()
    before = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == before:
        time.sleep(0.001)
        probe.chmod(0o600)


def rewrite(path: Path) -> None:
    """Write what is in a file already."""
    path.write_bytes(path.read_bytes())


def refuse(point: str) -> None:
    """Have a round fail before it has done anything."""
    if point == "begin":
        raise OSError("the disk is full")


BEFORE: dict[str, object] = {
    "f": "1",
    "g": "1",
    "d": {"a": "1", "b": "1"},
    "x": {"y": {"z": "1"}},
}


def disturb(guest: Path) -> None:
    """Change the guest in all ways, as a shell there does."""
    (guest / "f").write_text("other")
    (guest / "g").chmod(0o755)
    (guest / "d/a").unlink()
    (guest / "new").write_text("other")
    (guest / "made/in").mkdir(parents=True)
    (guest / "made/in/it").write_text("other")
    shutil.rmtree(guest / "x/y")
    (guest / "x/y").write_text("other")


@pytest.mark.parametrize("again", [False, True])
def test_it_stays_when_a_container_may_write(pair: Pair, again: bool) -> None:
    disturb(pair.guest)
    if again:
        pair.settle()
        tick(pair.directory)
        rewrite(pair.guest / "f")
    disturbed = read(pair.guest)
    let_write(pair)
    for _ in range(2):
        outcome = pair.settle()
        assert pair.trees() == (BEFORE, disturbed)
        assert {each.reason for each in outcome.unequal} == {REASON}
        assert not list(outcome.lacked_by(HOST))
        pair.restart()
    (pair.guest / "w").write_text("container")
    pair.settle()
    assert pair.trees() == ({**BEFORE, "w": "container"}, {**disturbed, "w": "container"})
    assert pair.saved() == set()


@pytest.mark.parametrize("restarted", [False, True])
def test_what_a_container_writes_again_comes(pair: Pair, restarted: bool) -> None:
    """With the same contents too: a build that ends is to be on the host."""
    disturb(pair.guest)
    let_write(pair)
    if restarted:
        pair.restart()
    for name in ("f", "new", "x/y"):
        rewrite(pair.guest / name)
    (pair.guest / "g").chmod(0o755)
    (pair.guest / "made/in/own").write_text("container")
    pair.settle()
    assert read(pair.host) == {
        "f": "other",
        "g": "1*",
        "new": "other",
        "d": {"a": "1", "b": "1"},
        # Not what others wrote beside it.
        "made": {"in": {"own": "container"}},
        "x": {"y": "other"},
    }
    # It is nothing special any more.
    for name in ("f", "new"):
        (pair.guest / name).unlink()
    pair.settle()
    assert not {"f", "new"} & read(pair.host).keys()


def test_what_is_deleted_with_its_directory_takes_along_what_was_deleted(pair: Pair) -> None:
    (pair.guest / "d/a").unlink()
    let_write(pair)
    pair.settle()
    assert read(pair.host) == BEFORE
    shutil.rmtree(pair.guest / "d")
    pair.settle()
    assert "d" not in read(pair.host)


@pytest.mark.parametrize("contents", ["1", "container"], ids=["as before", "other"])
def test_what_was_deleted_and_is_made_and_deleted_again_is_deleted(
    pair: Pair, contents: str
) -> None:
    (pair.guest / "f").unlink()
    let_write(pair)
    (pair.guest / "f").write_text(contents)
    # One round is enough to see whose it is now.
    pair.run()
    (pair.guest / "f").unlink()
    pair.settle()
    assert "f" not in read(pair.host)


def test_what_was_there_before_it_was_mounted_does_not_come() -> None:
    place = scratch()
    pair = Pair(place)
    (pair.guest / "other").write_text("other")
    pair.cycle.writes = False
    pair.settle()
    assert pair.trees() == ({}, {"other": "other"})
    pair.close()
    shutil.rmtree(place)


def test_a_single_file_stays_so_too() -> None:
    place = scratch()
    pair = Pair(place, file=True)
    for root in (pair.host, pair.guest):
        root.write_text("1")
    pair.cycle.writes = False
    pair.settle()
    pair.guest.write_text("other")
    let_write(pair)
    pair.settle()
    assert (pair.host.read_text(), pair.guest.read_text()) == ("1", "other")
    rewrite(pair.guest)
    pair.settle()
    assert pair.host.read_text() == "other"
    pair.close()
    shutil.rmtree(place)


@pytest.mark.parametrize("crash", [None, *range(30)])
def test_what_the_host_changes_of_it_is_not_a_container_s(pair: Pair, crash: int | None) -> None:
    """A new executable bit comes to contents that stay, and the other way round."""
    (pair.guest / "f").write_text("other")
    (pair.guest / "g").chmod(0o755)
    let_write(pair)
    pair.settle()
    (pair.host / "f").chmod(0o755)
    (pair.host / "g").write_text("2")
    if crash is not None:
        pair.fuse.left = crash
        try:
            pair.run()
        except Crash:
            pass
        pair.restart()
    for _ in range(2):
        pair.settle()
        host, guest = pair.trees()
        assert (host["f"], host["g"]) == ("1*", "2")
        assert (guest["f"], guest["g"]) == ("other*", "2*")
    rewrite(pair.guest / "f")
    pair.settle()
    assert read(pair.host)["f"] == "other*"


def test_a_conflict_with_it_is_one(pair: Pair) -> None:
    (pair.guest / "f").write_text("other")
    let_write(pair)
    (pair.host / "f").write_text("host")
    pair.settle()
    assert pair.trees()[1]["f"] == pair.trees()[0]["f"] == "host"
    assert pair.saved() == {"other"}
    tick(pair.directory)
    (pair.guest / "f").write_text("container")
    pair.settle()
    assert read(pair.host)["f"] == "container"


@pytest.mark.parametrize("withheld", [False, True])
def test_what_a_container_wrote_is_owed_to_the_host(pair: Pair, withheld: bool) -> None:
    """Also when it is gone before anything could come, and somebody else mounts it to read."""
    if withheld:
        (pair.guest / "d/a").write_text("other")
    let_write(pair)
    (pair.guest / "f").write_text("container")
    pair.restart()
    pair.cycle.writes = False
    pair.fuse.action = refuse
    with pytest.raises(OSError, match="full"):
        pair.run()
    pair.fuse.action = None
    pair.settle()
    assert read(pair.host)["f"] == "container"
    (pair.guest / "f").write_text("other")
    pair.settle()
    assert read(pair.host)["f"] == "container"


def test_stamps_are_of_what_is_on_the_disk(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power would leave another one, and what is then there would be a container's."""
    calls: list[str] = []
    guest = pair.ends[GUEST]
    for name in ("flush", "stamps"):
        original = getattr(guest, name)

        def called(*arguments: object, name: str = name, original: object = original) -> object:
            calls.append(name)
            return original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(guest, name, called)
    disturb(pair.guest)
    let_write(pair)
    assert calls == ["flush", "stamps"]


def test_what_the_guest_lost_of_it_does_not_come(pair: Pair) -> None:
    (pair.guest / "f").write_text("other")
    (pair.guest / "d/a").unlink()
    pair.settle()
    for side in (HOST, GUEST):
        pair.flush(side)
    pair.cycle.writes = False
    pair.lose_power(random.Random(1))
    pair.cycle.first = True
    pair.settle()
    assert read(pair.host) == BEFORE


@pytest.mark.parametrize("mine", [False, True])
def test_what_the_host_has_lost_comes_from_the_guest_again(pair: Pair, mine: bool) -> None:
    """Whether a container wrote it or the host itself, and though no container may write now."""
    if not mine:
        let_write(pair)
    ((pair.host if mine else pair.guest) / "f").write_text("2")
    pair.settle()
    pair.cycle.writes = False
    pair.settle()
    assert pair.store.written() is False
    assert read(pair.host)["f"] == read(pair.guest)["f"] == "2"
    pair.lose_power(Oldest(), HOST)
    assert read(pair.host).get("f") != "2"
    pair.cycle.writes = False
    pair.settle()
    assert read(pair.host)["f"] == "2"


def test_what_one_may_have_written_comes(pair: Pair) -> None:
    """It is not known who it was, and what a container writes has to come."""
    disturb(pair.guest)
    pair.settle()
    disturbed = read(pair.guest)
    pair.cycle.writes = True
    pair.settle()
    assert pair.trees() == (disturbed, disturbed)


def test_what_a_container_writes_right_after_the_host_comes(pair: Pair) -> None:
    """A program that watches a file is there within milliseconds."""
    (pair.guest / "f").write_text("other")
    (pair.guest / "g").unlink()
    let_write(pair)
    pair.settle()
    (pair.host / "f").chmod(0o755)
    (pair.host / "g").write_text("2")
    pair.run()
    assert read(pair.guest)["g"] == "2"
    tick(pair.directory)
    rewrite(pair.guest / "f")
    (pair.guest / "g").unlink()
    pair.settle()
    assert (read(pair.host)["f"], "g" in read(pair.host)) == ("other*", False)


def test_an_empty_directory_is_a_container_s_that_made_it_anew(pair: Pair) -> None:
    """The filesystem may give it the inode of the one that was there."""
    (pair.guest / "build").mkdir()
    (pair.guest / "build/x").write_text("other")
    let_write(pair)
    pair.settle()
    shutil.rmtree(pair.guest / "build")
    (pair.guest / "build").mkdir()
    pair.settle()
    assert read(pair.host)["build"] == {}


@pytest.mark.parametrize("where", ["d/a", "d/new", "d/sub/new"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_directory_that_the_host_removes_does_not_come_back_for_what_is_in_it(
    pair: Pair, where: str, renamed: bool
) -> None:
    (pair.guest / where).parent.mkdir(exist_ok=True)
    (pair.guest / where).write_text("other")
    let_write(pair)
    pair.settle()
    if renamed:
        (pair.host / "d").rename(pair.host / "e")
    else:
        shutil.rmtree(pair.host / "d")
    for _ in range(2):
        pair.settle()
        host, guest = pair.trees()
        assert "d" not in host
        assert (pair.guest / where).read_text() == "other"
        if renamed:
            assert host["e"] == guest["e"] == {"a": "1", "b": "1"}
    (pair.guest / "d/c").write_text("container")
    pair.settle()
    assert read(pair.host)["d"] == {"c": "container"}


def test_a_file_that_a_container_puts_where_the_host_removed_a_directory_comes(pair: Pair) -> None:
    (pair.guest / "d/a").write_text("other")
    let_write(pair)
    pair.settle()
    shutil.rmtree(pair.host / "d")
    pair.settle()
    shutil.rmtree(pair.guest / "d")
    (pair.guest / "d").write_text("container")
    pair.settle()
    assert read(pair.host)["d"] == "container"


def test_what_the_guest_refuses_is_not_owed_to_the_host(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_write(pair)
    (pair.host / "big").write_text("big")
    monkeypatch.setattr(
        pair.ends[GUEST],
        "build",
        lambda operations, contents, **_: [Result(each, FAILED, "full") for each in operations],
    )
    pair.cycle.writes = False
    pair.run()
    (pair.guest / "f").write_text("other")
    pair.run()
    assert read(pair.host) == {**BEFORE, "big": "big"}


PATHS = ("a", "b", "d/a", "d/b", "d/e/a", "d/e", "d")
paths = st.sampled_from(PATHS)


class Model(RuleBasedStateMachine):
    """People, containers that may write at times, and others in the guest when they may not.

    What others write holds an ``o``. It is never on the host unless a container wrote it again.
    What a container wrote is there, unless somebody has changed that since.
    """

    @initialize()
    def start(self) -> None:
        self.pair = Pair(scratch())
        self.pair.cycle.writes = False
        self.pair.run()
        self.count = 0
        self.again: set[str] = set()
        self.owed: dict[str, str] = {}

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        try:
            self.settle()
        finally:
            self.pair.close()
            shutil.rmtree(self.pair.directory)

    def value(self, who: str) -> str:
        self.count += 1
        return f"{who}{self.count}."

    def edit(self, side: int, where: str, kind: str, value: str) -> None:
        root = (self.pair.host, self.pair.guest)[side]
        path = root / where
        for parent in reversed(path.relative_to(root).parents[:-1]):
            if (root / parent).is_file():
                (root / parent).unlink()
            (root / parent).mkdir(exist_ok=True)
        self.touched(where)
        if kind == "append" and path.is_file():
            with path.open("a") as file:
                file.write(value)
            return
        if kind == "chmod" and path.is_file():
            path.chmod(path.stat().st_mode ^ 0o111)
            return
        if path.is_dir() and kind != "directory":
            shutil.rmtree(path)
        if kind == "directory":
            path.unlink(missing_ok=True) if path.is_file() else None
            path.mkdir(exist_ok=True)
        elif kind == "delete":
            path.unlink(missing_ok=True)
        elif kind == "replace":
            new = root / ".wherry-new"
            new.write_text(value)
            new.rename(path)
        else:
            path.write_text(value)

    def touched(self, where: str) -> None:
        """Note that who wrote there last was not a container."""
        for path in list(self.owed):
            if f"{path}/".startswith(f"{where}/") or f"{where}/".startswith(f"{path}/"):
                del self.owed[path]

    @rule(where=paths, kind=st.sampled_from(["write", "replace", "append", "chmod", "delete"]))
    def somebody_edits_on_the_host(self, where: str, kind: str) -> None:
        self.edit(HOST, where, kind, self.value("h"))

    @precondition(lambda self: self.pair.cycle.writes)
    @rule(where=paths, kind=st.sampled_from(["write", "replace", "directory", "delete"]))
    def a_container_writes(self, where: str, kind: str) -> None:
        value = self.value("c")
        self.edit(GUEST, where, kind, value)
        if kind in ("write", "replace"):
            self.owed[where] = value

    @precondition(lambda self: self.pair.cycle.writes)
    @rule(where=paths)
    def a_container_writes_what_is_there(self, where: str) -> None:
        path = self.pair.guest / where
        value = path.read_text() if path.is_file() else ""
        if "o" in value and value not in self.again:
            self.edit(GUEST, where, "write", value)
            self.owed[where] = value
            self.again.add(value)

    @precondition(lambda self: self.pair.store.written() is False and not self.pair.cycle.writes)
    @rule(
        where=paths,
        kind=st.sampled_from(["write", "replace", "append", "chmod", "directory", "delete"]),
    )
    def others_write_in_the_guest(self, where: str, kind: str) -> None:
        self.edit(GUEST, where, kind, self.value("o"))

    @rule(writes=st.booleans())
    def containers_come_and_go(self, writes: bool) -> None:
        if writes:
            let_write(self.pair)
        self.pair.cycle.writes = writes

    @rule(moment=st.none() | st.integers(0, 40))
    def round(self, moment: int | None) -> None:
        writes = self.pair.cycle.writes
        self.pair.fuse.left = moment
        try:
            self.pair.run()
        except Crash:
            pass
        if moment is not None:
            self.pair.restart()
            self.pair.cycle.writes = writes

    @rule()
    def settle(self) -> None:
        self.pair.settle()
        host = files(self.pair.host)
        for path, value in host.items():
            # The host may have gone on with it.
            alone = [each for each in others(value) if each not in others("".join(self.again))]
            assert not alone, (path, value)
        missing = {path: value for path, value in self.owed.items() if host.get(path) != value}
        saved = self.pair.saved()
        assert all(value in saved for value in missing.values()), (missing, host)


def others(value: str) -> list[str]:
    """Return what of a file's contents others have written."""
    return [each for each in value.split(".") if each.startswith("o")]


def files(root: Path) -> dict[str, str]:
    """Return the contents of all files by path."""
    return {
        os.fspath(path.relative_to(root)): path.read_text()
        for path in root.rglob("*")
        if path.is_file()
    }


TestModel = Model.TestCase
TestModel.settings = (
    settings(max_examples=40, stateful_step_count=40, deadline=None)
    if settings.get_current_profile_name() == "default"
    else settings(deadline=None)
)
