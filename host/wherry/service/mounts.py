"""Bind mounts: which requests name paths of the host, and which wait for files to be equal.

Before a request goes on, what it will read in the guest is brought there from the host; before
an answer that tells of a process's end goes back, what the process wrote is brought to the host.

=========================================== ===================== =============================
request                                     before it             before its answer, or its end
=========================================== ===================== =============================
POST /containers/create, /volumes/create    sources are shared
POST start, restart, unpause                host to guest         guest to host (restart)
POST /exec/{id}/start                       host to guest         guest to host
GET /exec/{id}/json                                               guest to host, if it ended
GET /containers/{id}/json                                         guest to host, if it ended
GET, PUT, HEAD archive (docker cp)          host to guest         guest to host (PUT)
POST wait, stop, kill, attach; DELETE                             guest to host
GET logs                                                          guest to host
GET /events: die, exec_die, ...                                   guest to host
=========================================== ===================== =============================

A request is refused when its barrier cannot hold. What has been done cannot be, but who asked
is told, by the path's name, in the place where the docker CLI and the libraries look for it:

* the result of ``wait`` gets an ``Error`` beside its status, so ``docker run`` ends with 125;
* the answer to ``stop``, ``kill``, ``restart`` and ``PUT archive`` is an error;
* so is that to ``GET /exec/{id}/json``, where ``docker exec`` asks for the status, until a
  barrier holds; but not the first that says that the command has ended if no stream told of it.

The answer to ``DELETE`` is not, as the container is gone, nor are events and streams, which other
programs than ours read, nor what a container is asked for. The log and ``wherry sync status`` have
all of it. A conflict that came up while the request was under way is such a failure of what the
container wrote: the host has its own version, and the container's is kept.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from wherry.api.hooks import DEFAULT_BODY_LIMIT_BYTES, Hooks, Refusal, Request, Watch
from wherry.api.http import ResponseHead
from wherry.core.errors import WherryError
from wherry.service.mounted import KNOWN, Mounted
from wherry.service.shared import Shared, json_object, parse_json
from wherry.sync import sources
from wherry.sync.barrier import hold_required
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.drives import of_container, of_volume
from wherry.sync.extent import meet
from wherry.sync.roots import Roots
from wherry.sync.session import Session
from wherry.sync.sources import Source
from wherry.tunnel.tunnel import Tunnel

log = logging.getLogger(__name__)

V = TypeVar("V")

_BY_STREAM = object()
"""An end that a stream has told of."""

_MULTIPLEXED = "application/vnd.docker.multiplexed-stream"
"""The kind of stream of a command without a terminal, from API 1.42 on. The engine ends it when it
knows that the command has ended, though that has closed its outputs before; what has a terminal can
be left meanwhile (Engine API, ExecStart; moby's ``daemon/monitor.go``, ``ProcessEvent``)."""

_BOTH_SIDES = "was changed on both sides"

_RUNNING = ("running", "paused", "restarting")

_ENDINGS = (b'"die"', b'"exec_die"', b'"stop"', b'"kill"', b'"destroy"', b'"oom"')


class Mounts:
    """The hooks of bind mounts.

    :param shared: the host's directories that containers may mount from.
    :param drives: whether the host's paths begin with a drive's letter: see :mod:`drives
        <wherry.sync.drives>`. What is said of paths below is said of the guest's.
    """

    def __init__(
        self,
        hooks: Hooks,
        roots: Roots,
        tunnel: Tunnel,
        shared: Iterable[str],
        *,
        drives: bool = False,
    ) -> None:
        self._roots = roots
        self._shared = Shared(roots, tunnel, shared, drives=drives)
        self._host_path = self._shared.host_path
        self._known = Mounted(tunnel)
        self._used: set[Source] = set()
        self._lock = threading.Lock()
        self._unfetched: dict[str, tuple[list[Source], str]] = {}
        # Of commands and containers by their id, up to which end their changes were brought.
        self._brought: dict[str, object] = {}
        on = hooks.on
        on("POST", "/containers/create", self._create, body_limit=DEFAULT_BODY_LIMIT_BYTES)
        on("POST", "/volumes/create", self._create_volume, body_limit=DEFAULT_BODY_LIMIT_BYTES)
        on("POST", "/containers/{id}/rename", self._rename)
        on("POST", "/containers/{id}/exec", self._create_exec)
        for action in ("start", "unpause"):
            on("POST", f"/containers/{{id}}/{action}", self._before)
        on("POST", "/containers/{id}/restart", self._around)
        on("POST", "/exec/{exec}/start", self._exec)
        on("GET", "/exec/{exec}/json", self._exec_result)
        on("GET", "/containers/{id}/json", self._inspect)
        for method in ("GET", "HEAD"):
            on(method, "/containers/{id}/archive", self._before)
        on("PUT", "/containers/{id}/archive", self._around)
        for action in ("stop", "kill"):
            on("POST", f"/containers/{{id}}/{action}", self._after)
        on("DELETE", "/containers/{id}", self._remove)
        on("POST", "/containers/{id}/wait", self._wait)
        on("POST", "/containers/{id}/attach", self._until_end)
        on("GET", "/containers/{id}/attach/ws", self._until_end)
        on("GET", "/containers/{id}/logs", self._until_end)
        on("GET", "/events", self._events)

    def restore(self) -> None:
        """Learn of the containers that there are, and go on with what running ones mount.

        :raises WherryError: the engine does not tell.
        """
        found = list(map(Source, self._roots.kept))
        is_known = False
        try:
            found += _running(self._known.fetch())
            is_known = True
        finally:
            # If the engine does not tell who may write, anybody may.
            found += [Source(path, read_only=is_known) for path in self._roots.with_conflicts]
            # Those that may have written come first, as what they wrote is still to come.
            for source in sorted(found, key=lambda source: source.read_only):
                self._resume(source)

    def tidy(self) -> None:
        """End the roots that no container mounts, nor did when this was called last.

        So a directory that is mounted by one short container after the other stays ready. Those
        that are mounted to read alone are not written to any more.

        :raises WherryError: the engine does not tell.
        """
        if not self._roots.all():
            return
        containers = self._known.fetch()
        for source in _running(containers):
            # One that was not known when the service began may have written.
            if not source.read_only and self._roots.was_written(source.path) is False:
                self._resume(source)
        used = {source for _, found in containers for source in found}
        before, self._used = self._used, used
        both = used | before
        self._roots.release(
            {source.path for source in both},
            {source.path for source in both if not source.read_only},
        )

    def _resume(self, source: Source) -> None:
        if not self._shared.has(source.path):
            return
        try:
            if not self._host_path(source.path).exists():
                return
            self._roots.require(source.path, read_only=source.read_only)
        except (OSError, WherryError) as error:
            log.warning("%s is not synchronised: %s", source.path, error)

    # Making containers and volumes

    def _create(self, request: Request) -> Watch | None:
        body = self._shared.rewritten(request, of_container)
        found = [*sources.of_container(body), *self._known.of_volumes(sources.volumes_of(body))]

        # Before one of them is shared, after which somebody may write.
        firsts = self._firsts(found)

        def shared() -> Iterator[Session]:
            for source in _outer_first(found):
                session = self._shared.share(source, first=source in firsts)
                if session is not None:
                    yield session

        self._bring(request, shared)
        name = (request.query.get("name") or [""])[0]
        inherits = sources.inherits(body)

        def created(line: bytes) -> None:
            id = parse_json(line).get("Id")
            if inherits:
                # What the others mount the engine will tell when it is asked about this one.
                self._known.forget_name(name)
            elif isinstance(id, str) and id:
                self._known.learn(id, found, name)

        return Watch(line=created)

    def _firsts(self, found: Iterable[Source]) -> set[Source]:
        """Return those that nobody can have written to whose root is not known to be written to."""
        firsts = {source for source in found if not source.read_only}
        unsure = {source for source in firsts if self._roots.was_written(source.path) is False}
        if not unsure:
            return firsts
        try:
            containers = self._known.fetch()
        except WherryError:
            return firsts - unsure
        written = [each.path for each in _running(containers) if not each.read_only]
        for source in unsure:
            session = self._roots.holding(source.path)
            root = source.path if session is None else session.root.place.path
            if any(meet(path, root) for path in written):
                firsts.discard(source)
        return firsts

    def _create_volume(self, request: Request) -> Watch | None:
        body = self._shared.rewritten(request, of_volume)
        found = sources.of_volume(body)
        firsts = self._firsts(found)
        for source in found:
            self._shared.share(source, first=source in firsts)

        def created(line: bytes) -> None:
            self._known.learn_volume(parse_json(line).get("Name"), body)

        return Watch(line=created) if found else None

    # Barriers

    def _before(self, request: Request) -> None:
        mounted = self._mounted(request, request.params["id"], needed=True)
        self._bring(request, lambda: self._sessions(mounted))

    def _around(self, request: Request) -> Watch | None:
        self._before(request)
        return self._after(request)

    def _after(self, request: Request) -> Watch | None:
        # Asked now and not when the answer comes: the container may be gone by then.
        mounted = self._mounted(request, request.params["id"])
        marks = self._marks(mounted)

        def answered(head: ResponseHead) -> None:
            if head.status >= 400:
                return
            failure = self._fetch(request, mounted, marks)
            if failure:
                raise Refusal(500, f"that is done, but {failure}")

        return Watch(head=answered) if mounted else None

    def _remove(self, request: Request) -> Watch | None:
        mounted = self._mounted(request, request.params["id"])
        self._known.forget_name(request.params["id"])
        return _then(lambda: self._fetch(request, mounted)) if mounted else None

    def _wait(self, request: Request) -> Watch | None:
        mounted = self._mounted(request, request.params["id"])
        marks = self._marks(mounted)

        def ended(line: bytes) -> bytes | None:
            failure = self._fetch(request, mounted, marks)
            result = parse_json(line)
            if not failure or result.get("Error"):
                return None
            return json.dumps({**result, "Error": {"Message": failure}}).encode()

        return Watch(line=ended) if mounted else None

    def _until_end(self, request: Request) -> Watch | None:
        mounted = self._mounted(request, request.params["id"])

        def ended(whole: bool) -> None:
            self._fetch(request, mounted)

        return Watch(end=ended) if mounted else None

    def _events(self, request: Request) -> Watch | None:
        def event(line: bytes) -> None:
            if any(word in line for word in _ENDINGS):
                id = str(json_object(parse_json(line).get("Actor")).get("ID", ""))
                self._fetch(request, self._mounted(request, id, ask=False))

        return Watch(line=event)

    def _create_exec(self, request: Request) -> Watch | None:
        container = request.params["id"]
        # The docker CLI shows why this is refused, but not why the start is.
        mounted = self._mounted(request, container, needed=True)
        self._bring(request, lambda: (each for each in self._sessions(mounted) if each.is_troubled))

        def created(line: bytes) -> None:
            self._known.learn_exec(parse_json(line).get("Id"), container)

        return Watch(line=created)

    def _exec(self, request: Request) -> Watch | None:
        id = request.params["exec"]
        container = self._known.take_exec(id)
        if container is None:
            # Made before this service began: whatever it is, all roots are more than enough. One
            # that nobody mounts to write is not written to for its sake.
            mounted = [
                Source(session.root.place.path, read_only=not session.writes)
                for session in self._roots.all()
            ]
        else:
            mounted = self._mounted(request, container, needed=True)
        if not mounted:
            return None
        self._bring(request, lambda: self._sessions(mounted))
        marks = self._marks(mounted)
        attached = False

        def answered(head: ResponseHead) -> None:
            nonlocal attached
            attached = head.status == 101 and head.header("content-type") == _MULTIPLEXED

        def ended(whole: bool) -> None:
            failure = self._fetch(request, mounted, marks)
            if failure:
                self._note(self._unfetched, id, (mounted, failure))
            elif attached and whole:
                self._note(self._brought, id, _BY_STREAM)

        return Watch(head=answered, end=ended)

    def _exec_result(self, request: Request) -> Watch | None:
        id = request.params["exec"]
        with self._lock:
            mounted, failure = self._unfetched.get(id, ([], ""))
        if failure:
            now = self._fetch(request, mounted)
            if not now:
                with self._lock:
                    self._unfetched.pop(id, None)
            if now or _BOTH_SIDES in failure:
                raise Refusal(500, f"the command has ended, but {now or failure}")

        def answered(line: bytes) -> None:
            command = parse_json(line)
            if command.get("Running"):
                # Whatever has ended its stream, it goes on.
                with self._lock:
                    self._brought.pop(id, None)
            elif command.get("Running") is False:
                mounted, failure = self._bring_ended(
                    request, id, str(command.get("ContainerID")), command.get("ExitCode")
                )
                if failure:
                    self._note(self._unfetched, id, (mounted, failure))

        return self._unless_idle(answered)

    def _inspect(self, request: Request) -> Watch | None:
        def answered(line: bytes) -> None:
            container = parse_json(line)
            state = json_object(container.get("State"))
            # One that was never started has no exit status of its own, but a time all the same.
            if state.get("Running") is False and state.get("Status") != "created":
                id = str(container.get("Id"))
                self._bring_ended(request, id, id, state.get("FinishedAt"))

        return self._unless_idle(answered)

    def _unless_idle(self, line: Callable[[bytes], None]) -> Watch | None:
        return Watch(line=line) if self._roots.all() else None

    def _bring_ended(
        self, request: Request, id: str, container: str, end: object
    ) -> tuple[list[Source], str]:
        """Have on the host what a process wrote before it ended, once for each end.

        What is not synchronised now is left alone: it may have ended long ago.

        :param end: what is another one for another end.
        :returns: what it mounts, and why that failed, if it did.
        """
        with self._lock:
            if self._brought.get(id, self) in (end, _BY_STREAM):
                return [], ""
        mounted = [
            source
            for source in self._mounted(request, container)
            if self._roots.holding(source.path)
        ]
        failure = self._fetch(request, mounted) if mounted else ""
        self._note(self._brought, id, end)
        return mounted, failure

    def _note(self, notes: dict[str, V], id: str, value: V) -> None:
        """Keep something of a command or container, and not of too many."""
        with self._lock:
            notes[id] = value
            while len(notes) > KNOWN:
                del notes[next(iter(notes))]

    def _rename(self, request: Request) -> None:
        self._known.forget_names()

    def _mounted(
        self, request: Request, name: str, *, needed: bool = False, ask: bool = True
    ) -> list[Source]:
        """Return what a container mounts of the host; see :meth:`Mounted.of_container`.

        :param needed: the request cannot go on without.
        """
        found = self._known.of_container(name, request.wait if ask else None)
        if found is None:
            if needed:
                raise Refusal(503, f"the engine does not tell what container {name} mounts")
            found = []
        return [source for source in found if self._shared.has(source.path)]

    def _sessions(self, mounted: Iterable[Source]) -> Iterator[Session]:
        """Yield the sessions of what a container mounts, begun again if need be.

        :raises WherryError: in the iterator: one is not there, or cannot be begun.
        """
        for source in _outer_first(mounted):
            path = self._host_path(source.path)
            try:
                if not path.exists() and not self._roots.holding(source.path):
                    raise WherryError(
                        f"{path} is not there, so it is not synchronised",
                        hint="bring it back, or make the container anew",
                    )
                session = self._roots.require(source.path, read_only=source.read_only)
            except OSError as error:
                raise WherryError(f"{path} is not synchronised: {error.strerror}") from error
            yield session

    def _bring(self, request: Request, sessions: Callable[[], Iterable[Session]]) -> None:
        """Have what is on the host now in the guest.

        :raises Refusal: that is not possible.
        """
        try:
            hold_required(sessions, fresh=True, side=GUEST, wait=request.wait)
        except WherryError as error:
            raise Refusal(500, str(error)) from error

    def _fetch(
        self,
        request: Request,
        mounted: Iterable[Source],
        marks: Iterable[tuple[Session, int]] = (),
    ) -> str:
        """Have what is in the guest now on the host; return why not, which is logged as well.

        :param marks: how many conflicts there were before: a new one is a reason too.
        """
        try:
            hold_required(
                lambda: self._sessions(mounted), fresh=False, side=HOST, wait=request.wait
            )
        except WherryError as error:
            log.warning("%s", error)
            return str(error)
        paths = [path for session, mark in marks for path in session.conflicts_since(mark)]
        if not paths:
            return ""
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        return (
            f"{paths[0]}{others} {_BOTH_SIDES}; this computer's version stays, and the"
            " container's is kept: see: wherry sync conflicts"
        )

    def _marks(self, mounted: Iterable[Source]) -> list[tuple[Session, int]]:
        found = {self._roots.holding(source.path) for source in mounted}
        return [(session, session.conflict_count) for session in found if session is not None]


def _outer_first(mounted: Iterable[Source]) -> list[Source]:
    """Return sources in an order in which no root takes the place of one before it."""
    return sorted(mounted, key=lambda source: source.path)


def _running(containers: Iterable[tuple[str, list[Source]]]) -> list[Source]:
    """Return what those containers mount that may be at work."""
    return [source for state, found in containers for source in found if state in _RUNNING]


def _then(function: Callable[[], object]) -> Watch:
    """Return what calls a function before the client gets the answer's head."""

    def answered(head: ResponseHead) -> None:
        function()

    return Watch(head=answered)
