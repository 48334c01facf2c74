"""A host that is Windows, or macOS: names that it takes for one, names that it has not, locks.

Whole rounds, with files on a disk that does what Windows does; see :mod:`windows_files`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sync_pair import Pair, scratch
from windows_files import WindowsFiles, apfs, ntfs

from wherry.sync.core.traits import Traits

WINDOWS = Traits(case_sensitive=False, windows_names=True, links=False, executable=False)


class Windows(Pair):
    """A host that is Windows, and a guest."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(directory, traits=WINDOWS)
        self.files = WindowsFiles(self.host, patch)

    def release(self) -> None:
        """Let all programs close what they hold."""
        self.files.held.clear()
        self.files.read_only.clear()

    def names(self) -> tuple[list[str], list[str]]:
        """All paths on both sides."""
        found = []
        for root in (self.host, self.guest):
            paths = []
            for directory, names, files in os.walk(root):
                for name in (*names, *files):
                    paths.append(str((Path(directory) / name).relative_to(root)))
            found.append(sorted(paths))
        return found[0], found[1]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Windows]:
    place = scratch()
    with monkeypatch.context() as patch:
        made = Windows(place, patch)
        yield made
        made.close()
    shutil.rmtree(place)


def test_the_fake_is_like_windows(pair: Windows) -> None:
    (pair.host / "Foo").write_text("1")
    assert (pair.host / "fOO").read_text() == "1"
    assert (pair.host / "foo. ").read_text() == "1"
    assert pair.names()[0] == ["Foo"]
    (pair.host / "Foo").rename(pair.host / "foo")
    assert pair.names()[0] == ["foo"]
    (pair.host / "é").write_text("1")
    assert (pair.host / "É").read_text() == "1"
    assert not (pair.host / "e\u0301").exists()
    assert not (pair.host / "foss").exists()
    for name in ("a:b", "con", "NUL.txt", 'say "x"', "com\u00b9.c", "CONIN$"):
        with pytest.raises(OSError, match="not correct"):
            (pair.host / name).write_text("1")
    pair.files.held.add("foo")
    for change in (Path.read_text, Path.unlink, lambda path: path.rename(pair.host / "bar")):
        with pytest.raises(PermissionError):
            change(pair.host / "FOO")
    (pair.host / "d").mkdir()
    (pair.host / "d" / "open").write_text("1")
    pair.files.read_only.add("open")
    assert (pair.host / "d" / "open").read_text() == "1"
    for change in (
        Path.unlink,
        lambda path: path.write_text("2"),
        lambda path: path.open("r+"),
        lambda path: os.open(path, os.O_RDWR),
        lambda path: path.parent.rename(pair.host / "e"),
    ):
        with pytest.raises(PermissionError):
            change(pair.host / "d" / "open")
    pair.files.fold = apfs
    assert (pair.host / "e\u0301").read_text() == "1"


@pytest.mark.parametrize("fold", [ntfs, apfs])
@pytest.mark.parametrize(
    ("one", "other"), [("Foo", "foo"), ("é", "e\u0301"), ("ß", "SS"), ("ǅ", "ǆ")]
)
def test_15_17_twins_in_the_guest(
    pair: Windows, one: str, other: str, fold: Callable[[str], str]
) -> None:
    """What any such host takes for one name is not put on this one."""
    pair.files.fold = fold
    (pair.guest / one).write_text("one")
    (pair.guest / other).write_text("other")
    (pair.guest / "d").mkdir()
    (pair.guest / "d" / "x").write_text("x")
    outcome = pair.settle()
    first = min(one, other)
    second = max(one, other)
    assert pair.names() == (sorted([first, "d", "d/x"]), sorted([one, other, "d", "d/x"]))
    (problem,) = outcome.problems
    assert problem.path == second
    assert "is the same as that of" in problem.reason
    # An edit of either goes where it belongs.
    (pair.guest / second).write_text("an edit that stays in the guest")
    (pair.guest / first).write_text("an edit that travels")
    pair.settle()
    assert (pair.host / first).read_text() == "an edit that travels"
    (pair.host / first).write_text("and back")
    pair.settle()
    assert (pair.guest / first).read_text() == "and back"
    assert (pair.guest / second).read_text() == "an edit that stays in the guest"
    # When the first one is gone, the other has its place.
    (pair.guest / first).unlink()
    outcome = pair.settle()
    assert outcome.problems == []
    assert (pair.host / second).read_text() == "an edit that stays in the guest"
    assert len(pair.names()[0]) == 3
    (pair.guest / second).unlink()
    pair.settle()
    assert pair.names() == (["d", "d/x"], ["d", "d/x"])


