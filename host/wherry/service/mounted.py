"""What the engine's containers mount from the host, as far as it went through our hands."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from wherry.core.errors import WherryError
from wherry.service import engine
from wherry.sync import sources
from wherry.sync.sources import Source
from wherry.tunnel.tunnel import Tunnel

log = logging.getLogger(__name__)

KNOWN = 4096
"""Containers that are remembered, so that the engine need not be asked about them."""


class Mounted:
    """Remembers containers, volumes and execs; the engine is asked about others. Any thread."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._lock = threading.Lock()
        self._containers: dict[str, list[Source]] = {}
        self._names: dict[str, str] = {}
        self._execs: dict[str, str] = {}
        self._volumes: dict[str, Source] = {}

    def fetch(self) -> list[tuple[str, list[Source]]]:
        """Ask the engine for all containers: the state of each, and what it mounts.

        :raises WherryError: it does not tell.
        """
        volumes = engine.fetch(self._tunnel.open_unix(engine.SOCKET), "/volumes")
        for volume in volumes.get("Volumes") or ():
            self.learn_volume(volume.get("Name"), {"DriverOpts": volume.get("Options") or {}})
        found = []
        for container in engine.fetch(
            self._tunnel.open_unix(engine.SOCKET), "/containers/json?all=1"
        ):
            mounted = self._with_volumes(container)
            self.learn(container["Id"], mounted)
            found.append((str(container.get("State")), mounted))
        return found

    def learn(self, id: str, found: list[Source], name: str = "") -> None:
        """Remember a container."""
        with self._lock:
            self._containers[id] = found
            if name:
                self._names[name] = id
            for known in (self._containers, self._names):
                # The engine can be asked again about what is forgotten.
                while len(known) > KNOWN:
                    del known[next(iter(known))]

    def learn_volume(self, name: object, body: Mapping[str, Any]) -> None:
        """Remember what a volume binds, from the body that made it."""
        for source in sources.of_volume(body):
            if isinstance(name, str):
                with self._lock:
                    self._volumes[name] = source

    def learn_exec(self, id: object, container: str) -> None:
        """Remember in which container a command will run."""
        if isinstance(id, str):
            with self._lock:
                self._execs[id] = container

    def take_exec(self, id: str) -> str | None:
        """Return the container of a command that is about to run; once."""
        with self._lock:
            return self._execs.pop(id, None)

    def forget_name(self, name: str) -> None:
        """Learn that a name may be another container's from now on."""
        with self._lock:
            self._names.pop(name, None)

    def forget_names(self) -> None:
        """Learn that any name may be another container's."""
        with self._lock:
            self._names.clear()

    def of_volumes(self, names: Iterable[str]) -> list[Source]:
        """Return what volumes bind."""
        with self._lock:
            return [self._volumes[name] for name in names if name in self._volumes]

    def of_container(self, name: str, wait: engine.Wait | None) -> list[Source] | None:
        """Return what a container mounts; None if the engine does not tell.

        :param name: its id, a prefix of it, or its name.
        :param wait: waits for the engine to be asked about one that is not known; None for
            one that is not known to mount nothing.
        """
        with self._lock:
            id = self._names.get(name, name)
            found = self._containers.get(id)
            if found is None:
                matching = [key for key in self._containers if key.startswith(id)]
                found = self._containers[matching[0]] if len(matching) == 1 else None
        if found is not None:
            return found
        return self._inspect(name, wait) if wait is not None else []

    def _with_volumes(self, container: Mapping[str, Any]) -> list[Source]:
        names = [
            str(mount.get("Name"))
            for mount in container.get("Mounts") or ()
            if mount.get("Type") == "volume"
        ]
        return [*sources.of_inspected(container), *self.of_volumes(names)]

    def _inspect(self, name: str, wait: engine.Wait) -> list[Source] | None:
        try:
            container = engine.while_wanted(
                wait,
                lambda: self._tunnel.open_unix(engine.SOCKET),
                lambda stream: engine.inspect(stream, name),
            )
        except WherryError as error:
            log.warning("what container %s mounts is not known: %s", name, error)
            return None
        if container is None:
            return []  # the engine's own answer to the request will tell
        found = self._with_volumes(container)
        self.learn(container["Id"], found, name)
        return found
