"""Giving the user a file back that a conflict kept.

What is restored goes where it was in the root. A container may have made a link of any directory
on the way there, so none is followed; in a path that the user chose links are the user's own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.sync.core.keep import Keep, Kept
from wherry_sync import handles, wire
from wherry_sync.entry import LINK, TEMPORARY_PREFIX, split
from wherry_wire.frames import WireError

_TOP_FLAGS = handles.DIRECTORY_FLAGS & ~getattr(os, "O_NOFOLLOW", 0)


def restore(conflicts: Keep, kept: Kept, root: Path) -> Path:
    """Put a kept file where it was, in the place of what is there; return its path.

    :raises WherryError: it cannot be written, or its path leads out of the root.
    """
    if not kept.path:
        return save(conflicts, kept, root)
    try:
        # It was checked when it came, but what an earlier version kept was not.
        inside = wire.parse_path(kept.path.encode(errors="surrogateescape"))
    except WireError as error:
        raise WherryError(str(error), hint="put it elsewhere: --save FILE") from error
    _put(conflicts, kept, root, inside)
    return root / inside


def save(conflicts: Keep, kept: Kept, path: Path) -> Path:
    """Write a kept file to a path of the user's choice, and return that.

    :raises WherryError: it cannot be written.
    """
    _put(conflicts, kept, path.parent, path.name)
    return path


def _put(conflicts: Keep, kept: Kept, top: Path, path: str) -> None:
    above, name = split(path)
    try:
        top.mkdir(parents=True, exist_ok=True)
        with handles.Handle(os.open(top, _TOP_FLAGS)) as fd, _made(fd, above) as directory:
            _place(conflicts, kept, directory, name)
    except OSError as error:
        raise WherryError(
            f"{top / path} cannot be written: {error.strerror}",
            hint="put it elsewhere: --save FILE",
        ) from error


def _made(fd: int, path: str) -> handles.Handle:
    """Open a directory in another one, and make it if need be."""
    try:
        return handles.open_directory(fd, path)
    except FileNotFoundError:
        parent, name = split(path)
        with _made(fd, parent) as above:
            os.mkdir(name, dir_fd=above)
        return handles.open_directory(fd, path)


def _place(conflicts: Keep, kept: Kept, directory: int, name: str) -> None:
    """Put a kept file or link at a name in a directory, in the place of what is there."""
    new = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    try:
        if kept.leaf.kind == LINK:
            os.symlink(os.fsdecode(kept.leaf.target), new, dir_fd=directory)
        else:
            descriptor = os.open(new, handles.NEW_FLAGS, 0o600, dir_fd=directory)
            with os.fdopen(descriptor, "wb") as file:
                for chunk in conflicts.open(kept):
                    file.write(chunk)
                old = handles.status(directory, name)
                mode = 0o755 if kept.leaf.executable else 0o644
                if old is not None and stat.S_ISREG(old.st_mode):
                    mode = old.st_mode & 0o777
                os.fchmod(descriptor, mode)
                file.flush()
                os.fsync(descriptor)
        os.replace(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=directory)
        raise
