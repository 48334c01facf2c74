"""Random work on both sides, rounds, crashes and losses of power: nothing is lost, all is equal.

Every write has contents of its own, which end with the number of the write. A value may only
disappear when somebody, on either side, overwrites or deletes a file that holds it; or when the
guest loses power before it is anywhere else.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sync_pair import Crash, Pair, scratch
from sync_trees import read

from wherry.sync.core.reconcile import GUEST, HOST

# Few, so that both sides often mean the same one.
PATHS = ("a", "b", "d/a", "d/b", "d/e/a", "d/e", "d")
KINDS = (
    "write",
    "write",
    "replace",
    "append",
    "rename",
    "hard link",
    "link",
    "chmod",
    "directory",
    "delete",
)
# Points between the two halves of a write in place, where no write can be told from ours, but
# names come and go.
IN_PLACE = {"written in place", "truncated"}
RENAMES = ("replace", "rename", "link", "directory", "delete")

sides = st.sampled_from([HOST, GUEST])
paths = st.sampled_from(PATHS)
edits = st.tuples(sides, st.sampled_from(KINDS), paths, paths)
moments = st.integers(0, 40)


def values(directory: Path) -> Iterator[str]:
    """Yield the contents of all files below a directory."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.read_text()


def age(value: object) -> int:
    """Return the number of the last write that a file's contents come from."""
    numbers = re.findall(r"\d+", value) if isinstance(value, str) else []
    return int(numbers[-1]) if numbers else -1


def flat(tree: dict[str, object], prefix: str = "") -> dict[str, str]:
    """Return the files of a tree by path."""
    found: dict[str, str] = {}
    for name, child in tree.items():
        if isinstance(child, dict):
            found |= flat(child, f"{prefix}{name}/")
        elif isinstance(child, str) and not child.startswith("->"):
            found[prefix + name] = child.removesuffix("*")
    return found


