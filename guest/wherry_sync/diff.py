"""What differs between two trees, as a list of paths."""

from __future__ import annotations

from wherry_sync.entry import EMPTY, Directory, Entry, join


def shallow(entry: Entry | None) -> Entry | None:
    """Return the entry without children."""
    return EMPTY if isinstance(entry, Directory) else entry


def same(one: Entry | None, other: Entry | None) -> bool:
    """Whether two entries are equal, their children aside."""
    return shallow(one) == shallow(other)


def diff(old: Entry | None, new: Entry | None) -> dict[str, Entry | None]:
    """Return the shallow changes that make ``new`` of ``old``.

    Every path that is in one tree only, or not equal, is listed; parts that are the same
    object are not visited.
    """
    changes: dict[str, Entry | None] = {}
    _compare("", old, new, changes)
    return changes


def _compare(
    path: str, old: Entry | None, new: Entry | None, changes: dict[str, Entry | None]
) -> None:
    if old is new:
        return
    if not same(old, new):
        changes[path] = shallow(new)
    before = old.children if isinstance(old, Directory) else {}
    after = new.children if isinstance(new, Directory) else {}
    for name in before.keys() | after.keys():
        _compare(join(path, name), before.get(name), after.get(name), changes)
