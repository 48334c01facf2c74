"""What a machine that runs takes at once of changed settings: the engine's, and certificates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wherry.core.bridge import in_thread
from wherry.core.errors import NotRunning, WherryError
from wherry.service.engine_settings import EngineSettings
from wherry.service.trust import Applied, Trust
from wherry.tunnel.tunnel import Tunnel


class Changes:
    """Serves the control requests for them.

    :param name: the machine's.
    :param tunnel: returns the way to the guest; None while the machine does not run.
    :param image: returns ``sha256`` of the image that the guest runs.
    """

    def __init__(
        self,
        name: str,
        trust: Trust,
        engine: EngineSettings,
        tunnel: Callable[[], Tunnel | None],
        image: Callable[[], Mapping[str, str]],
    ) -> None:
        self._name = name
        self._trust = trust
        self._engine = engine
        self._tunnel = tunnel
        self._image = image

    async def on_engine_settings(self, params: Mapping[str, Any], emit: Any) -> dict[str, Any]:
        """Have the engine take other settings (:meth:`EngineSettings.on_change`).

        They may be about a registry whose authority came with it, so what is trusted now goes
        first: one start of the engine is enough for both.

        :returns: ``certificates`` besides, as :meth:`on_certificates` has it.
        :raises WherryError: the engine refuses them, or cannot be asked.
        """
        try:
            trusted = await self._give()
        except NotRunning:
            raise
        except WherryError as error:
            trusted = Applied((str(error),), changed=False)
        begun = False
        try:
            done = await self._engine.on_change(params, emit)
            begun = bool(set(done["keys"]) - set(done["later"]))
        finally:
            certificates = await self._read(trusted, begun=begun)
        return {**done, "certificates": certificates}

    async def on_certificates(self, params: Mapping[str, Any], emit: Any) -> dict[str, Any]:
        """Take what is trusted now.

        :returns: ``problems``, one line each; whether something is ``changed`` that the engine
            reads when it starts, and whether it was ``restarted`` for it.
        :raises WherryError: the guest does not take it.
        """
        return await self._read(await self._give(), begun=False)

    async def _give(self) -> Applied:
        tunnel, image = self._tunnel(), self._image()
        if tunnel is None:
            raise NotRunning(f"machine {self._name} is not running yet")
        return await in_thread(lambda: self._trust.apply(tunnel, image), name="certificates")

    async def _read(self, trusted: Applied, *, begun: bool) -> dict[str, Any]:
        """Have the engine read the certificates, unless it has begun since they came."""
        changed = trusted.changed and not begun
        restarted = changed and await in_thread(self._engine.renew, name="engine restart")
        return {"problems": list(trusted.problems), "changed": changed, "restarted": restarted}
