"""Names and kinds of files, in whole rounds between two ends that can hold all of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from sync_pair import Pair


def deep(length: int) -> str:
    """A path of so many bytes, of names as long as they may be."""
    names = []
    while length > 0:
        names.append("n" * min(length, 200))
        length -= 201
    return "/".join(names)


NAMES = {
    "new line": "a\nb",
    "tabs and bells": "a\tb\x07",
    "blanks": " a  b ",
    "dots": "...",
    "a trailing dot": "a.",
    "a backslash": "a\\b",
    "quotes": "'\"`$(x)",
    "a star": "*?[a]",
    "a dash": "-rf",
    "a device of Windows": "con",
    "a colon": "C:",
    "composed": "é",
    "decomposed": "e\u0301",
    "wide": "日本語" * 28,
    "emoji": "👩‍👩‍👧‍👦",
    "right to left": "\u202eabc",
    "as long as may be": "x" * 255,
    "a path of 400 bytes": deep(400),
    "a path of 3000 bytes": deep(3000),
    "a hundred directories": "/".join("d" * 100),
    "a name like ours": "journal",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("from_host", [True, False])
def test_a_name_travels_and_is_edited_renamed_and_removed(
    pair: Pair, name: str, from_host: bool
) -> None:
    one, other = (pair.host, pair.guest) if from_host else (pair.guest, pair.host)
    (one / "stays").write_text("s")
    path = one / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("first")
    outcome = pair.settle()
    assert outcome.problems == outcome.failed == []
    assert (other / name).read_text() == "first"
    (other / name).write_text("second")
    pair.settle()
    assert path.read_text() == "second"
    path.rename(one / "renamed")
    pair.restart()
    pair.settle()
    assert not (other / name).exists()
    assert (other / "renamed").read_text() == "second"
    (other / "renamed").unlink()
    pair.settle()
    assert pair.trees()[0] == pair.trees()[1]


@pytest.mark.parametrize("from_host", [True, False])
def test_18_a_name_that_is_not_utf8_is_reported_and_stays(pair: Pair, from_host: bool) -> None:
    one, other = (pair.host, pair.guest) if from_host else (pair.guest, pair.host)
    directory = os.fsencode(one / "d")
    (one / "d").mkdir()
    with open(directory + b"/caf\xe9", "wb") as file:  # noqa: PTH123 - no name of a Path
        file.write(b"latin")
    (one / "d" / "plain").write_text("p")
    outcome = pair.settle()
    assert [problem.path for problem in outcome.problems] == ["d/caf\\udce9"]
    assert [path.name for path in (other / "d").iterdir()] == ["plain"]
    # The other side deletes the directory: what it has never seen stays.
    (other / "x").write_text("")
    shutil.rmtree(other / "d")
    pair.settle()
    assert os.listdir(directory) == [b"caf\xe9"]  # noqa: PTH208


LINKS = {
    "relative": "f",
    "up": "../outside",
    "absolute": "/etc/passwd",
    "dangling": "nowhere/at/all",
    "itself": "itself",
    "of 4000 bytes": "x/" * 2000,
    "to a directory": "d",
    "with a new line": "a\nb",
    "not UTF-8": os.fsdecode(b"\xff\xfe"),
}


@pytest.mark.parametrize("target", LINKS.values(), ids=LINKS.keys())
@pytest.mark.parametrize("from_host", [True, False])
def test_22_a_link_travels_as_it_is_and_leads_nowhere(
    pair: Pair, target: str, from_host: bool
) -> None:
    one, other = (pair.host, pair.guest) if from_host else (pair.guest, pair.host)
    outside = pair.directory / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (one / "d").mkdir()
    (one / "d" / "f").write_text("f")
    (one / "link").symlink_to(target)
    assert pair.settle().problems == []
    assert os.readlink(other / "link") == target  # noqa: PTH115 - bytes that are no UTF-8
    (other / "link").unlink()
    (other / "link").symlink_to("d")
    pair.settle()
    assert (one / "link").readlink() == Path("d")
    (one / "link").unlink()
    (one / "link").mkdir()
    (one / "link" / "f").write_text("no link any more")
    pair.settle()
    assert not (other / "link").is_symlink()
    assert (other / "link" / "f").read_text() == "no link any more"
    assert (outside / "secret").read_text() == "secret"


def test_22_a_directory_that_becomes_a_link_does_not_take_its_files_along(pair: Pair) -> None:
    """The host replaces a directory by a link to another: nothing is written through it."""
    (pair.host / "d").mkdir()
    (pair.host / "d" / "f").write_text("f")
    pair.settle()
    target = pair.directory / "elsewhere"
    target.mkdir()
    (target / "f").write_text("theirs")
    (pair.guest / "d" / "f").write_text("an edit that meets a link")
    shutil.rmtree(pair.host / "d")
    (pair.host / "d").symlink_to(target)
    pair.settle()
    assert (target / "f").read_text() == "theirs"
    assert sorted(os.listdir(target)) == ["f"]  # noqa: PTH208
    assert (pair.guest / "d").is_symlink()
    assert "an edit that meets a link" in pair.saved()


@pytest.mark.parametrize("from_host", [True, False])
def test_29_a_sparse_file_and_an_empty_one(pair: Pair, from_host: bool) -> None:
    one, other = (pair.host, pair.guest) if from_host else (pair.guest, pair.host)
    (one / "empty").write_bytes(b"")
    with (one / "sparse").open("wb") as file:
        file.truncate(3_000_000)
        file.seek(2_000_000)
        file.write(b"data")
    pair.settle()
    assert (other / "empty").read_bytes() == b""
    found = (other / "sparse").read_bytes()
    assert len(found) == 3_000_000
    assert found.strip(b"\0") == b"data"
    (other / "sparse").write_bytes(b"")
    pair.settle()
    assert (one / "sparse").stat().st_size == 0


def test_28_times_come_along_so_make_has_nothing_to_do(pair: Pair) -> None:
    (pair.host / "source.c").write_text("1")
    (pair.host / "object.o").write_text("2")
    os.utime(pair.host / "source.c", ns=(10**18, 10**18 + 1))
    os.utime(pair.host / "object.o", ns=(10**18, 10**18 + 2))
    pair.settle()
    times = [(pair.guest / name).stat().st_mtime_ns for name in ("source.c", "object.o")]
    assert times == [10**18 + 1, 10**18 + 2]


def test_45_a_directory_with_much_in_it_is_renamed(pair: Pair) -> None:
    for number in range(300):
        path = pair.host / "d" / str(number % 10) / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    (pair.host / "empty").mkdir()
    pair.settle()
    (pair.host / "empty").rmdir()
    (pair.host / "d").rename(pair.host / "empty")
    (pair.guest / "d" / "0" / "late").write_text("written while it was renamed")
    pair.settle()
    assert pair.trees()[0] == pair.trees()[1]
    assert (pair.host / "empty" / "9" / "299").read_text() == "299"
    assert (pair.host / "d" / "0" / "late").read_text() == "written while it was renamed"
