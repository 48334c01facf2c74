"""Decisions -> operations in the order in which they can be carried out, and what they need.

Deletions come first, children before their directory; then all else, a directory before its
children. So a directory is empty before a file takes its place, a name is free before its twin
in another case takes it, and contents that a deletion removes were staged before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from wherry.sync.core.reconcile import Decision
from wherry_sync.entry import Entry, Leaf, is_file
from wherry_sync.operation import Operation


@dataclass(frozen=True, slots=True)
class Want:
    """Contents that one side needs.

    :ivar path: where the other side has them.
    :ivar local: where this side has them, as when a file was renamed; None if nowhere known.
    """

    leaf: Leaf
    path: str
    local: str | None


@dataclass(frozen=True, slots=True)
class SidePlan:
    """What one side has to do."""

    operations: tuple[Operation, ...]
    wants: tuple[Want, ...]


def ordered(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """Return operations in an order in which none gets in another's way."""

    def depth_first(operation: Operation) -> list[str]:
        return operation.path.split("/")

    everything = sorted(operations, key=depth_first)
    deletions = [operation for operation in reversed(everything) if operation.after is None]
    return (*deletions, *(operation for operation in everything if operation.after is not None))


def plan(decisions: Iterable[Decision], side: Callable[[Decision], Operation | None]) -> SidePlan:
    """Return what one side has to do.

    :param side: gives a decision's operation of that side.
    """
    operations = ordered(found for decision in decisions if (found := side(decision)) is not None)
    leaving = {
        before.digest: operation.path
        for operation in operations
        if (before := _file(operation.before)) is not None
    }
    wants: dict[bytes, Want] = {}
    for operation in operations:
        before, after = _file(operation.before), _file(operation.after)
        if after is None or (before is not None and before.digest == after.digest):
            continue
        want = Want(after, operation.path, leaving.get(after.digest))
        wants.setdefault(after.digest, want)
    return SidePlan(operations, tuple(wants.values()))


def _file(entry: Entry | None) -> Leaf | None:
    return entry if isinstance(entry, Leaf) and is_file(entry) else None
