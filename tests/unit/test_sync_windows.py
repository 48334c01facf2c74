"""A host that is Windows, or macOS: names that it takes for one, names that it has not, locks.

Whole rounds, with files on a disk that does what Windows does; see :mod:`windows_files`.
"""

from __future__ import annotations

import os
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
    pair.files.held.clear()
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
    pair.files.read_only.clear()
    pair.settle()
    assert pair.trees()[0] == pair.trees()[1]
    assert (pair.host / "log").exists() == (what == "edit")


@pytest.mark.parametrize(
    ("becomes", "remains"),
    # A directory that could not be given another case keeps the one that it has.
    [("e", "e"), ("D", "d"), (None, None)],
)
def test_36_a_directory_around_a_file_that_a_program_holds(
    pair: Windows, becomes: str | None, remains: str | None
) -> None:
    """Nothing is lost, the file is named, and it heals when the program lets go."""
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
    pair.files.held.clear()
    outcome = pair.settle()
    assert outcome.problems == outcome.failed == []
    kept = [] if remains is None else [remains, f"{remains}/free", f"{remains}/held"]
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
    pair.files.held.clear()
    (pair.host / "HELD.tmp").replace(pair.host / "held")
    pair.files.held.add("held")
    outcome = pair.settle()
    assert [(problem.path, problem.reason) for problem in outcome.problems] == [
        ("held", "it is used by another program")
    ]
    assert (pair.guest / "held").read_text() == "1"
    pair.files.held.clear()
    pair.settle()
    assert (pair.guest / "held").read_text() == "2"
