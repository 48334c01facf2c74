"""Decisions -> operations in the order in which they can be carried out, and what they need.

Deletions come first, children before their directory; then all else, a directory before its
children. So a directory is empty before a file takes its place, a name is free before its twin
in another case takes it, and contents that a deletion removes were staged before.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from wherry.sync.core.reconcile import Decision
from wherry_sync.build import needed
from wherry_sync.entry import Directory, Entry, Leaf, is_file
from wherry_sync.operation import Operation

ALONG_BYTES = 1 << 20
"""Contents up to this size are sent with the operation that needs them, and no sooner."""


@dataclass(frozen=True, slots=True)
class Want:
    """Contents that one side needs.

    :ivar path: where the other side has them.
    :ivar local: where this side has them, as when a file was renamed; None if nowhere known.
    :ivar base: the file that this side has at the path, if it has one.
    """

    leaf: Leaf
    path: str
    local: str | None
    base: Leaf | None


@dataclass(frozen=True, slots=True)
class SidePlan:
    """What one side has to do.

    :ivar builds: what is new, to be made after the operations.
    :ivar wants: of the operations, to be staged before them.
    :ivar along: digests of what is sent along with the operations.
    """

    operations: tuple[Operation, ...]
    builds: tuple[Operation, ...]
    wants: tuple[Want, ...]
    along: frozenset[bytes]

    def contents(self) -> Iterator[Leaf]:
        """Yield the files whose contents are needed from the other side, most likely."""
        yield from (want.leaf for want in self.wants if want.local is None)
        for operation in self.operations:
            if needs(operation) in self.along and isinstance(operation.after, Leaf):
                yield operation.after
        for number in needed(self.builds):
            after = self.builds[number].after
            assert isinstance(after, Leaf)
            yield after


def ordered(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """Return operations in an order in which none gets in another's way."""

    def depth_first(operation: Operation) -> str:
        # As the names would be sorted one by one: a NUL is in none, and comes before all else.
        return operation.path.replace("/", "\0")

    everything = sorted(operations, key=depth_first)
    deletions = [operation for operation in reversed(everything) if operation.after is None]
    return (*deletions, *(operation for operation in everything if operation.after is not None))


def plan(decisions: Iterable[Decision], side: Callable[[Decision], Operation | None]) -> SidePlan:
    """Return what one side has to do.

    :param side: gives a decision's operation of that side.
    """
    everything = ordered(found for decision in decisions if (found := side(decision)) is not None)
    leaving = {
        before.digest: operation.path
        for operation in everything
        if (before := _file(operation.before)) is not None
    }
    operations, builds = _split(everything, leaving)
    wants: dict[bytes, Want] = {}
    along: set[bytes] = set()
    for operation in operations:
        digest = needs(operation)
        after = _file(operation.after)
        if not digest or after is None:
            continue
        if digest in along:
            # Several files need it: it is sent once.
            along.discard(digest)
        elif digest not in wants and digest not in leaving and after.size <= ALONG_BYTES:
            along.add(digest)
        want = Want(after, operation.path, leaving.get(digest), _file(operation.before))
        wants.setdefault(digest, want)
    staged = tuple(want for digest, want in wants.items() if digest not in along)
    return SidePlan(tuple(operations), tuple(builds), staged, frozenset(along))


def parts(builds: Sequence[Operation], size: int) -> Iterator[Sequence[Operation]]:
    """Yield what is to be built in parts of some size, or more: each begins with a directory.

    What follows then is made in that one, or in others that there are already.
    """
    begun = 0
    for number, operation in enumerate(builds):
        if number - begun >= size and isinstance(operation.after, Directory):
            yield builds[begun:number]
            begun = number
    if begun < len(builds):
        yield builds[begun:]


def needs(operation: Operation) -> bytes:
    """Return the digest of the contents that an operation needs; empty for none."""
    before, after = _file(operation.before), _file(operation.after)
    if after is None or (before is not None and before.digest == after.digest):
        return b""
    return after.digest


def _split(
    operations: Iterable[Operation], leaving: Container[bytes]
) -> tuple[list[Operation], list[Operation]]:
    """Return the operations that change something, and those that make something new.

    A new directory is built with all that is in it or not at all: where contents for it are to
    be had on the same side, as when a directory was renamed, all of it is an operation like
    others.
    """
    changes: list[Operation] = []
    builds: list[Operation] = []
    group: list[Operation] = []
    top = ""
    building = True

    def end_group() -> None:
        (builds if building else changes).extend(group)
        group.clear()

    for operation in operations:
        path, after = operation.path, operation.after
        if operation.before is not None or after is None or not path:
            end_group()
            building, top = False, ""
            changes.append(operation)
            continue
        if not top or not path.startswith(top):
            end_group()
            building, top = True, f"{path}/" if isinstance(after, Directory) else ""
        if isinstance(after, Leaf) and is_file(after) and after.digest in leaving:
            building = False
        group.append(operation)
        if not top:
            end_group()
            building = True
    end_group()
    return changes, builds


def _file(entry: Entry | None) -> Leaf | None:
    return entry if isinstance(entry, Leaf) and is_file(entry) else None
