"""macOS."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.core.processes import run
from wherry.platform.base import ChangeSink, TreeWatcher
from wherry.platform.posix import Posix

_SYSCTL_TIMEOUT_S = 5.0


class MacOS(Posix):
    """macOS: the Hypervisor framework."""

    name = "macos"
    accelerators = ("hvf", "tcg")
    qemu_hint = "install it with: brew install qemu"

    def low_port_hint(self, address: str, port: int) -> str:
        """Since macOS 10.14 any user may bind a low port, but only on all addresses."""
        return f"publish it on all addresses (-p {port}:…), or one above, such as {port + 8000}"

    def accelerator_problem(self, accelerator: str) -> str | None:
        """``kern.hv_support`` tells whether the Hypervisor framework works here."""
        if accelerator == "tcg":
            return None
        if accelerator != "hvf":
            return "macOS does not have it"
        try:
            if _sysctl("kern.hv_support") == "1":
                return None
        except WherryError as error:
            return error.message
        return "this Mac has no Hypervisor framework (kern.hv_support is 0)"

    def cpu_model(self) -> str:
        """``machdep.cpu.brand_string``."""
        return _sysctl("machdep.cpu.brand_string")

    def cpu_count(self) -> int:
        """All logical processors: macOS has no affinity masks."""
        return os.cpu_count() or 1

    def process_start(self, pid: int) -> float:
        """``p_starttime``, which the kernel keeps as it was at the fork."""
        # It takes 20 ms to import, and most commands ask for no process.
        import psutil

        try:
            return float(psutil.Process(pid).create_time())
        except psutil.Error as error:
            raise ProcessLookupError from error

    def boot_id(self) -> str:
        """``kern.bootsessionuuid``."""
        return _sysctl("kern.bootsessionuuid")

    def shared_directories(self) -> tuple[str, ...]:
        """Where Docker Desktop lets containers mount from as well."""
        return (*super().shared_directories(), "/Volumes", "/private", "/tmp")

    def watch_tree(
        self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]
    ) -> TreeWatcher:
        """FSEvents."""
        from wherry.platform.fsevents import FSEventsWatcher

        return FSEventsWatcher(root, sink, skipped)


def _sysctl(name: str) -> str:
    done = run(["sysctl", "-n", name], timeout_s=_SYSCTL_TIMEOUT_S)
    return done.stdout.decode().strip()
