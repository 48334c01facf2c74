"""What a root has of all paths, and what its directory has that is not synchronised."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from wherry.core.errors import ConfigError, WherryError
from wherry.sync.core import rules
from wherry_sync.entry import join, name_problem
from wherry_sync.ignore import Ignore


def contains(outer: str, inner: str) -> bool:
    """Whether a path of the guest's is in another one."""
    return inner.startswith("/" if outer == "/" else outer + "/")


def meet(one: str, other: str) -> bool:
    """Whether one of two paths of the guest's is the other one, or in it."""
    return one == other or contains(one, other) or contains(other, one)


def ignore_of(
    root: Path,
    private: Path | None,
    settings: Sequence[str] = (),
    inside: Mapping[str, Sequence[str]] | None = None,
) -> Ignore:
    """Return the rules for a directory.

    :param settings: lines that come after those of ``.wherryignore``.
    :param inside: the settings of directories in it that are, or were, synchronised by
        themselves, parents first. Their rules hold on, and come after its own as in Git: what
        is each side's own there must not become one side's.
    :param private: a directory whose contents are never sent. Sending what keeps track of
        sending makes more to send; and the keys to the guest are in it.
    :raises WherryError: a ``.wherryignore`` cannot be read, or understood.
    """
    found = _rules_in(root, settings).rules
    for path, lines in (inside or {}).items():
        found = (*found, *rules.below(path, _rules_in(root / path, lines)).rules)
    outside = _lead(private, root) if private is not None else None
    if outside is not None:
        # The last one that matches decides.
        found = (*found, (f"{re.escape(outside)}/", True))
    return Ignore(found)


def check_private(path: Path, private: Path | None) -> None:
    """Refuse what is private, and what is in it.

    :raises WherryError: it is.
    """
    if private is not None and _lead(_resolved(path), private) is not None:
        raise WherryError(
            f"{path} cannot be mounted: in {private} is what wherry itself keeps of its machines",
            hint="mount a directory outside of it",
        )


def check_inside(root: Path, ignore: Ignore, inside: str) -> None:
    """Refuse a path in a root that is not synchronised with it.

    A barrier of the root would say nothing of it. What is not there is no reason to refuse.

    :raises WherryError: it is left out.
    :raises OSError: that cannot be told.
    """
    reason = _gap(root, ignore, inside)
    if reason is not None:
        raise WherryError(
            f"{root / inside} cannot be mounted while {root} is synchronised, which leaves it out:"
            f" {reason}",
            hint="mount a volume there, or mount it by itself",
        )


def _gap(root: Path, ignore: Ignore, inside: str, *, resolved: bool = False) -> str | None:
    """Return why a path in a root is not synchronised with it; None if it is.

    :param resolved: links were followed, so one that is there all the same leads nowhere.
    """
    path = ""
    for name in inside.split("/"):
        path = join(path, name)
        try:
            device, status = root.stat().st_dev, (root / path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        reason = name_problem(name)
        if reason is not None:
            return reason
        if ignore(path, stat.S_ISDIR(status.st_mode)):
            return f"{path} is ignored, by {rules.FILE_NAME} or wherry sync add"
        if status.st_dev != device:
            return f"{root / path} is on another filesystem"
        if stat.S_ISLNK(status.st_mode):
            if resolved:
                return f"{root / path} is a link that leads in a circle"
            target, real = _resolved(root / inside), _resolved(root)
            if not target.is_relative_to(real):
                return f"{root / path} is a link that leads out of it"
            if target == real:
                return None
            return _gap(real, ignore, target.relative_to(real).as_posix(), resolved=True)
    return None


def _resolved(path: Path) -> Path:
    """Return a path with its links followed, as far as that is possible.

    (Of one that leads in a circle :meth:`Path.resolve` makes a RuntimeError before Python 3.13.)
    """
    return Path(os.path.realpath(path))


def _lead(path: Path, above: Path) -> str | None:
    """Return the way from a directory to a resolved path; None if that is not below it.

    A directory is known by its inode, as it may have names that differ in case.
    """
    for each in (path, *path.parents):
        if _same(each, above):
            return path.relative_to(each).as_posix()
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _rules_in(directory: Path, settings: Sequence[str]) -> Ignore:
    try:
        return rules.parse(_lines(directory / rules.FILE_NAME), settings)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error.message}") from error


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise WherryError(f"{path} cannot be read: {error}") from error
