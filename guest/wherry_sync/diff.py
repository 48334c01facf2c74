"""What differs between two trees, as a list of paths."""

from __future__ import annotations

from wherry_sync.entry import EMPTY, Directory, join

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from wherry_sync.entry import Entry


def shallow(entry: Entry | None) -> Entry | None:
    """Return the entry without children."""
    return EMPTY if isinstance(entry, Directory) else entry


def same(one: Entry | None, other: Entry | None) -> bool:
    """Whether two entries are equal, their children aside."""
    return shallow(one) == shallow(other)


def changes(
    old: Entry | None, new: Entry | None, path: str = ""
) -> Iterator[tuple[str, Entry | None]]:
    """Yield the shallow changes that make ``new`` of ``old``, a directory's before those in it.

    Every path that is in one tree only, or not equal, is among them; parts that are the same
    object are not visited.

    :param path: where the two are.
    """
    if old is new:
        return
    if not same(old, new):
        yield path, shallow(new)
    before = old.children if isinstance(old, Directory) else {}
    after = new.children if isinstance(new, Directory) else {}
    for name in before.keys() | after.keys():
        one, other = before.get(name), after.get(name)
        if isinstance(one, Directory) or isinstance(other, Directory):
            yield from changes(one, other, join(path, name))
        elif one != other:
            yield join(path, name), other


def diff(old: Entry | None, new: Entry | None) -> dict[str, Entry | None]:
    """Return all :func:`changes`."""
    return dict(changes(old, new))