@pytest.mark.parametrize(
    ("one", "other"), [("é", "e\u0301"), ("ß", "SS"), ("Makefile", "makefile")]
)
def test_15_names_that_the_host_has_both(pair: Windows, one: str, other: str) -> None:
    """NTFS tells more names apart than APFS, and any in a directory that is made so."""
    pair.files.fold = str
    for side, name in ((pair.host, one), (pair.host, other), (pair.host, "x")):
        (side / name).write_text("1")
    assert not pair.settle().problems
    (pair.host / one).write_text("of the host")
    (pair.guest / other).write_text("of the guest")
    assert not pair.settle().problems
    for side in (pair.host, pair.guest):
        assert (side / one).read_text() == "of the host"
        assert (side / other).read_text() == "of the guest"
    for name, side in ((one, pair.host), (other, pair.guest)):
        (side / name).unlink()
        assert not pair.settle().problems
        assert not (pair.host / name).exists()
        assert not (pair.guest / name).exists()
    assert pair.names() == (["x"], ["x"])


def test_15_directories_that_are_twins(pair: Windows) -> None:
    for name in ("Lib", "lib"):
        (pair.guest / name).mkdir()
        (pair.guest / name / "own").write_text(name)
    outcome = pair.settle()
    assert [problem.path for problem in outcome.problems] == ["lib"]
    assert pair.names()[0] == ["Lib", "Lib/own"]
    assert (pair.host / "Lib" / "own").read_text() == "Lib"
    # Deleted on the host, the guest's other one stays and has the name then.
    shutil.rmtree(pair.host / "Lib")
    (pair.host / "other").write_text("")
    pair.settle()
    assert (pair.guest / "lib" / "own").read_text() == "lib"


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("directory", [True, False])
def test_16_another_case_of_the_same_name(pair: Windows, on_host: bool, directory: bool) -> None:
    if directory:
        (pair.host / "readme").mkdir()
        (pair.host / "readme" / "f").write_text("text")
    else:
        (pair.host / "readme").write_text("text")
    pair.settle()
    side = pair.host if on_host else pair.guest
    (side / "readme").rename(side / "README")
    outcome = pair.settle()
    assert outcome.problems == outcome.failed == []
    names = ["README", "README/f"] if directory else ["README"]
    assert pair.names() == (names, names)
    file = pair.guest / "README" / "f" if directory else pair.guest / "README"
    assert file.read_text() == "text"


@pytest.mark.parametrize(("old", "new"), [("README", "readme"), ("readme", "README")])
def test_16_another_case_on_the_host_of_what_the_guest_has_edited(
    pair: Windows, old: str, new: str
) -> None:
    """It cannot have the old name beside the new one, which says so, and is no endless attempt."""
    (pair.host / old).write_text("1")
    (pair.host / "other").write_text("1")
    pair.settle()
    (pair.host / old).rename(pair.host / new)
    (pair.guest / old).write_text("an edit")
    outcome = pair.settle()
    assert outcome.failed == []
    assert [problem.path for problem in outcome.problems] == [old]
    assert pair.names() == (sorted([new, "other"]), sorted([old, new, "other"]))
    assert (pair.guest / old).read_text() == "an edit"
    (pair.guest / old).replace(pair.guest / new)
    assert pair.settle().problems == []
    assert (pair.host / new).read_text() == "an edit"


