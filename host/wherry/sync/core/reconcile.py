"""Ancestor, host's tree, guest's tree -> what to do. A pure function.

Invariants:

* Every path gets at most one decision. Carrying out both of its operations makes both sides
  equal to its ``result``, which then becomes the ancestor's.
* A decision never removes or replaces an entry that differs from the ancestor's, but for a
  conflict; there the host's stays and the guest's is ``saved`` first.
* Where something cannot be told (a problem), nothing is concluded: both sides and the ancestor
  stay, and the path is reported. The rest goes on.
* The table is symmetric but for conflicts and for what the host cannot hold.

X, Y: either side. ``=``: equal to the ancestor's.

=================== ============================= ===================================
X                   Y                             decision
=================== ============================= ===================================
changed             =                             Y becomes as X
equal change        equal change                  ancestor alone
new directory       new directory                 merged
deleted             modified                      X gets Y's
deleted directory   additions or changes inside   only those stay, with their parents
kind changed        =, or only deletions inside   Y becomes as X
kind changed        modified                      conflict
contents changed    executable bit changed        both, on both sides
different contents  different contents            conflict
anything            untracked content there       reported, untouched
=================== ============================= ===================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from wherry.sync.core.traits import Traits
from wherry_sync.diff import shallow
from wherry_sync.entry import (
    EMPTY,
    LINK,
    PROBLEM,
    Directory,
    Entry,
    Leaf,
    file,
    is_file,
    is_problem,
    is_untracked,
    join,
)
from wherry_sync.operation import Operation

HOST, GUEST = 0, 1

IN_THE_WAY = "something that is not synchronised is in the way"
_AGREEMENTS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about one path.

    :ivar result: what both sides and the ancestor have in the end, without children.
    :ivar host: what the host has to do, if anything.
    :ivar guest: what the guest has to do, if anything.
    :ivar saved: the guest's file or link that the host's replaces; to be kept first.
    """

    path: str
    result: Entry | None
    host: Operation | None = None
    guest: Operation | None = None
    saved: Leaf | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A path that is not synchronised now, and why.

    :ivar lacking: the sides that for this have not all that the other one has.
    """

    path: str
    reason: str
    lacking: tuple[int, ...] = ()


@dataclass(slots=True)
class Reconciliation:
    """What :func:`reconcile` found.

    :ivar ancestor: paths at which both sides agree on something new; no I/O.
    """

    decisions: list[Decision] = field(default_factory=list)
    ancestor: dict[str, Entry | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.decisions) + len(self.ancestor) + len(self.problems)


class Agreement:
    """Remembers directories about which there was nothing to say, to skip them next time.

    Sound because entries never change: the same three objects have the same answer.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Entry | None, Directory, Directory]] = {}

    def has(self, ancestor: Entry | None, host: Directory, guest: Directory) -> bool:
        """Whether these three objects were found to need nothing."""
        known = self._known.get(id(host))
        return known is not None and known[0] is ancestor and known[1] is host and known[2] is guest

    def add(self, ancestor: Entry | None, host: Directory, guest: Directory) -> None:
        """Remember three objects; they stay alive, so an id is never another's."""
        if len(self._known) >= _AGREEMENTS_MAX:
            self._known.clear()
        self._known[id(host)] = (ancestor, host, guest)


def reconcile(
    ancestor: Entry | None,
    host: Entry | None,
    guest: Entry | None,
    traits: Traits | None = None,
    agreement: Agreement | None = None,
) -> Reconciliation:
    """Compare the three trees.

    :param traits: of the host; a POSIX one without limits by default.
    :param agreement: of the same root and traits; makes a call cost what changed.
    """
    return _Reconciler(traits or Traits(), agreement or Agreement()).run(ancestor, host, guest)


