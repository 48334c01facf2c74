"""What changed in the guest while no container could write: it stays there.

A container that mounts a root to read cannot change it, but others can: a shell in the guest, or
a container that was made there. What they write never comes to the host, not even when a
container that may write begins later, unless that one writes there itself. The trees alone do not
say who it was, for a writer may write again what is there.

A root is *written* or not, as the store remembers. In each round:

* While it is not, whatever differs in the guest is *withheld*: written down, with a stamp that
  any write to it changes.
* When the first container is made that may write, one more round of that kind takes new stamps of
  all of it. It is over before that container starts, as a barrier waits for it. From then on the
  root is written.
* A container that is found to be able to write, and may have done so, makes the root written too.
  Then nothing is withheld, as what it wrote has to come: that is the greater promise.
* While the root is written, what is withheld stays so as long as it has its stamp. With what does
  not stay goes what that depends on: a directory comes to the host with what was written in it,
  and one that is gone takes along what had been gone from it before.
* When no container may write any more, the root is not written any more after a round that has
  found nothing left to bring: what containers wrote is owed to the host until then.

The host's own changes may change it too, as a new executable bit does with contents that are
withheld. What it becomes by that is written down before, and its stamp at once afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from wherry.sync.core.reconcile import HOST, Decision, Problem, Reconciliation
from wherry.sync.core.store import Store, Withheld
from wherry.sync.endpoint import Endpoint
from wherry_sync.diff import same, shallow
from wherry_sync.entry import Directory, Entry, lookup, split
from wherry_sync.operation import Operation

REASON = "it was changed in the guest while no container mounted it to write"


class Withholding:
    """Sifts out what stays in the guest. One thread at a time.

    :param guest: gives the stamps.
    """

    def __init__(self, store: Store, guest: Endpoint) -> None:
        self._store = store
        self._guest = guest
        self._written = store.written()
        self._known = store.withheld()

    def sift(
        self,
        found: Reconciliation,
        ancestor: Entry | None,
        guest: Entry | None,
        *,
        writes: bool,
        first: bool,
    ) -> None:
        """Drop what would change the host and is withheld, and have a problem say so.

        Of a file, what the host has changed comes to the guest all the same. The ancestor then
        has what the host has, and the guest's own change is one still.

        :param guest: the tree that ``found`` is about.
        :param writes: whether a container may write from the end of this round on.
        :param first: whether none may have written before, unless the root is written.
        :raises OSError: the guest cannot be reached.
        """
        if self._written is None:
            self._remember({}, written=writes)
        if writes and not first and not self._written:
            self._remember(dict.fromkeys(self._known), written=True)
        if self._written and not self._known:
            return
        brought = {each.path: each.host for each in found.decisions if each.host is not None}
        now = {path: shallow(lookup(guest, path)) for path in brought}
        if self._written:
            seen = self._stamped({path: now[path] for path in now if self._knows(path, now[path])})
            stays = {path for path, each in seen.items() if self._has_stayed(path, each)}
            _spread(brought, stays, ancestor)
        else:
            if writes and now:
                # A stamp outlasts a loss of power only if what it is of does.
                self._guest.flush()
            seen = self._stamped(
                {path: now[path] for path in now if writes or not self._has(path, now[path])}
            )
            stays = set(brought)
            found.problems = [_without_host(problem) for problem in found.problems]
        changes: dict[str, Withheld | None] = {
            path: each for path, each in seen.items() if path in stays
        }
        for path in self._known.keys() - stays:
            if path in brought or same(lookup(guest, path), lookup(ancestor, path)):
                changes[path] = None
        for path, coming in _stay(found, stays).items():
            changes[path] = replace(changes.get(path) or self._known[path], coming=coming)
        self._remember(changes, written=self._written or writes)

    def carried(self, paths: Iterable[str]) -> None:
        """Learn at which paths the guest has got what it should, before somebody changes it.

        :raises OSError: the guest cannot be reached.
        """
        known = {path: self._known[path] for path in paths if path in self._known}
        if not known:
            return
        changed = {path: each.coming for path, each in known.items() if each.coming is not None}
        # At the others it has the host's now.
        self._remember(
            {**dict.fromkeys(known), **self._stamped(changed)}, written=bool(self._written)
        )

    def owe(self) -> None:
        """Learn that the host may have lost what it had from the guest: it comes once more.

        On the disk before the loss is answered, which happens once.
        """
        self._remember({}, written=True)

    def rest(self) -> None:
        """Learn that no container may write, and that nothing is left to bring to the host."""
        self._remember({}, written=False)

    def _has(self, path: str, entry: Entry | None) -> bool:
        """Whether that is known to be withheld."""
        known = self._known.get(path)
        return known is not None and known.entry == entry and known.coming is None

    def _knows(self, path: str, entry: Entry | None) -> bool:
        """Whether that may be what is withheld, or what it should become."""
        known = self._known.get(path)
        return known is not None and (
            entry == known.entry or (known.coming is not None and entry == known.coming)
        )

    def _has_stayed(self, path: str, now: Withheld) -> bool:
        known = self._known[path]
        if known.coming is not None and now.entry == known.coming:
            return True
        return (now.entry, now.stamp) == (known.entry, known.stamp)

    def _stamped(self, entries: Mapping[str, Entry | None]) -> dict[str, Withheld]:
        if not entries:
            return {}
        stamps = self._guest.stamps(list(entries))
        return {
            path: Withheld(entry, stamp)
            for (path, entry), stamp in zip(entries.items(), stamps, strict=True)
        }

    def _remember(self, changes: Mapping[str, Withheld | None], *, written: bool) -> None:
        changes = {path: new for path, new in changes.items() if self._known.get(path) != new}
        if not changes and written == self._written:
            return
        self._store.withhold(changes, written=written)
        self._written = written
        for path, new in changes.items():
            if new is None:
                del self._known[path]
            else:
                self._known[path] = new


def _spread(brought: Mapping[str, Operation], stays: set[str], ancestor: Entry | None) -> None:
    """Take from what stays what that which does not needs, or takes along.

    A directory that the host has removed stays if nothing needs it but what stays.
    """
    needed: set[str] = set()
    for path in sorted(brought.keys() - stays, key=len, reverse=True):
        operation = brought[path]
        is_new = operation.before is None and isinstance(operation.after, Directory)
        if is_new and path not in needed and isinstance(lookup(ancestor, path), Directory):
            stays.add(path)
        else:
            needed.update(_above(path))
    moving = brought.keys() - stays
    # The directories that it is in.
    stays.difference_update(
        [
            above
            for path in moving
            for above in _above(path)
            if above in stays and isinstance(brought[above].after, Directory)
        ]
    )
    gone = {
        path
        for path in moving
        if isinstance(brought[path].before, Directory)
        and not isinstance(brought[path].after, Directory)
    }
    stays.difference_update([path for path in stays if not gone.isdisjoint(_above(path))])


def _stay(found: Reconciliation, stays: Collection[str]) -> dict[str, Entry | None]:
    """Leave the host alone at some paths; return what the guest's own becomes there by the host's.

    That is its contents to what can be executed there alone, or the executable bit to contents
    that are there alone.
    """
    kept: list[Decision] = []
    coming = {}
    for decision in found.decisions:
        if decision.host is None or decision.path not in stays:
            kept.append(decision)
            continue
        found.problems.append(Problem(decision.path, REASON))
        if decision.guest is not None:
            coming[decision.path] = decision.result
            kept.append(replace(decision, result=decision.host.before, host=None))
    found.decisions = kept
    return coming


def _without_host(problem: Problem) -> Problem:
    """Return a problem of what the host shall not have anyway."""
    return replace(problem, lacking=tuple(side for side in problem.lacking if side != HOST))


def _above(path: str) -> Iterator[str]:
    """Yield the directories that a path is in."""
    while path:
        path = split(path)[0]
        yield path
