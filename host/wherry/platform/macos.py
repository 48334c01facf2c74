"""macOS."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.core.processes import run
from wherry.platform import resolvers, roots
from wherry.platform.base import ChangeSink, TreeWatcher
from wherry.platform.posix import Posix
from wherry.platform.resolvers import Resolvers

_SYSCTL_TIMEOUT_S = 5.0
_SCUTIL_TIMEOUT_S = 2.0
_RESOLVERS_S = 2.0
"""How old what scutil says may be: asking it takes longer than asking a server."""


class MacOS(Posix):
    """macOS: the Hypervisor framework."""

    _resolvers = Resolvers()
    _resolvers_expire = 0.0

    name = "macos"
    accelerators = ("hvf", "tcg")
    qemu_hint = "install it with: brew install qemu"

    def low_port_hint(self, address: str, port: int) -> str:
        """Since macOS 10.14 any user may bind a low port, but only on all addresses."""
        return f"publish it on all addresses (-p {port}:…), or one above, such as {port + 8000}"

    def lengthen_queue(self, pid: int, address: str, port: int) -> None:
        """No process can reach into another here."""

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

    def resolvers(self) -> Resolvers:
        """``scutil --dns``: resolv.conf has the main servers alone, and not those of a VPN."""
        now = time.monotonic()
        if now >= self._resolvers_expire:
            try:
                said = run(["scutil", "--dns"], timeout_s=_SCUTIL_TIMEOUT_S).stdout
                self._resolvers = resolvers.scutil(said.decode(errors="replace"))
            except WherryError:
                self._resolvers = super().resolvers()
            self._resolvers_expire = now + _RESOLVERS_S
        return self._resolvers

    def trusted_roots(self) -> list[bytes]:
        """Those of the system's and the user's keychain."""
        return roots.macos()

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
