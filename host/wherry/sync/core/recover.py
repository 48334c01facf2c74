"""What the ancestor is worth after a machine lost power. A pure function.

A machine that stops without a word loses what it had not written to its disk: files come back
old, empty, partly zero, or not at all, and deleted ones come back. Compared with the ancestor
all of that looks like somebody's edit. The store knows the paths in question: *pending* ones,
decided on and not known to be on that side's disk.

The remedy is to change the ancestor, for the table of :mod:`wherry.sync.core.reconcile` then
does the rest. An ancestor equal to what a side has says "this is nobody's edit": the other side
wins. No ancestor says "whose this is cannot be told": both are kept, the host's in place.

Invariants:

* After the guest lost power, no contents found there replace contents on the host, at any
  path, pending or not. What the guest has and the host has not is saved, unless it is empty or
  is what was there before.
* After the host lost power, a pending path that lost its contents gets the guest's. One with
  others, which may be an edit or the beginning of what was written, keeps them, and the guest's
  are saved: nobody else may have them. Whose the contents were makes no difference.
* A side that has what was decided on has it: that is never undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wherry_sync.diff import same, shallow
from wherry_sync.entry import Directory, Entry, Leaf, is_file, join, lookup, split
from wherry_sync.hashing import EMPTY_DIGEST


@dataclass(frozen=True, slots=True)
class Pending:
    """A path that one side may not have on its disk yet; both entries without children.

    :ivar before: what is on that disk for certain.
    :ivar after: what was decided on last.
    """

    before: Entry | None
    after: Entry | None


def resume(
    ancestor: Entry | None,
    host: Entry | None,
    guest: Entry | None,
    carried: Iterable[tuple[str, int, Entry | None]],
) -> dict[str, Entry | None]:
    """Return the changes of the ancestor for what was carried over and not written down.

    A round that was cut off between the two has put one side's change on the other one. If the
    first side has changed again since, both differ from the ancestor, and it would look as if
    both had been edited. Nobody has edited the side that has just what was carried to it.

    :param carried: see :meth:`Store.carried <wherry.sync.core.store.Store.carried>`.
    """
    changes: dict[str, Entry | None] = {}
    for path, origin, after in sorted(carried, key=lambda each: each[0]):
        there, here = (guest, host) if origin == 0 else (host, guest)
        a, there, here = (shallow(lookup(tree, path)) for tree in (ancestor, there, here))
        if there != after or after == a or after is None:
            continue
        parent = split(path)[0]
        if path and not isinstance(changes.get(parent) or lookup(ancestor, parent), Directory):
            continue
        if isinstance(after, Directory):
            if isinstance(here, Directory) and a is None:
                changes[path] = after
        elif is_file(after) and here != after:
            changes[path] = after
    return changes


def recover(
    ancestor: Entry | None,
    host: Entry | None,
    guest: Entry | None,
    *,
    host_lost: Mapping[str, Pending] | None,
    guest_lost: Mapping[str, Pending] | None,
) -> dict[str, Entry | None]:
    """Return the changes that make the ancestor one to go on with.

    :param host_lost: what was pending on the host when it lost power; None if it did not.
    :param guest_lost: likewise of the guest.
    """
    changes: dict[str, Entry | None] = {}
    for path in sorted((host_lost or {}).keys() | (guest_lost or {}).keys()):
        a, h, g = (lookup(tree, path) for tree in (ancestor, host, guest))
        on_host = (host_lost or {}).get(path)
        on_guest = (guest_lost or {}).get(path)
        guest_suspect = on_guest is not None and _suspect(on_guest, a, g)
        host_suspect = on_host is not None and _suspect(on_host, a, h)
        if guest_suspect:
            assert on_guest is not None
            changes[path] = shallow(g) if _lost(on_guest, g) else None
        elif host_suspect:
            assert on_host is not None
            changes[path] = shallow(h) if _lost(on_host, h) else None
    if guest_lost is not None:
        _distrust("", ancestor, guest, guest_lost, changes)
    return changes


def _suspect(pending: Pending, a: Entry | None, found: Entry | None) -> bool:
    """Whether what a side has is neither what was decided on nor what the ancestor says."""
    return not same(found, pending.after) and not same(found, a)


def _lost(pending: Pending, found: Entry | None) -> bool:
    """Whether what a side has is what a loss of power leaves, and worth nothing."""
    return found is None or same(found, pending.before) or _is_empty(found)


def _is_empty(entry: Entry) -> bool:
    return isinstance(entry, Leaf) and is_file(entry) and entry.digest == EMPTY_DIGEST


def _distrust(
    path: str,
    a: Entry | None,
    g: Entry | None,
    settled: Mapping[str, Pending],
    changes: dict[str, Entry | None],
) -> None:
    """Take back the ancestor wherever the guest has other contents of a file."""
    if a is g:
        return
    if isinstance(a, Directory) and isinstance(g, Directory):
        for name, child in a.children.items():
            _distrust(join(path, name), child, g.children.get(name), settled, changes)
    elif (
        isinstance(a, Leaf)
        and isinstance(g, Leaf)
        and is_file(a)
        and is_file(g)
        and a.digest != g.digest
        and path not in settled
    ):
        changes[path] = g if _is_empty(g) else None
