"""Trees for the sync's tests, in few letters."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

from wherry_sync.entry import Directory, Entry, Leaf, file, link, untracked
from wherry_sync.hashing import digest

Tree = Mapping[str, object]

FIFO = untracked("not a file, link or directory")


def text(contents: str, *, executable: bool = False) -> Leaf:
    """Return a file's entry."""
    data = contents.encode()
    return file(executable, len(data), digest(data))


def tree(value: object) -> Entry | None:
    """Return the tree of nested dicts; text is a file, text before ``*`` an executable one,
    and text after ``->`` a link's target."""
    if isinstance(value, Mapping):
        children = {name: tree(child) for name, child in value.items()}
        return Directory({name: child for name, child in children.items() if child is not None})
    if isinstance(value, str):
        if value.startswith("->"):
            return link(value[2:].encode())
        return text(value.removesuffix("*"), executable=value.endswith("*"))
    assert value is None or isinstance(value, Leaf)
    return value


def write(directory: Path, value: Mapping[str, object]) -> None:
    """Make on disk what :func:`tree` says."""
    directory.mkdir(exist_ok=True)
    for name, child in value.items():
        path = directory / name
        if isinstance(child, Mapping):
            write(path, child)
        elif isinstance(child, str) and child.startswith("->"):
            path.symlink_to(child[2:])
        elif isinstance(child, str):
            path.write_text(child.removesuffix("*"))
            path.chmod(0o755 if child.endswith("*") else 0o644)
        elif child == FIFO:
            os.mkfifo(path)


def exchange(one: Path, other: Path) -> None:
    """Have two paths take each other's place at once (renameat2(2), ``RENAME_EXCHANGE``)."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), "they cannot be exchanged", str(one))


def change_at_random(draw: random.Random, root: Path) -> None:
    """Do one thing to a tree of few names, so that they meet; it may come to nothing."""

    def some(depth: int) -> Path:
        return root.joinpath(*[draw.choice("abc") for _ in range(draw.randint(1, depth))])

    path = some(4)
    try:
        match draw.randrange(7):
            case 0:
                path.mkdir(parents=True, exist_ok=True)
            case 1:
                path.write_text(str(draw.random()))
            case 2:
                path.rename(some(2))
            case 3:
                shutil.rmtree(path)
            case 4:
                path.unlink()
            case 5:
                exchange(path, some(4))
            case 6:
                # As a build does that puts its results in the place of the last ones.
                shutil.rmtree(path)
                new = some(2)
                new.mkdir()
                (new / draw.choice("abc")).write_text(str(draw.random()))
                new.rename(path)
    except OSError:
        pass


def read(directory: Path) -> dict[str, object]:
    """Return what :func:`write` would have made."""
    found: dict[str, object] = {}
    for path in sorted(directory.iterdir()):
        if path.is_symlink():
            found[path.name] = f"->{path.readlink()}"
        elif path.is_dir():
            found[path.name] = read(path)
        elif path.is_file():
            mark = "*" if path.stat().st_mode & 0o111 else ""
            found[path.name] = path.read_text() + mark
        else:
            found[path.name] = FIFO
    return found
