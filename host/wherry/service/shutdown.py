"""The orderly end of a guest: its engine, its files, its power."""

from __future__ import annotations

import asyncio
import logging

from wherry.core.bridge import in_thread
from wherry.core.errors import TunnelError
from wherry.sync.roots import Roots
from wherry.tunnel.tunnel import Tunnel
from wherry.vm.driver import Driver

log = logging.getLogger(__name__)

STOP_ENGINE_S = 40.0
"""Containers get 10 s to end unless they ask for more; the guest's own poweroff waits as long."""

ASK_S = 10.0

_STOP_ENGINE = "/usr/lib/wherry/stop-engine"
_UNASKED_STOP_S = 5.0
"""For a guest that perhaps never heard that it should power off."""


async def end_sync(roots: Roots, tunnel: Tunnel | None) -> None:
    """Bring to the host what containers still write while they are stopped.

    :param tunnel: None when the guest is not to be asked for anything.
    """
    if tunnel is None:
        await in_thread(roots.disconnect, name="sync disconnect")
    elif await in_thread(roots.all, name="sync list"):
        try:
            await in_thread(
                lambda: tunnel.run(_STOP_ENGINE, timeout_s=STOP_ENGINE_S), name="engine stop"
            )
        except TunnelError as error:
            log.warning("the engine did not stop: %s", error)
    await in_thread(roots.close, name="sync close")


async def power_off(driver: Driver, tunnel: Tunnel, patience_s: float) -> bool:
    """Have the guest shut down; return whether it has, and did not just end somehow."""
    log.info("poweroff: asking the guest")
    driver.expect_shutdown()
    try:
        await in_thread(lambda: tunnel.run("poweroff", timeout_s=ASK_S), name="poweroff")
    except TunnelError as error:
        # It may go down before it has answered; whether it does is seen below.
        log.info("poweroff: %s", error)
        patience_s = min(patience_s, _UNASKED_STOP_S)
    try:
        exit = await asyncio.wait_for(driver.wait(), patience_s)
    except TimeoutError:
        log.warning("the guest did not shut down; ending QEMU")
        return False
    return exit.powered_off
