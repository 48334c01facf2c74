"""Bind mounts: which requests name paths of the host, and which wait for files to be equal.

Before a request goes on, what it will read in the guest is brought there from the host; before
an answer that tells of a process's end goes back, what the process wrote is brought to the host.

=========================================== ===================== =============================
request                                     before it             before its answer, or its end
=========================================== ===================== =============================
POST /containers/create, /volumes/create    sources are shared
POST start, restart, unpause                host to guest         guest to host (restart)
POST /exec/{id}/start                       host to guest         guest to host
GET, PUT, HEAD archive (docker cp)          host to guest         guest to host (PUT)
POST wait, stop, kill, attach; DELETE                             guest to host
GET logs                                                          guest to host
GET /events: die, exec_die, ...                                   guest to host
=========================================== ===================== =============================

A request is refused when its barrier cannot hold. An answer is not: the process has ended, and
nothing that is said instead of its status would help; the failure is in the log and in
``wherry sync status``.
"""

from __future__ import annotations

import json
import logging
import shlex
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wherry.api.hooks import DEFAULT_BODY_LIMIT_BYTES, Hooks, Refusal, Request, Watch
from wherry.core.errors import WherryError
from wherry.service import engine
from wherry.sync import sources
from wherry.sync.barrier import hold
from wherry.sync.roots import Roots
from wherry.sync.session import Session
from wherry.sync.sources import Source
from wherry.tunnel.tunnel import Tunnel

log = logging.getLogger(__name__)

_KNOWN = 4096
"""Containers that are remembered, so that the engine need not be asked about them."""

_ENGINE_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock")
"""Who mounts these wants the engine that the container runs in, whatever is shared."""

_QUESTION_S = 10.0
_ENDINGS = (b'"die"', b'"exec_die"', b'"stop"', b'"kill"', b'"destroy"', b'"oom"')


