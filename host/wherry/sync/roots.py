"""The roots of one machine: which there are, and which of them holds a path.

Roots never lie in each other. A path in a root belongs to that root; a new root that contains
others takes their place, which costs nothing in the guest, where all copies are one tree. What is
remembered of the files goes along, there and back: see :meth:`Store.take
<wherry.sync.core.store.Store.take>`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import posixpath
import sqlite3
import string
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.core.files import write_atomic
from wherry.sync.conflicts import has_conflicts
from wherry.sync.core import rules
from wherry.sync.core.reconcile import GUEST
from wherry.sync.core.store import Store
from wherry.sync.core.traits import Traits
from wherry.sync.extent import check_inside, check_private, contains, ignore_of, meet
from wherry.sync.model import Paths, Root, id_of
from wherry.sync.remote import Place
from wherry.sync.session import Connect, Session
from wherry_sync import handles
from wherry_sync.ignore import NOTHING, Ignore

log = logging.getLogger(__name__)

_LAST_BARRIER_S = 20.0
_UNUSED_S = 60.0
_NAMES_ASKED = 1000
# These alone, as filesystems do not agree on what the other case of any other letter is.
_OTHER_CASE = str.maketrans(string.ascii_letters, string.ascii_uppercase + string.ascii_lowercase)
_FILE = "roots.json"
"""The number of each root there ever was, as the database knows it by that, and what the user
said of some of them. And the files that containers mount by themselves: a root has to know those
in it before its first round, which may replace them else."""


class Roots:
    """All roots of a machine. Any thread.

    :param directory: for what sessions keep.
    :param connect: see :class:`~wherry.sync.session.Session`.
    :param boot: id of this boot of the host.
    :param host_path: returns where a path of the guest is on the host. All paths here are the
        guest's, which are the host's own where those have no drives.
    :param private: a directory that is never sent, resolved.
    """

    def __init__(
        self,
        directory: Path,
        database: Path,
        connect: Connect,
        *,
        boot: str,
        host_path: Callable[[str], Path] = Path,
        private: Path | None = None,
    ) -> None:
        self._directory = directory
        self._database = database
        self._connect = connect
        self._boot = boot
        self._host_path = host_path
        self._private = private
        self._lock = threading.Lock()
        self._closed = False
        # Another dictionary with each change, so that it can be looked at without the lock, which
        # may be held for as long as a silent guest is waited for.
        self._sessions: dict[str, Session] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._numbers, self._kept, self._ignored, self._pins = self._read()

    def require(self, path: str, *, read_only: bool = False, first: bool = False) -> Session:
        """Return the session that keeps a path, which exists, equal; begin one if there is none.

        :param read_only: nothing has to come from the guest for this one's sake.
        :param first: see :meth:`Session.allow_writes <wherry.sync.session.Session.allow_writes>`.

        :raises WherryError: it cannot be synchronised.
        :raises OSError: it cannot be looked at.
        """
        if not handles.POSSIBLE:
            raise WherryError("directories of this computer cannot be mounted on its system yet")
        check_private(self._host_path(path), self._private)
        single = not self._host_path(path).is_dir()
        with self._lock:
            if self._closed:
                raise WherryError("the machine is stopping")
            session = self._holding(path)
            # If it is over, a full disk ended it, say: it is tried again when somebody needs it.
            if session is not None and (session.is_over or self._other_rules(session.root)):
                place = session.root.place
                session = self._replace(place.path, place.single, not read_only, first)
            inside = ""
            if session is not None and path != session.root.place.path:
                inside = posixpath.relpath(path, session.root.place.path)
                check_inside(session.root.path, session.root.place.ignore, inside)
            if single:
                # A container mounts the file itself, so no other one must replace it.
                self._pin(path)
            if session is None:
                session = self._replace(path, single, not read_only, first)
            elif single and inside:
                session.pin(inside)
            if not read_only:
                session.allow_writes(first=first)
            return session

    def ignore(self, path: str, lines: Sequence[str]) -> None:
        """Have a root leave out what lines of gitignore's syntax say, from :meth:`require` on.

        They come after those of its ``.wherryignore``, and are forgotten by :meth:`remove`.

        :raises WherryError: a line is not of that syntax, or the path lies in another root,
            whose rules hold for it.
        """
        rules.parse((), lines)
        with self._lock:
            session = self._holding(path)
            if session is not None and session.root.place.path != path:
                raise WherryError(
                    f"{path} is synchronised as a part of {session.root.path}",
                    hint=f"wherry sync add {session.root.path} --ignore …",
                )
            self._ignored[path] = list(lines)
            self._write()

    def keep(self, path: str) -> None:
        """Go on with a root at every start, whether a container mounts it or not."""
        with self._lock:
            self._kept.add(path)
            self._write()

    @property
    def kept(self) -> list[str]:
        """The roots that :meth:`keep` was called for."""
        with self._lock:
            return sorted(self._kept)

    @property
    def with_conflicts(self) -> list[str]:
        """The roots, of all there ever were, that have files that conflicts left."""
        with self._lock:
            numbers = dict(self._numbers)
        return sorted(
            path for path, number in numbers.items() if has_conflicts(self._state(number))
        )

    def release(
        self, used: Iterable[str], written: Iterable[str], *, idle_s: float = _UNUSED_S
    ) -> None:
        """End the roots that none of some paths is in; what both sides have stays.

        Those that are kept go on, and those with conflicts, which could not be listed else.

        :param written: those of the paths that are mounted to write. What changes in the guest
            in a root that none of them is in stays there from now on.
        :param idle_s: nor is one ended that somebody needed so shortly ago: for a container,
            perhaps, that is being made.
        """
        needed = set(used)
        with self._lock:
            mounted, writable = needed | self._kept, self._kept.union(written)
            for path, session in list(self._sessions.items()):
                if not _has_any(path, writable):
                    session.forbid_writes(idle_s)
                inside = _has_any(path, mounted)
                busy = session.idle_s < idle_s or session.status().conflicts
                if not inside and not busy:
                    log.info("%s is not synchronised any more: no container mounts it", path)
                    self._end(path)
            self._unpin(needed, idle_s)

    def was_written(self, path: str) -> bool | None:
        """Whether containers may write now to the root that holds a path, or would hold it.

        None if nothing is known of it.
        """
        with self._lock:
            session = self._holding(path)
            if session is not None:
                return session.writes
            return False if any(meet(path, each) for each in self._numbers) else None

    def holding(self, path: str) -> Session | None:
        """Return the session that keeps a path equal, if there is one."""
        with self._lock:
            return self._holding(path)

    def all(self) -> list[Session]:
        """Return all sessions."""
        with self._lock:
            return list(self._sessions.values())

    def changed(self, root: str) -> None:
        """Learn that the guest's watch has seen something in a root, by its id."""
        for session in self._sessions.values():
            if session.root.place.root == root:
                session.guest_changed()

    def unheard(self) -> None:
        """Learn that nothing is told any more of what changes in the guest.

        A root that tries finds its connection cut, and makes another one.
        """
        for session in self._sessions.values():
            session.guest_changed()

    def disconnect(self) -> None:
        """Learn that the connection to the guest is another one now.

        It does not wait for a root that is ending: that one may wait for the connection.
        """
        for session in self._sessions.values():
            session.disconnect()

    def remove(self, path: str) -> None:
        """End a root and forget it; both sides keep what they have.

        If it is needed again, what one side alone has comes to the other one: nothing is known
        to have been deleted. So it is a way out for one that is halted.

        :raises WherryError: it is none.
        """
        with self._lock:
            if path not in self._sessions and not self._is_remembered(path):
                raise WherryError(f"{path} is not synchronised", hint="see: wherry sync list")
            self._kept.discard(path)
            self._ignored.pop(path, None)
            self._write()
            if path in self._sessions:
                self._end(path)
            with self._store(self._numbers[path]) as store:
                store.forget()

    def _is_remembered(self, path: str) -> bool:
        if path not in self._numbers:
            return False
        with self._store(self._numbers[path]) as store:
            return store.load() is not None

    def close(self) -> None:
        """End all of them; safe to call twice."""
        with self._lock:
            self._closed = True
            sessions, self._sessions = list(self._sessions.values()), {}
        threads = [threading.Thread(target=session.close) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def guest_ended(self, boot: str) -> None:
        """Learn, after :meth:`close`, that the guest has shut down in order.

        Then its disk has all that it had, and its next boot has lost nothing. A root that was not
        in this boot may have lost something before, which is to be found out when it begins.

        :param boot: the id of the boot that has ended so.
        """
        for number in self._numbers.values():
            with closing(Store(self._database, number)) as store:
                if store.boot(GUEST) == boot:
                    store.part(GUEST, store.ticket())

    def _holding(self, path: str) -> Session | None:
        for key, session in self._sessions.items():
            if key == path or (not session.root.place.single and contains(key, path)):
                return session
        return None

    def _replace(self, path: str, single: bool, writes: bool, first: bool) -> Session:
        """Begin a root in place of those that are in it, or of itself with other rules.

        It does what those did for containers that run.

        :param writes: whether the container may write for whose sake it begins, and whether it
            is the ``first`` that may.

        :raises WherryError: it cannot begin. If its rules are why, those go on.
        """
        ignore = NOTHING if single else self._rules(path)
        inner = [key for key in self._sessions if key == path or contains(path, key)]
        others = any(self._sessions[key].writes for key in inner)
        for key in inner:
            self._end(key)
        return self._begin(path, single, ignore, writes or others, first and not others)

    def _pin(self, path: str) -> None:
        if path in self._pins:
            return
        self._pins.add(path)
        try:
            self._write()
        except BaseException:
            # Who is refused now comes again, and then it has to be written.
            self._pins.discard(path)
            raise

    def _unpin(self, needed: Collection[str], idle_s: float) -> None:
        """Forget the files that no container mounts by themselves; see :meth:`release`."""
        unused = set()
        for path in self._pins.difference(needed):
            session = self._holding(path)
            if session is None or session.idle_s >= idle_s:
                unused.add(path)
        if unused:
            self._pins -= unused
            self._write()

    def _other_rules(self, root: Root) -> bool:
        """Whether what it leaves out was changed since the root began.

        :raises WherryError: ``.wherryignore`` cannot be read, or understood.
        """
        if root.place.single or not root.path.is_dir():
            return False
        return self._rules(root.place.path).rules != root.place.ignore.rules

    def _rules(self, path: str) -> Ignore:
        inside = {
            posixpath.relpath(each, path): self._ignored.get(each, ())
            for each in sorted(self._numbers)
            if contains(path, each)
        }
        settings = self._ignored.get(path, ())
        return ignore_of(self._host_path(path), self._private, settings, inside)

    def _begin(self, path: str, single: bool, ignore: Ignore, writes: bool, first: bool) -> Session:
        number = self._numbers.get(path)
        if number is None:
            number = max(self._numbers.values(), default=0) + 1
            self._numbers[path] = number
            self._write()
        self._collect(path, number)
        here = self._host_path(path)
        root = Root(number, here, Place(id_of(number), path, single, ignore))
        log.info("synchronising %s", path)
        session = Session(
            root,
            Paths(self._state(number), self._database),
            self._connect,
            boot=self._boot,
            traits=traits_of(here),
            pins=[posixpath.relpath(each, path) for each in self._pins if contains(path, each)],
            writes=writes,
            first=first,
        )
        self._sessions = {**self._sessions, path: session}
        return session

    def _collect(self, path: str, number: int) -> None:
        """Have a root that begins know what those know that had its files before.

        :raises WherryError: the database cannot be read or written.
        """
        # Those around others come first: parents are remembered before what is in them.
        related = [each for each in sorted(self._numbers) if each != path and meet(each, path)]
        if not related:
            return
        with self._store(number) as store:
            for other in related:
                if contains(other, path):
                    store.take(self._numbers[other], posixpath.relpath(path, other), "")
                else:
                    store.take(self._numbers[other], "", posixpath.relpath(other, path))

    @contextmanager
    def _store(self, number: int) -> Iterator[Store]:
        try:
            with closing(Store(self._database, number)) as store:
                yield store
        except sqlite3.Error as error:
            raise WherryError(f"{self._database} cannot be written: {error}") from error

    def _state(self, number: int) -> Path:
        return self._directory / str(number)

    def _end(self, path: str) -> None:
        session = self._sessions[path]
        # What it has not carried over yet would look like a difference of unknown origin.
        session.ask(fresh=True).done.wait(_LAST_BARRIER_S)
        session.close()
        self._sessions = {key: each for key, each in self._sessions.items() if key != path}

    def _read(self) -> tuple[dict[str, int], set[str], dict[str, list[str]], set[str]]:
        path = self._directory / _FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            numbers = {str(root): int(number) for root, number in found["numbers"].items()}
            ignored = {
                str(root): [str(line) for line in lines]
                for root, lines in found.get("ignored", {}).items()
            }
            pins = {str(path) for path in found.get("pins", ())}
            return numbers, {str(root) for root in found["kept"]}, ignored, pins
        except FileNotFoundError:
            return {}, set(), {}, set()
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise WherryError(f"{path} cannot be read: {error}") from error

    def _write(self) -> None:
        found = {
            "numbers": self._numbers,
            "kept": sorted(self._kept),
            "ignored": self._ignored,
            "pins": sorted(self._pins),
        }
        write_atomic(self._directory / _FILE, json.dumps(found).encode())


def traits_of(path: Path) -> Traits:
    """Return what the host's filesystem at a path, or above it, can tell apart."""
    while not path.exists() and path != path.parent:
        path = path.parent
    for directory, name in _nearest(path):
        found = _is_case_sensitive(directory, name)
        if found is not None:
            return Traits(case_sensitive=found)
    return Traits()


def _nearest(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield directories and names in them, beginning with what is in a path itself.

    Another filesystem may be mounted there, and a directory may be an exception in its own one,
    so the names of what is around it are asked only if nothing in it can be.
    """
    yield from _some_names(path)
    while path != path.parent:
        # A neighbour's name tells as much, for one that has no letters.
        yield path.parent, path.name
        yield from _some_names(path.parent)
        path = path.parent


def _some_names(directory: Path) -> Iterator[tuple[Path, str]]:
    try:
        with os.scandir(directory) as entries:
            for entry in itertools.islice(entries, _NAMES_ASKED):
                yield directory, entry.name
    except OSError:
        # A file, or a directory that may not be read.
        return


def _is_case_sensitive(directory: Path, name: str) -> bool | None:
    """Return whether a name in a directory is another one in another case.

    :returns: None if that one cannot tell.
    """
    swapped = name.translate(_OTHER_CASE)
    if swapped == name:
        return None
    try:
        try:
            other = (directory / swapped).lstat()
        except FileNotFoundError:
            other = None
        # Afterwards, so that a file that is removed meanwhile is not taken for an answer.
        status = (directory / name).lstat()
        if other is None or not os.path.samestat(status, other):
            return True
        # Two names of one file, as a hard link makes them, are both listed.
        return any(each.name == swapped for each in directory.iterdir())
    except OSError:
        return None


def _has_any(path: str, others: Iterable[str]) -> bool:
    """Whether any of other paths is a path itself or in it."""
    return any(each == path or contains(path, each) for each in others)
