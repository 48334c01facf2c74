"""The service's process: ``python -m wherry.service NAME``."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import sys
from collections.abc import Sequence

from filelock import FileLock, Timeout

from wherry.config.layout import Layout
from wherry.core.errors import WherryError
from wherry.platform import current
from wherry.service.launch import ALREADY_RUNS
from wherry.service.stages import DEFAULT_BOUNDS, Bounds

_LOG_BYTES = 1 << 20
_DESCRIPTORS = 4096
"""Enough for all connections to the endpoint and to published ports, and for watched files."""


def main(argv: Sequence[str], bounds: Bounds = DEFAULT_BOUNDS) -> int:
    """Serve the machine named by the only argument until it stops."""
    paths = Layout.current(current()).machine(argv[0])
    lock = FileLock(paths.service_lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return ALREADY_RUNS
    handler = logging.handlers.RotatingFileHandler(
        paths.service_log, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # paramiko logs each connection at INFO, and failures that we report ourselves.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    current().raise_descriptor_limit(_DESCRIPTORS)
    current().give_memory_back()
    try:
        # Imported late: the loser of two starts at once should leave quickly.
        from wherry.service.app import Service

        return asyncio.run(Service(Layout.current(current()), paths, bounds).run())
    except (WherryError, OSError) as error:
        logging.getLogger("wherry").error("%s", error)
        return 1
    except Exception:
        logging.getLogger("wherry").exception("the service failed")
        return 1
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
