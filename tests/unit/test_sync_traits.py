"""What is found out of a host's filesystem, of fake ones that take no notice of case."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from wherry.sync.roots import traits_of

Fold = Callable[..., None]


@pytest.fixture
def fold(monkeypatch: pytest.MonkeyPatch) -> Fold:
    """Return what has names in some directories, and in no others, found in any case."""
    folded: set[Path] = set()
    stat = Path.stat

    def found(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        try:
            return stat(path, follow_symlinks=follow_symlinks)
        except FileNotFoundError:
            if path.parent in folded:
                for name in os.listdir(path.parent):  # noqa: PTH208
                    if name.lower() == path.name.lower():
                        return stat(path.parent / name, follow_symlinks=follow_symlinks)
            raise

    # Path.lstat and Path.exists go by this one.
    monkeypatch.setattr(Path, "stat", found)
    return lambda *paths: folded.update(paths)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root whose own name has no letters, in a directory whose name has some."""
    path = tmp_path / "data" / "2024"
    path.mkdir(parents=True)
    return path


def test_a_name_without_letters_says_nothing(root: Path, fold: Fold) -> None:
    (root / "0").mkdir()
    (root / "readme").touch()
    fold(root, root.parent)
    assert not traits_of(root).case_sensitive


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_in_a_root_counts_for_more_than_its_name(
    tmp_path: Path, fold: Fold, inside: bool
) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    (root / "readme").touch()
    fold(root if inside else tmp_path)
    assert traits_of(root).case_sensitive is not inside


def test_of_an_empty_root_its_name_is_asked(tmp_path: Path, fold: Fold) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    assert traits_of(root).case_sensitive
    fold(tmp_path)
    assert not traits_of(root).case_sensitive


@pytest.mark.parametrize("neighbour", [True, False])
def test_of_an_empty_root_without_letters_what_is_nearest_is_asked(
    root: Path, fold: Fold, neighbour: bool
) -> None:
    if neighbour:
        (root.parent / "notes").touch()
    fold(root.parent if neighbour else root.parent.parent)
    assert not traits_of(root).case_sensitive
    assert sorted(os.listdir(root)) == []  # noqa: PTH208


def test_a_file_s_own_name_is_asked(tmp_path: Path, fold: Fold) -> None:
    path = tmp_path / "notes"
    path.touch()
    assert traits_of(path).case_sensitive
    fold(tmp_path)
    assert not traits_of(path).case_sensitive


def test_above_what_is_missing_the_nearest_is_asked(root: Path, fold: Fold) -> None:
    (root / "readme").touch()
    fold(root)
    assert not traits_of(root / "to" / "come").case_sensitive


def test_two_names_of_one_file_are_two(root: Path) -> None:
    (root / "readme").touch()
    (root / "README").hardlink_to(root / "readme")
    assert traits_of(root).case_sensitive


def test_a_link_that_leads_nowhere_has_a_name_as_well(root: Path, fold: Fold) -> None:
    (root / "link").symlink_to("nowhere")
    fold(root)
    assert not traits_of(root).case_sensitive


def test_what_cannot_be_listed_is_passed_over(
    root: Path, fold: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def scandir(path: Path) -> object:
        if path == root:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    (root / "readme").touch()
    monkeypatch.setattr(os, "scandir", scandir)
    fold(root.parent.parent)
    assert not traits_of(root).case_sensitive


def test_letters_that_only_some_filesystems_fold_say_nothing(tmp_path: Path, fold: Fold) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    (root / "日本").touch()
    (root / "ß").touch()
    fold(tmp_path)
    assert not traits_of(root).case_sensitive
