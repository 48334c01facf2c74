"""A guest that cannot write because the host's disk is full waits until it can.

QEMU pauses it at the write that fails (``werror=enospc``, the default of virtio-blk): the
guest loses nothing and learns of nothing, and every connection to it stands still.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.vm.driver import Driver

log = logging.getLogger(__name__)

ENOUGH_BYTES = 64 << 20
"""With less, the guest would stand still again at once."""

HINT = f"free some space, {ENOUGH_BYTES >> 20} MiB at least, and it goes on by itself"

_POLL_S = 1.0
_SETTLE_S = 5.0
"""A limit that is no full disk, such as a quota, shows by the guest's standing still again."""


def is_scarce(directory: Path) -> bool:
    """Whether the file system of a directory has too little space for a guest to go on."""
    return shutil.disk_usage(directory).free < ENOUGH_BYTES


async def keep_running(driver: Driver, directory: Path, tell: Callable[[str], object]) -> None:
    """Have the guest go on whenever there is space again, until this is cancelled.

    :param directory: where the data disk is.
    :param tell: called with why the guest has stopped, and with an empty text when it goes on.
    """
    while True:
        reason = await driver.wait_paused()
        log.warning("%s; %s", reason, HINT)
        tell(reason)
        while driver.paused:
            await asyncio.sleep(_POLL_S)
            try:
                if not is_scarce(directory):
                    await driver.resume()
                    await asyncio.sleep(_SETTLE_S)
            except (OSError, WherryError) as error:
                log.info("the guest cannot go on yet: %s", error)
        log.info("the guest goes on")
        tell("")
