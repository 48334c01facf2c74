"""The engine's own settings: from ``config.toml`` into the guest's ``daemon.json``.

``config.toml`` is their only source. At a start the guest is given the file ``daemon.json``
of the machine's directory, which from then on tells what the engine was given last; a change
while the machine runs goes through the agent, which has the engine check it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from wherry.config.engine_keys import LIVE, render
from wherry.config.layout import MachinePaths
from wherry.config.model import Config
from wherry.config.proxy import mask
from wherry.core.bridge import in_thread
from wherry.core.errors import WherryError
from wherry.core.files import write_atomic
from wherry.service import proxies
from wherry.service.guest import Guest

HOLD_S = 400.0
"""How long a client of the engine waits for a change to end; longer than one takes."""


def wanted(engine: Mapping[str, Any], for_engine: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``daemon.json`` shall say.

    :param for_engine: the object ``proxies`` in it.
    """
    return {**engine, **({"proxies": dict(for_engine)} if for_engine else {})}


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """Return the keys that differ between two ``daemon.json``."""
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def spare_containers(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """Return the part of a change that running containers can go on under, and the other keys.

    Those keep their old values in the first.
    """
    later = changed(old, new) - LIVE
    now = {key: value for key, value in new.items() if key not in later}
    return {**now, **{key: old[key] for key in later & old.keys()}}, later


class EngineSettings:
    """Gives a machine's engine its settings."""

    def __init__(self, paths: MachinePaths) -> None:
        self.file = paths.directory / "daemon.json"
        """What the engine was given last."""
        self.warning = ""
        """What is wrong with those that the guest has booted with."""
        self._guest: Guest | None = None
        self._changing = threading.Lock()
        self._settled = threading.Event()
        self._settled.set()

    def write(self, config: Config) -> None:
        """Write what a guest that boots is given."""
        found = proxies.for_guest(config.proxy, proxies.system())
        self._keep(wanted(config.engine, proxies.for_engine(found)))

    def attach(self, guest: Guest) -> None:
        """Have changes made through this guest from now on."""
        self._guest = guest

    def wait(self) -> None:
        """Wait for the end of a change that is under way, in which the engine does not answer."""
        self._settled.wait(HOLD_S)

    async def on_change(self, params: Mapping[str, Any], emit: Any) -> dict[str, Any]:
        """Serve the control request ``engine_settings``, whose events are those of a stage.

        :param params: ``engine``, the table of that name; ``proxies`` for ``daemon.json``, or
            None to leave them as they are.
        :returns: ``keys`` that have changed, ``later`` with those that need the machine's next
            start, and a ``note``.
        :raises WherryError: the engine refuses them, or cannot be asked.
        """
        emit({"stage": "settings", "state": "begin"})
        done = await in_thread(
            lambda: self._change(params["engine"], params["proxies"]), name="engine settings"
        )
        emit({"stage": "settings", "state": "end"})
        return done

    def _change(
        self, engine: Mapping[str, Any], for_engine: Mapping[str, str] | None
    ) -> dict[str, Any]:
        guest = self._guest
        if guest is None:
            raise WherryError("the machine is not running yet", hint="repeat the command")
        with self._changing:
            old = self._given()
            new = wanted(engine, old.get("proxies", {}) if for_engine is None else for_engine)
            keys, note = changed(old, new), ""
            if not keys:
                return {"keys": [], "later": [], "note": ""}
            self._settled.clear()
            try:
                live, later = spare_containers(old, new)
                applied, note = guest.set_engine(render(new), live=not later)
                if not applied and later != keys:
                    # Now the part that no container has to be stopped for.
                    applied, note = guest.set_engine(render(live), live=True)
                    new = live
                elif applied:
                    later = set()
                if applied:
                    self._keep(new)
                    self.warning = ""
                else:
                    later = keys
            except WherryError as error:
                raise WherryError(mask(error.message), hint=error.hint) from error
            finally:
                self._settled.set()
        return {"keys": sorted(keys), "later": sorted(later), "note": note}

    def renew(self) -> bool:
        """Have the engine start anew with what it has, for what else it reads only then.

        :returns: whether it did; not when its containers would have to be stopped for it.
        :raises WherryError: the machine is not running yet, or the engine did not come back.
        """
        guest = self._guest
        if guest is None:
            raise WherryError("the machine is not running yet", hint="repeat the command")
        with self._changing:
            self._settled.clear()
            try:
                applied, _ = guest.set_engine(render(self._given()), live=True)
            finally:
                self._settled.set()
        return applied

    def _given(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.file.read_bytes())
            return found
        except (OSError, ValueError):
            return {}  # the machine was started by a wherry that gave none

    def _keep(self, settings: Mapping[str, Any]) -> None:
        write_atomic(self.file, render(settings).encode())