class Mounts:
    """The hooks of bind mounts.

    :param shared: the host's directories that containers may mount from.
    """

    def __init__(self, hooks: Hooks, roots: Roots, tunnel: Tunnel, shared: Iterable[str]) -> None:
        self._roots = roots
        self._tunnel = tunnel
        self._shared = tuple(path.rstrip("/") or "/" for path in shared)
        self._lock = threading.Lock()
        self._containers: dict[str, list[Source]] = {}
        self._names: dict[str, str] = {}
        self._execs: dict[str, str] = {}
        self._volumes: dict[str, Source] = {}
        on = hooks.on
        on("POST", "/containers/create", self._create, body_limit=DEFAULT_BODY_LIMIT_BYTES)
        on("POST", "/volumes/create", self._create_volume, body_limit=DEFAULT_BODY_LIMIT_BYTES)
        on("POST", "/containers/{id}/rename", self._rename)
        on("POST", "/containers/{id}/exec", self._create_exec)
        for action in ("start", "unpause"):
            on("POST", f"/containers/{{id}}/{action}", self._before)
        on("POST", "/containers/{id}/restart", self._around)
        on("POST", "/exec/{exec}/start", self._exec)
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
        for path in self._roots.kept:
            self._resume(Source(path))
        volumes = engine.fetch(self._tunnel.open_unix(engine.SOCKET), "/volumes")
        for volume in volumes.get("Volumes") or ():
            self._learn_volume(volume.get("Name"), {"DriverOpts": volume.get("Options") or {}})
        for container in engine.fetch(
            self._tunnel.open_unix(engine.SOCKET), "/containers/json?all=1"
        ):
            found = self._with_volumes(container)
            self._learn(container["Id"], found)
            if container.get("State") in ("running", "paused", "restarting"):
                for source in found:
                    self._resume(source)

    def _resume(self, source: Source) -> None:
        if not self._is_shared(source.path) or not Path(source.path).exists():
            return
        try:
            self._roots.require(source.path, read_only=source.read_only)
        except (OSError, WherryError) as error:
            log.warning("%s is not synchronised: %s", source.path, error)

    def _learn(self, id: str, found: list[Source], name: str = "") -> None:
        with self._lock:
            self._containers[id] = found
            if name:
                self._names[name] = id
            for known in (self._containers, self._names):
                # The engine can be asked again about what is forgotten.
                while len(known) > _KNOWN:
                    del known[next(iter(known))]

    # Making containers and volumes

    def _create(self, request: Request) -> Watch | None:
        body = _json(request.body)
        found = [*sources.of_container(body), *self._named(sources.volumes_of(body))]
        self._bring(request, [self._share(request, source) for source in found])
        name = (request.query.get("name") or [""])[0]

        def created(line: bytes) -> None:
            id = _json(line).get("Id")
            if isinstance(id, str) and id:
                self._learn(id, found, name)

        return Watch(line=created)

    def _create_volume(self, request: Request) -> Watch | None:
        body = _json(request.body)
        found = sources.of_volume(body)
        for source in found:
            self._share(request, source)

        def created(line: bytes) -> None:
            self._learn_volume(_json(line).get("Name"), body)

        return Watch(line=created) if found else None

    def _learn_volume(self, name: object, body: Mapping[str, Any]) -> None:
        for source in sources.of_volume(body):
            if isinstance(name, str):
                with self._lock:
                    self._volumes[name] = source

    def _named(self, names: Iterable[str]) -> list[Source]:
        with self._lock:
            return [self._volumes[name] for name in names if name in self._volumes]

    def _with_volumes(self, container: Mapping[str, Any]) -> list[Source]:
        names = [
            str(mount.get("Name"))
            for mount in container.get("Mounts") or ()
            if mount.get("Type") == "volume"
        ]
        return [*sources.of_inspected(container), *self._named(names)]

    def _is_shared(self, path: str) -> bool:
        return path not in _ENGINE_SOCKETS and any(
            path == root or path.startswith("/" if root == "/" else f"{root}/")
            for root in self._shared
        )

    def _share(self, request: Request, source: Source) -> Session | None:
        """Begin to keep a source equal; None if it is the guest's own."""
        path = Path(source.path)
        if not self._is_shared(source.path):
            self._check_guest(source.path)
            return None
        try:
            try:
                mode = path.stat().st_mode
            except FileNotFoundError:
                if not source.create:
                    raise Refusal(
                        400,
                        'invalid mount config for type "bind": '
                        f"bind source path does not exist: {source.path}",
                    ) from None
                path.mkdir(parents=True)
                mode = path.stat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise Refusal(
                    400,
                    f"{source.path} is neither a file nor a directory; sockets and devices of"
                    " this computer cannot be mounted into containers",
                )
            return self._roots.require(source.path, read_only=source.read_only)
        except OSError as error:
            raise Refusal(500, f"{source.path} cannot be shared: {error.strerror}") from error
        except WherryError as error:
            raise Refusal(500, str(error)) from error

    def _check_guest(self, path: str) -> None:
        """Refuse a path that is nowhere: the engine would make an empty directory of it."""
        try:
            done = self._tunnel.run(f"test -e {shlex.quote(path)}", timeout_s=_QUESTION_S)
        except WherryError as error:
            raise Refusal(503, str(error)) from error
        if done.status != 0:
            raise Refusal(
                400,
                f"{path} is not in a directory that is shared with containers; to share it:"
                f" wherry config set sync.shared {':'.join((*self._shared, path))}",
            )

    # Barriers

    def _before(self, request: Request) -> None:
        self._bring(
            request, self._sessions(self._mounted(request, request.params["id"], needed=True))
        )

    def _around(self, request: Request) -> Watch | None:
        self._before(request)
        return self._after(request)

    def _after(self, request: Request) -> Watch | None:
        # Asked now and not when the answer comes: the container may be gone by then.
        mounted = self._mounted(request, request.params["id"])
        return Watch(head=lambda head: self._fetch(request, mounted)) if mounted else None

    def _remove(self, request: Request) -> Watch | None:
        watch = self._after(request)
        with self._lock:
            # The name may be another container's from now on.
            self._names.pop(request.params["id"], None)
        return watch

    def _wait(self, request: Request) -> Watch | None:
        mounted = self._mounted(request, request.params["id"])
        return Watch(line=lambda line: self._fetch(request, mounted)) if mounted else None

    def _until_end(self, request: Request) -> Watch | None:
        mounted = self._mounted(request, request.params["id"])
        return Watch(end=lambda whole: self._fetch(request, mounted)) if mounted else None

    def _events(self, request: Request) -> Watch | None:
        def event(line: bytes) -> None:
            if any(word in line for word in _ENDINGS):
                id = _json(line).get("Actor", {}).get("ID", "")
                self._fetch(request, self._mounted(request, str(id), known=True))

        return Watch(line=event)

    def _create_exec(self, request: Request) -> Watch | None:
        container = request.params["id"]
        # The docker CLI shows why this is refused, but not why the start is.
        sessions = self._sessions(self._mounted(request, container, needed=True))
        self._bring(request, (each for each in sessions if each.is_troubled))

        def created(line: bytes) -> None:
            id = _json(line).get("Id")
            if isinstance(id, str):
                with self._lock:
                    self._execs[id] = container

        return Watch(line=created)

    def _exec(self, request: Request) -> Watch | None:
        with self._lock:
            container = self._execs.pop(request.params["exec"], None)
        if container is None:
            # Made before this service began: whatever it is, all roots are more than enough.
            self._bring(request, self._roots.all())
            return Watch(end=lambda whole: hold(self._roots.all(), fresh=False, wait=request.wait))
        mounted = self._mounted(request, container, needed=True)
        if not mounted:
            return None
        self._bring(request, self._sessions(mounted))
        return Watch(end=lambda whole: self._fetch(request, mounted))

    def _rename(self, request: Request) -> None:
        with self._lock:
            self._names.clear()

    def _mounted(
        self, request: Request, name: str, *, needed: bool = False, known: bool = False
    ) -> list[Source]:
        """Return what a container mounts; the engine is asked once about one that is not known.

        :param needed: the request cannot go on without.
        :param known: do not ask; what is not known mounts nothing.
        """
        with self._lock:
            id = self._names.get(name, name)
            found = self._containers.get(id)
            if found is None:
                matching = [key for key in self._containers if key.startswith(id)]
                found = self._containers[matching[0]] if len(matching) == 1 else None
        if found is None:
            found = [] if known else self._inspect(request, name)
        if found is None:
            if needed:
                raise Refusal(503, f"the engine does not tell what container {name} mounts")
            found = []
        return [source for source in found if self._is_shared(source.path)]

    def _sessions(self, mounted: Iterable[Source]) -> Iterator[Session]:
        """Yield the sessions of what a container mounts, begun again if need be.

        :raises WherryError: in the iterator: one cannot be begun.
        """
        for source in mounted:
            if Path(source.path).exists() or self._roots.holding(source.path):
                yield self._roots.require(source.path, read_only=source.read_only)

    def _inspect(self, request: Request, name: str) -> list[Source] | None:
        """Ask the engine what a container mounts; None if it does not tell."""
        try:
            container = engine.while_wanted(
                request.wait,
                lambda: self._tunnel.open_unix(engine.SOCKET),
                lambda stream: engine.inspect(stream, name),
            )
        except WherryError as error:
            log.warning("what container %s mounts is not known: %s", name, error)
            return None
        if container is None:
            return []  # the engine's own answer to the request will tell
        found = self._with_volumes(container)
        self._learn(container["Id"], found, name)
        return found

    def _bring(self, request: Request, sessions: Iterable[Session | None]) -> None:
        """Have what is on the host now in the guest.

        :raises Refusal: that is not possible.
        """
        try:
            hold([each for each in sessions if each is not None], fresh=True, wait=request.wait)
        except WherryError as error:
            raise Refusal(500, str(error)) from error

    def _fetch(self, request: Request, mounted: Iterable[Source]) -> None:
        """Have what is in the guest now on the host; a failure is logged."""
        try:
            hold(self._sessions(mounted), fresh=False, wait=request.wait)
        except WherryError as error:
            log.warning("%s", error)


def _json(data: bytes | None) -> dict[str, Any]:
    """Return a JSON object; an empty one for anything else, which the engine will refuse."""
    try:
        found = json.loads(data or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