class Model(RuleBasedStateMachine):
    """What people, containers and accidents do."""

    @initialize()
    def start(self) -> None:
        self.directory = scratch()
        self.pair = Pair(self.directory)
        self.writes = 0
        self.precious: set[str] = set()
        # An empty file is what a loss of power leaves of one.
        self.written = {""}
        # A host that has lost all of several things at once is not believed: see safety.py.
        (self.pair.host / "kept").write_text(self.value())
        self.pair.settle()
        for side in (HOST, GUEST):
            self.pair.flush(side)

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        try:
            self.pair.fuse.left = None
            self.pair.settle()
            self.check()
        finally:
            self.pair.close()
            shutil.rmtree(self.directory)

    def check(self) -> None:
        """What holds whenever nothing is left to do."""
        host, guest = self.pair.trees()
        assert host == guest
        current = set(values(self.pair.host))
        lost = self.precious - current - self.pair.saved()
        assert not lost, lost
        torn = current - self.written
        assert not torn, torn
        for end in ("host", "guest"):
            left = {path.name for path in (self.directory / f"{end}-stage").iterdir()}
            assert left == {"journal"}

    def value(self) -> str:
        self.writes += 1
        value = f"w{self.writes}."
        self.precious.add(value)
        self.written.add(value)
        return value

    def dismiss(self, path: Path) -> None:
        """Note that somebody removes what is at a path."""
        if path.is_symlink():
            return
        if path.is_dir():
            self.precious -= set(values(path))
        elif path.is_file():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            except BlockingIOError:
                # It is being written in place; nobody has seen what is in it.
                return
            with os.fdopen(descriptor) as file:
                self.precious.discard(file.read())

    def remove(self, path: Path) -> None:
        self.dismiss(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def edit(self, side: int, kind: str, where: str, other: str) -> None:
        """Do one thing on one side; parents are made, whatever is in the way is removed."""
        root = (self.pair.host, self.pair.guest)[side]
        path = root / where
        for parent in reversed(path.relative_to(root).parents[:-1]):
            if (root / parent).is_symlink() or (root / parent).is_file():
                self.remove(root / parent)
            (root / parent).mkdir(exist_ok=True)
        is_file = path.is_file() and not path.is_symlink()
        if kind == "delete":
            self.remove(path)
        elif kind == "directory":
            if not path.is_dir() or path.is_symlink():
                self.remove(path)
                path.mkdir()
        elif kind == "link":
            self.remove(path)
            path.symlink_to(f"../{self.writes}")
            self.writes += 1
        elif kind == "chmod":
            if is_file:
                path.chmod(path.stat().st_mode ^ 0o111)
        elif kind == "append":
            if is_file:
                old = path.read_text()
                self.precious.discard(old)
                with path.open("a") as file:
                    file.write(self.value())
                self.precious.add(path.read_text())
                self.written.add(path.read_text())
                self.precious.discard(f"w{self.writes}.")
        elif kind in ("rename", "hard link"):
            source = root / other
            if source.is_file() and not source.is_symlink() and source != path:
                if path.exists() and path.samefile(source):
                    return
                self.remove(path)
                if not source.exists():
                    return
                (source.rename if kind == "rename" else path.hardlink_to)(
                    path if kind == "rename" else source
                )
        elif kind == "write" and is_file:
            self.dismiss(path)
            path.write_text(self.value())
        else:
            self.remove(path)
            new = root / ".wherry-new"
            new.write_text(self.value())
            new.rename(path)

    @rule(several=st.lists(edits, min_size=1, max_size=6))
    def somebody_edits(self, several: list[tuple[int, str, str, str]]) -> None:
        for edit in several:
            self.edit(*edit)

    @rule(where=st.sampled_from(PATHS[:4]), kinds=st.tuples(*[st.sampled_from(KINDS)] * 2))
    def both_edit(self, where: str, kinds: tuple[str, str]) -> None:
        for side in (HOST, GUEST):
            self.edit(side, kinds[side], where, "b")

    @rule()
    def round(self) -> None:
        self.pair.run()

    @rule(moment=moments)
    def crash_in_a_round(self, moment: int) -> None:
        self.pair.fuse.left = moment
        try:
            self.pair.run()
        except Crash:
            pass
        self.pair.restart()

    @rule(moment=moments, edit=edits)
    def edit_in_a_round(self, moment: int, edit: tuple[int, str, str, str]) -> None:
        left = moment

        def checkpoint(point: str) -> None:
            nonlocal left
            left -= point not in IN_PLACE
            if left == 0 and point not in IN_PLACE:
                self.edit(*edit)

        fuse = self.pair.fuse
        fuse.action = checkpoint
        try:
            self.pair.run()
        finally:
            fuse.action = None

    @rule(
        side=sides,
        where=st.sampled_from(PATHS[:4]),
        kinds=st.tuples(*[st.sampled_from(KINDS)] * 2),
        point=st.sampled_from(["transfer", "exchange", "exchanged", "displace", "create", "chmod"]),
    )
    def both_edit_at_the_last_moment(
        self, side: int, where: str, kinds: tuple[str, str], point: str
    ) -> None:
        """One side edits, and while that is carried out on the other, that one does as well."""
        self.edit(side, kinds[0], where, "b")
        self.run_with(point, lambda: self.edit(1 - side, kinds[1], where, "b"))

    def run_with(self, point: str, action: Callable[[], object]) -> None:
        """Do a round, and something when it is at a point for the first time."""
        due = True

        def checkpoint(now: str) -> None:
            nonlocal due
            if due and now == point:
                due = False
                action()

        self.pair.fuse.action = checkpoint
        try:
            self.pair.run()
        finally:
            self.pair.fuse.action = None

    @rule(
        side=sides,
        where=st.sampled_from(PATHS[:4]),
        kinds=st.tuples(st.sampled_from(["write", "append"]), st.sampled_from(RENAMES)),
        point=st.sampled_from(sorted(IN_PLACE)),
    )
    def the_name_goes_while_it_is_written_in_place(
        self, side: int, where: str, kinds: tuple[str, str], point: str
    ) -> None:
        self.pair.settle()
        self.edit(side, kinds[0], where, "b")
        value = flat(self.pair.trees()[side]).get(where)
        saved = self.precious & {value}

        def rename() -> None:
            self.edit(1 - side, kinds[1], where, "b")
            # Whoever did that has seen the old contents at best.
            self.precious |= saved

        self.run_with(point, rename)

    @rule(side=sides, where=st.sampled_from(PATHS[:4]), moment=moments)
    def crash_in_an_append(self, side: int, where: str, moment: int) -> None:
        self.edit(side, "append", where, where)
        self.crash_in_a_round(moment)

    @rule(side=sides)
    def flush(self, side: int) -> None:
        self.pair.flush(side)

    @rule(moment=st.none() | moments, seed=st.integers(0, 1000))
    def the_guest_loses_power(self, moment: int | None, seed: int) -> None:
        if moment is not None:
            self.pair.fuse.left = moment
            try:
                self.pair.run()
            except Crash:
                pass
        before = flat(read(self.pair.host))
        self.pair.lose_power(random.Random(seed))
        remain = {*values(self.pair.host), *values(self.pair.guest), *self.pair.saved()}
        self.precious &= remain
        self.pair.settle()
        self.check()
        after = flat(read(self.pair.host))
        saved = self.pair.saved()
        for path, value in before.items():
            if path in after:
                assert after[path] == value or age(after[path]) > age(value), (path, value, after)
            else:
                assert value in saved or value in after.values(), (path, value)

    @rule(moment=st.none() | moments, again=st.none() | moments, seed=st.integers(0, 1000))
    def the_host_loses_power(self, moment: int | None, again: int | None, seed: int) -> None:
        """What the guest has survives that, whatever is left on the host."""
        if moment is not None:
            self.pair.fuse.left = moment
            try:
                self.pair.run()
            except Crash:
                pass
        self.pair.lose_power(random.Random(seed), HOST)
        left = set(values(self.pair.host))
        self.precious &= {*left, *values(self.pair.guest), *self.pair.saved()}
        self.written |= left
        if again is not None:
            self.crash_in_a_round(again)
        self.pair.settle()
        self.check()


TestModel = Model.TestCase
TestModel.settings = (
    settings(max_examples=40, stateful_step_count=40, deadline=None)
    if settings.get_current_profile_name() == "default"
    else settings(deadline=None)
)
