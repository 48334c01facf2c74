"""Trees for the sync's tests, in few letters."""

from __future__ import annotations

import os
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
