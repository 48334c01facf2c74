"""What the service asks of the roots, which may wait for a silent guest, and its loop does not."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.service import shutdown
from wherry.service.app import Service


class Roots:
    """Notes what was called in the loop's thread."""

    def __init__(self) -> None:
        self.loop = threading.current_thread()
        self.called: list[tuple[str, bool]] = []
        self.done = threading.Event()

    def _note(self, name: str) -> None:
        self.called.append((name, threading.current_thread() is self.loop))
        self.done.set()

    def disconnect(self) -> None:
        self._note("disconnect")

    def all(self) -> list[object]:
        self._note("all")
        return []

    def close(self) -> None:
        self._note("close")


class Guest:
    def reconnected(self) -> None:
        pass


def test_a_new_connection_is_told_beside_the_loop(tmp_path: Path) -> None:
    async def main() -> list[tuple[str, bool]]:
        roots = Roots()
        layout = Layout(tmp_path, current())
        service = Service(layout, layout.machine("default"))
        service._guest, service._roots = Guest(), roots  # type: ignore[assignment]
        service._on_tunnel("connected", None)
        await asyncio.to_thread(roots.done.wait, 5)
        return roots.called

    assert asyncio.run(main()) == [("disconnect", False)]


def test_the_last_files_are_brought_beside_the_loop() -> None:
    async def main() -> list[tuple[str, bool]]:
        roots = Roots()
        await shutdown.end_sync(roots, object())  # type: ignore[arg-type]
        return roots.called

    assert asyncio.run(main()) == [("all", False), ("close", False)]