class Somebody:
    """Changes names, contents and what is held, on both sides of a pair."""

    def __init__(self, pair: Windows, seed: int) -> None:
        self._pair = pair
        self._choices = random.Random(seed)
        self.log: list[tuple[str, ...]] = []

    def change(self) -> None:
        choices = self._choices
        side = choices.choice((self._pair.host, self._pair.guest))
        there = sorted(side.rglob("*"))
        place = choices.choice([side, *(path for path in there if path.is_dir())])
        path = place / choices.choice(("a", "A", "b", "B", "aa", "aA"))
        some = choices.choice([*there, path])
        what = choices.choice(("write", "write", "mkdir", "case", "case", "move", "remove", "hold"))
        self.log.append((what, str(path), str(some)))
        with contextlib.suppress(OSError):
            if what == "write":
                path.write_text(f"{len(self.log)}")
            elif what == "mkdir":
                path.mkdir()
            elif what == "hold":
                files = self._pair.files
                choices.choice((files.held, files.read_only)).add(some.name)
            elif what == "remove":
                shutil.rmtree(some) if some.is_dir() else some.unlink()
            else:
                target = some.with_name(some.name.swapcase()) if what == "case" else path
                # Nothing is replaced: it would be lost rightly.
                if not target.exists() or (what == "case" and side == self._pair.host):
                    some.rename(target)


@pytest.mark.parametrize("seed", range(100))
def test_15_16_36_any_changes_come_to_rest(pair: Windows, seed: int) -> None:
    """And what is named by no problem is the same on both sides."""
    somebody = Somebody(pair, seed)
    for _ in range(6):
        for _ in range(4):
            somebody.change()
        pair.run()
        pair.run()
        if seed % 2:
            pair.release()
    pair.release()
    (pair.host / "kept").write_text("so that it is not empty")
    outcome = pair.settle(20)
    assert not outcome.failed, somebody.log
    named = [problem.path for problem in outcome.problems]

    def rest(root: Path) -> dict[str, object]:
        return {
            str(path.relative_to(root)): path.is_dir() or path.read_text()
            for path in root.rglob("*")
            if not any(f"{path.relative_to(root)}/".startswith(f"{each}/") for each in named)
        }

    assert rest(pair.host) == rest(pair.guest), somebody.log


@pytest.mark.parametrize(
    "name",
    [
        "a:b",
        "what?",
        "tab\there",
        "line\nbreak",
        "con",
        "aux.c",
        "nul",
        "dot.",
        "blank ",
        "a\\b",
        "COM\u00b9",
        "lpt\u00b3.txt",
        "conin$",
        "CONOUT$.x",
    ],
)
def test_19_names_that_windows_has_not(pair: Windows, name: str) -> None:
    (pair.guest / "d").mkdir()
    (pair.guest / "d" / name).write_text("guest")
    (pair.guest / "d" / "plain").write_text("plain")
    outcome = pair.settle()
    assert [problem.path for problem in outcome.problems] == [f"d/{name}"]
    assert outcome.failed == []
    assert pair.names()[0] == ["d", "d/plain"]
    # Nothing of it is ever taken for a deletion.
    pair.restart()
    pair.settle()
    assert (pair.guest / "d" / name).read_text() == "guest"
    # The directory is deleted on the host: what the host has not known stays.
    (pair.host / "other").write_text("")
    shutil.rmtree(pair.host / "d")
    pair.settle()
    assert (pair.guest / "d" / name).read_text() == "guest"
    assert not (pair.guest / "d" / "plain").exists()


def test_22_links_stay_in_the_guest(pair: Windows) -> None:
    (pair.guest / "f").write_text("f")
    for name, target in (("relative", "f"), ("absolute", "/etc/passwd"), ("up", "../../x")):
        (pair.guest / name).symlink_to(target)
    outcome = pair.settle()
    assert sorted(problem.path for problem in outcome.problems) == ["absolute", "relative", "up"]
    assert pair.names()[0] == ["f"]
    assert (pair.guest / "absolute").readlink() == Path("/etc/passwd")


def test_26_the_executable_bit_is_the_guests(pair: Windows) -> None:
    (pair.guest / "run").write_text("1")
    (pair.guest / "run").chmod(0o755)
    pair.settle()
    (pair.host / "run").write_text("2")
    (pair.host / "run").chmod(0o644)
    pair.settle()
    assert (pair.guest / "run").read_text() == "2"
    assert (pair.guest / "run").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("what", ["edit", "delete"])
