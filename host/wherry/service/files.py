"""The machine's files: what of the host containers mount, kept equal to its copies in the guest."""

from __future__ import annotations

import asyncio
import logging

from wherry.api.hooks import Hooks
from wherry.config.layout import Layout, MachinePaths
from wherry.config.model import Config
from wherry.core.bridge import in_thread
from wherry.core.errors import NotRunning, WherryError
from wherry.service import shutdown
from wherry.service.guest import Guest
from wherry.service.mounts import Mounts
from wherry.sync.drives import host_path
from wherry.sync.remote import RemoteEndpoint
from wherry.sync.roots import Roots
from wherry.tunnel.tunnel import Tunnel

log = logging.getLogger(__name__)

_TIDY_S = 300.0


class Files:
    """Owns the machine's roots and the hooks that hold requests for them.

    :param hooks: gets the hooks once :meth:`serve` is called.
    """

    def __init__(self, layout: Layout, paths: MachinePaths, hooks: Hooks) -> None:
        self._layout = layout
        self._paths = paths
        self._hooks = hooks
        self._roots: Roots | None = None
        self._mounts: Mounts | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._disconnecting: set[asyncio.Task[None]] = set()

    @property
    def roots(self) -> Roots:
        """The running machine's roots.

        :raises NotRunning: it does not run yet.
        """
        if self._roots is None:
            raise NotRunning(f"machine {self._paths.name} is not running yet")
        return self._roots

    def changed(self, root: str) -> None:
        """Learn that the guest's watch has seen something in a root, by its id."""
        self.roots.changed(root)

    def unheard(self) -> None:
        """Learn that nothing is told any more of what changes in the guest."""
        self.roots.unheard()

    def serve(self, tunnel: Tunnel, guest: Guest, config: Config) -> None:
        """Be ready for the first request that mounts something; before the agent starts."""
        platform = self._layout.platform
        self._roots = Roots(
            self._paths.directory / "sync",
            self._paths.sync_database,
            lambda place, ordered, progress: RemoteEndpoint(
                guest.open_sync(), place, ordered=ordered, progress=progress
            ),
            boot=platform.boot_id(),
            host_path=host_path(platform.drives),
            private=self._layout.home,
        )
        self._mounts = Mounts(
            self._hooks, self._roots, tunnel, config.shared, drives=platform.drives
        )

    async def restore(self, timeout_s: float) -> None:
        """Go on with what containers mount that an earlier service has left running.

        Without, the machine is of use all the same.
        """
        assert self._mounts is not None
        try:
            async with asyncio.timeout(timeout_s):
                await in_thread(self._mounts.restore, name="mounts")
        except (WherryError, TimeoutError) as error:
            log.warning("the containers' bind mounts are not known: %s", error or "it took long")

    def start_tidying(self) -> None:
        """End the synchronisation of what no container mounts, now and then from now on."""
        assert self._mounts is not None
        self._tidying = asyncio.create_task(_tidy(self._mounts), name="tidy")

    def reconnected(self) -> None:
        """Learn that the tunnel is new."""
        if self._roots is not None:
            # A stream that is closed may wait for its turn to send.
            disconnect = in_thread(self._roots.disconnect, name="sync disconnect")
            task = asyncio.create_task(disconnect, name="sync disconnect")
            self._disconnecting.add(task)
            task.add_done_callback(self._disconnecting.discard)

    async def close(self, tunnel: Tunnel | None) -> None:
        """End, after what containers write while they are stopped has come to the host.

        :param tunnel: None when the guest is not to be asked for anything.
        """
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)
        if self._roots is not None:
            await shutdown.end_sync(self._roots, tunnel)

    async def guest_ended(self, boot_id: str) -> None:
        """Learn that the guest has powered off in order, so that nothing it had was lost."""
        if self._roots is not None and boot_id:
            roots = self._roots
            await in_thread(lambda: roots.guest_ended(boot_id), name="sync end")

    async def settle(self) -> None:
        """Wait for what :meth:`reconnected` began; once the tunnel is closed."""
        await asyncio.gather(*self._disconnecting, return_exceptions=True)


async def _tidy(mounts: Mounts) -> None:
    while True:
        await asyncio.sleep(_TIDY_S)
        try:
            await in_thread(mounts.tidy, name="tidy")
        except WherryError as error:
            log.info("the containers' bind mounts are not known: %s", error)
        except Exception:
            log.exception("unused bind mounts could not be ended")
