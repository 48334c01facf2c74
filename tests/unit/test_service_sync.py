"""What the service asks of the roots, which may wait for a silent guest, and its loop does not."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.service import shutdown
from wherry.service.app import Service
from wherry.vm.driver import Exit


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
        service._guest, service._files._roots = Guest(), roots  # type: ignore[assignment]
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


@pytest.mark.parametrize("powered_off", [True, False])
def test_only_a_guest_that_powered_off_has_ended_in_order(powered_off: bool) -> None:
    """QEMU may also be killed, or the guest's kernel fail, while that is waited for."""

    async def ended() -> Exit:
        return Exit(True, "it is gone", powered_off=powered_off)

    driver: Any = SimpleNamespace(expect_shutdown=lambda: None, wait=ended)
    tunnel: Any = SimpleNamespace(run=lambda command, timeout_s: None)
    assert asyncio.run(shutdown.power_off(driver, tunnel, 5.0)) is powered_off