class _Reconciler:
    def __init__(self, traits: Traits, agreement: Agreement) -> None:
        self._traits = traits
        self._agreement = agreement
        self._out = Reconciliation()

    def run(self, a: Entry | None, h: Entry | None, g: Entry | None) -> Reconciliation:
        self._visit("", a, h, g)
        return self._out

    # One path

    def _visit(self, path: str, a: Entry | None, h: Entry | None, g: Entry | None) -> None:
        if isinstance(h, Directory) and isinstance(g, Directory):
            self._directories(path, a, h, g)
            return
        if is_problem(h) or is_problem(g):
            sides = ((HOST, g), (GUEST, h))
            lacking = tuple(side for side, other in sides if not _is_unchanged(a, other))
            self._report(path, h, lacking)
            self._report(path, g, lacking)
            return
        # A husk is a directory only to somebody who knows of a directory there.
        husks = not isinstance(a, Directory)
        blocked = [False, False]
        found = [h, g]
        for side, entry in enumerate(found):
            if is_untracked(entry) and (husks or isinstance(entry, Leaf)):
                blocked[side] = True
                found[side] = None
        h, g = found
        if h is None and g is None:
            if a is not None:
                self._out.ancestor[path] = None
        elif h is None or g is None:
            missing = HOST if h is None else GUEST
            present = g if h is None else h
            assert present is not None
            if blocked[missing] and not _only_less(a, present):
                self._out.problems.append(Problem(path, IN_THE_WAY, (missing,)))
            else:
                self._one_sided(path, a, present, missing)
        elif is_file(h) and is_file(g):
            assert isinstance(h, Leaf)
            assert isinstance(g, Leaf)
            self._files(path, a, h, g)
        elif h == g:
            if a != h:
                self._out.ancestor[path] = h
        else:
            self._kinds(path, a, h, g)

    def _directories(self, path: str, a: Entry | None, h: Directory, g: Directory) -> None:
        if (a is h and h is g) or self._agreement.has(a, h, g):
            return
        before = len(self._out)
        if isinstance(a, Directory):
            children = a.children
        else:
            children = {}
            self._out.ancestor[path] = EMPTY
        refused = self._refused(path, g.children, h.children, children)
        theirs = g.children
        for name, child in h.children.items():
            ours, other = children.get(name), theirs.get(name)
            if not (ours is child and child is other) and name not in refused:
                self._visit(join(path, name), ours, child, other)
        for name, child in theirs.items():
            if name not in h.children and name not in refused:
                self._visit(join(path, name), children.get(name), None, child)
        for name, child in children.items():
            if name not in h.children and name not in theirs:
                self._visit(join(path, name), child, None, None)
        if len(self._out) == before:
            self._agreement.add(a, h, g)

    def _one_sided(self, path: str, a: Entry | None, y: Entry, missing: int) -> None:
        """One side has nothing, because it was deleted or has never been there."""
        if isinstance(a, Directory) and isinstance(y, Directory):
            self._prune(path, a, y, missing)
        elif y == a:
            self._decide(path, None, 1 - missing, y)
        else:
            self._create(path, y, missing)

    def _create(
        self,
        path: str,
        y: Entry,
        side: int,
        replaced: Entry | None = None,
        saved: Leaf | None = None,
    ) -> None:
        """Make on one side what the other one has."""
        if is_problem(y):
            self._report(path, y, (side,))
        elif is_untracked(y):
            return
        elif side == HOST and not self._traits.links and _is_link(y):
            reason = "this host cannot make symbolic links"
            self._out.problems.append(Problem(path, reason, (HOST,)))
        else:
            self._decide(path, y, side, replaced, saved)
            if isinstance(y, Directory):
                refused = self._refused(path, y.children, {}, {}) if side == HOST else ()
                for name, child in y.children.items():
                    if name not in refused:
                        self._create(join(path, name), child, side)

    def _prune(self, path: str, a: Directory, y: Directory, missing: int) -> bool:
        """A directory was deleted on one side: delete on the other what it knew.

        :returns: whether anything stays that the other side has to have.
        """
        stays = held = False
        refused = self._refused(path, y.children, {}, a.children) if missing == HOST else ()
        for name in y.children.keys() | a.children.keys():
            below = join(path, name)
            known, found = a.children.get(name), y.children.get(name)
            if is_problem(found) or name in refused:
                if name not in refused:
                    # What was deleted as well is there still.
                    self._report(below, found, (missing,) if known is None else (HOST, GUEST))
                held = True
            elif isinstance(known, Directory) and isinstance(found, Directory):
                stays |= self._prune(below, known, found, missing)
            elif found is None or is_untracked(found):
                if known is not None:
                    self._out.ancestor[below] = None
            elif found == known:
                self._decide(below, None, 1 - missing, found)
            else:
                stays = True
                self._create(below, found, missing)
        if stays:
            self._decide(path, EMPTY, missing, None)
        elif not held:
            if _is_held(y):
                self._out.ancestor[path] = None
            else:
                self._decide(path, None, 1 - missing, EMPTY)
        return stays

    def _files(self, path: str, a: Entry | None, h: Leaf, g: Leaf) -> None:
        """Two files: contents and executable bit are merged apart."""
        base = a if isinstance(a, Leaf) and is_file(a) else None
        if not self._traits.executable:
            # The host's bit says nothing; the guest's own is kept.
            mode = g.executable
        elif base is None or h.executable == g.executable:
            mode = h.executable
        else:
            # Of two different bits, one is not the ancestor's.
            mode = not base.executable
        saved = None
        contents = h
        if h.digest != g.digest and base is not None and h.digest == base.digest:
            contents = g
        elif h.digest != g.digest and (base is None or g.digest != base.digest):
            saved = g
        merged = file(mode, contents.size, contents.digest)
        on_host = merged.with_executable(mode and self._traits.executable)
        if on_host == h and merged == g:
            if a != merged:
                self._out.ancestor[path] = merged
            return
        self._out.decisions.append(
            Decision(
                path,
                merged,
                None if on_host == h else Operation(path, h, on_host),
                None if merged == g else Operation(path, g, merged),
                saved,
            )
        )

    def _kinds(self, path: str, a: Entry | None, h: Entry, g: Entry) -> None:
        """Two different things, of which at most one is a directory."""
        if _only_less(a, h):
            self._replace(path, a, h, g, HOST, conflict=False)
        else:
            self._replace(path, a, g, h, GUEST, conflict=not _only_less(a, g))

    def _replace(
        self, path: str, a: Entry | None, old: Entry, new: Entry, side: int, *, conflict: bool
    ) -> None:
        """Put one side's entry in place of the other's."""
        self._drop(path, a, new)
        if not isinstance(old, Directory):
            self._create(path, new, side, old, old if conflict else None)
        elif _is_held(old):
            self._out.problems.append(Problem(path, IN_THE_WAY, (side,)))
        else:
            self._remove_children(path, a, old, side, conflict=conflict)
            self._create(path, new, side, EMPTY)

    def _drop(self, path: str, a: Entry | None, new: Entry) -> None:
        """Take from the ancestor what is in neither tree below a directory that stays one."""
        if isinstance(a, Directory) and isinstance(new, Directory):
            for name, child in a.children.items():
                if (found := new.children.get(name)) is None:
                    self._out.ancestor[join(path, name)] = None
                else:
                    self._drop(join(path, name), child, found)

    def _remove_children(
        self, path: str, a: Entry | None, old: Directory, side: int, *, conflict: bool
    ) -> None:
        known = a.children if isinstance(a, Directory) else {}
        for name, child in old.children.items():
            below = join(path, name)
            if isinstance(child, Directory):
                self._remove_children(below, known.get(name), child, side, conflict=conflict)
                self._decide(below, None, side, EMPTY)
            else:
                saved = child if conflict and child != known.get(name) else None
                self._decide(below, None, side, child, saved)

    def _decide(
        self,
        path: str,
        result: Entry | None,
        side: int,
        before: Entry | None,
        saved: Leaf | None = None,
    ) -> None:
        """Have one side change; the other one has the result already."""
        result = after = shallow(result)
        if side == HOST and isinstance(result, Leaf) and is_file(result):
            after = result.with_executable(result.executable and self._traits.executable)
        operation = Operation(path, shallow(before), after)
        host, guest = (operation, None) if side == HOST else (None, operation)
        self._out.decisions.append(Decision(path, result, host, guest, saved))

    # What cannot be synchronised

    def _report(self, path: str, entry: Entry | None, lacking: tuple[int, ...]) -> None:
        """Report the problems in a tree that is not looked at otherwise."""
        if isinstance(entry, Directory):
            for name, child in entry.children.items():
                self._report(join(path, name), child, lacking)
        elif entry is not None and entry.kind == PROBLEM:
            self._out.problems.append(Problem(path, entry.reason, lacking))

    def _refused(
        self,
        path: str,
        guest: Mapping[str, Entry],
        host: Mapping[str, Entry],
        ancestor: Mapping[str, Entry],
    ) -> Collection[str]:
        """Report and return the guest's names in a directory that the host cannot have."""
        traits = self._traits
        if traits.case_sensitive and not traits.windows_names:
            return ()
        reasons = {
            name: f"its name is the same as that of {stays!r} on this host"
            for name, stays in traits.twins(guest, host, ancestor).items()
            # What the host has no more is deleted.
            if guest[name] != ancestor.get(name)
        }
        for name in guest:
            reason = traits.name_problem(name)
            if reason is not None:
                reasons[name] = reason
        self._out.problems += [
            Problem(join(path, name), why, (HOST,)) for name, why in reasons.items()
        ]
        return reasons.keys()


def _is_link(entry: Entry) -> bool:
    return isinstance(entry, Leaf) and entry.kind == LINK


def _only_less(a: Entry | None, x: Entry | None) -> bool:
    """Whether a side has nothing tracked that the ancestor does not have as well."""
    if isinstance(a, Directory) and isinstance(x, Directory):
        return a is x or all(
            is_untracked(child) or _only_less(a.children.get(name), child)
            for name, child in x.children.items()
        )
    return x is None or x == a


def _is_unchanged(a: Entry | None, x: Entry | None) -> bool:
    """Whether a side has what the ancestor has, and there is nothing that cannot be told."""
    if is_untracked(x) and not isinstance(a, Directory):
        x = None
    return _only_less(a, x) and _only_less(x, a)


def _is_held(entry: Entry) -> bool:
    """Whether a directory could not be removed even if all that is tracked in it were."""
    if isinstance(entry, Directory):
        return any(_is_held(child) for child in entry.children.values())
    return is_untracked(entry) or is_problem(entry)