def test_36_a_file_that_a_program_holds(pair: Windows, what: str) -> None:
    """It is named, all others go on, and it heals when the program lets go."""
    for name in ("held", "free"):
        (pair.host / name).write_text("1")
    pair.settle()
    pair.files.held.add("held")
    for name in ("held", "free"):
        path = pair.guest / name
        path.write_text("2") if what == "edit" else path.unlink()
    outcome = pair.run()
    assert [(problem.path, problem.reason) for problem in outcome.failed] == [
        ("held", "it is used by another program")
    ]
    outcome = pair.run()
    assert [problem.path for problem in outcome.failed] == ["held"], "as long as it is held"
    assert (pair.host / "free").exists() == (what == "edit")
    pair.release()
    pair.settle()
    assert pair.trees()[0] == pair.trees()[1]
    assert (pair.host / "held").exists() == (what == "edit")
    stage = pair.directory / "host-stage"
    assert [path.name for path in stage.iterdir()] == ["journal"]


@pytest.mark.parametrize("what", ["edit", "delete"])
def test_36_a_file_that_a_program_lets_others_read(pair: Windows, what: str) -> None:
    """What the program writes travels; what the guest does waits until it lets go."""
    (pair.host / "log").write_text("1")
    (pair.host / "other").write_text("1")
    pair.settle()
    (pair.host / "log").write_text("2, of the program")
    pair.files.read_only.add("log")
    outcome = pair.settle()
    assert outcome.problems == outcome.failed == []
    assert (pair.guest / "log").read_text() == "2, of the program"
    (pair.guest / "log").write_text("3") if what == "edit" else (pair.guest / "log").unlink()
    outcome = pair.run()
    assert [(problem.path, problem.reason) for problem in outcome.failed] == [
        ("log", "it is used by another program")
    ]
    assert (pair.host / "log").read_text() == "2, of the program"
    pair.release()
    pair.settle()
    assert pair.trees()[0] == pair.trees()[1]
    assert (pair.host / "log").exists() == (what == "edit")


@pytest.mark.parametrize("becomes", ["e", "D", None])
def test_36_a_directory_around_a_file_that_a_program_holds(
    pair: Windows, becomes: str | None
) -> None:
    """Nothing is lost, the file is named, and it heals when the program lets go.

    A directory that could not be given another case keeps the one that it has, and what could
    not be brought into it is named.
    """
    (pair.host / "d").mkdir()
    for name in ("held", "free"):
        (pair.host / "d" / name).write_text(name)
    (pair.host / "other").write_text("1")
    pair.settle()
    pair.files.held.add("held")
    if becomes is None:
        shutil.rmtree(pair.guest / "d")
    else:
        (pair.guest / "d").rename(pair.guest / becomes)
    outcome = pair.run()
    assert ("d/held", "it is used by another program") in [
        (problem.path, problem.reason) for problem in outcome.failed
    ]
    assert (pair.host / "d" / "held").exists()
    (pair.guest / "new").write_text("goes on")
    pair.run()
    assert (pair.host / "new").read_text() == "goes on"
    pair.release()
    outcome = pair.settle()
    assert outcome.failed == []
    assert [problem.path for problem in outcome.problems] == (["D"] if becomes == "D" else [])
    if becomes == "D":
        assert pair.names()[0] == ["d", "d/free", "new", "other"]
        (pair.guest / "D" / "held").rename(pair.guest / "d" / "held")
        (pair.guest / "D").rmdir()
        becomes = "d"
        assert pair.settle().problems == []
    kept = [] if becomes is None else [becomes, f"{becomes}/free", f"{becomes}/held"]
    assert pair.names() == ([*kept, "new", "other"],) * 2
    for path in kept[1:]:
        assert (pair.host / path).read_text() == Path(path).name


def test_36_a_file_that_cannot_be_read_is_not_taken_for_deleted(pair: Windows) -> None:
    (pair.host / "held").write_text("1")
    pair.settle()
    pair.files.held.add("held")
    (pair.host / "other").write_text("o")
    # Written by the program that holds it, so it has to be read and cannot be.
    (pair.host / "HELD.tmp").write_text("2")
    pair.release()
    (pair.host / "HELD.tmp").replace(pair.host / "held")
    pair.files.held.add("held")
    outcome = pair.settle()
    assert [(problem.path, problem.reason) for problem in outcome.problems] == [
        ("held", "it is used by another program")
    ]
    assert (pair.guest / "held").read_text() == "1"
    pair.release()
    pair.settle()
    assert (pair.guest / "held").read_text() == "2"
