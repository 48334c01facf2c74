"""A machine's service with bounds of a test's own: ``quick_service.py NAME BOUNDS [STAGE]``.

The work of a stage that is named never ends, in the way that is worst to end: in a thread.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from wherry.core.bridge import in_thread
from wherry.service.__main__ import main
from wherry.service.stages import Bounds, Stages


def hang(stage: str) -> None:
    """Have the work of a stage never end from now on."""
    run = Stages.run

    async def run_or_hang(
        self: Stages, name: str, work: Callable[[], Awaitable[Any]], **options: Any
    ) -> Any:
        if name == stage:
            return await run(
                self, name, lambda: in_thread(threading.Event().wait, name="hangs"), **options
            )
        return await run(self, name, work, **options)

    Stages.run = run_or_hang  # type: ignore[method-assign]


if __name__ == "__main__":
    for each in sys.argv[3:]:
        hang(each)
    sys.exit(main(sys.argv[1:2], Bounds(**json.loads(sys.argv[2]))))
