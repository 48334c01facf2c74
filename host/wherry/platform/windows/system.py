"""What wherry has from Windows 10 and 11; pywin32 is imported when it is first needed."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import socket
import ssl
import string
import sys
import tempfile
import winreg
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from wherry.platform import roots
from wherry.platform.base import ChangeSink, TreeWatcher
from wherry.platform.resolvers import Resolvers, Servers
from wherry.platform.windows import pipes, unix

assert sys.platform == "win32"  # Type checkers look on for Windows alone.

if TYPE_CHECKING:
    from wherry.platform.windows.kernel import Kernel

_PROCESSOR = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
_WHV_CAPABILITY_HYPERVISOR_PRESENT = 0
_SYSTEM_PIDS = (0, 4)
_DNS_PORT = 53


class Windows:
    """Windows: WHPX, named pipes, and files that only their owner may open."""

    name = "windows"
    accelerators = ("whpx", "tcg")
    qemu_hint = "winget install SoftwareFreedomConservancy.QEMU, and put it on PATH"
    socket_path_limit: int | None = unix.PATH_BYTES
    """Of QEMU's monitor; pipes have names of their own."""
    drives = True

    @property
    def data_directory(self) -> Path:
        """``%LOCALAPPDATA%``: what is there does not roam with the user's profile."""
        return platformdirs.user_data_path("wherry", appauthor=False)

    @property
    def hosts_file(self) -> Path:
        """Where Windows has it."""
        return Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32/drivers/etc/hosts"

    def resolvers(self) -> Resolvers:
        """What dnspython reads in the registry; the rules of a VPN are not in there (NRPT)."""
        import dns.exception
        import dns.resolver

        try:
            found = dns.resolver.Resolver()
        except (dns.exception.DNSException, OSError):
            return Resolvers()
        addresses = tuple((str(each), _DNS_PORT) for each in found.nameservers)
        search = tuple(each.to_text(omit_final_dot=True).lower() for each in found.search)
        return Resolvers((Servers(addresses),) if addresses else (), search)

    def trusted_roots(self) -> list[bytes]:
        """Those of the store ``ROOT``, the system's and the user's."""
        return roots.windows(ssl.enum_certificates("ROOT"))

    def low_port_hint(self, address: str, port: int) -> str:
        """Any user may have any port, unless Windows has reserved it (for Hyper-V, as a rule)."""
        return (
            f"publish another one, such as {port + 8000}; what Windows has reserved is told by: "
            "netsh interface ipv4 show excludedportrange protocol=tcp"
        )

    def lengthen_queue(self, pid: int, address: str, port: int) -> None:
        """No process can reach into another here."""

    def accelerator_problem(self, accelerator: str) -> str | None:
        """Ask the Windows Hypervisor Platform whether there is a hypervisor."""
        if accelerator == "tcg":
            return None
        if accelerator != "whpx":
            return "Windows does not have it"
        present = ctypes.c_int(0)
        try:
            library = ctypes.WinDLL("WinHvPlatform.dll")
            library.WHvGetCapability(
                _WHV_CAPABILITY_HYPERVISOR_PRESENT, ctypes.byref(present), 4, None
            )
        except OSError:
            pass  # not installed
        if present.value:
            return None
        return "Windows Hypervisor Platform is off: turn it on in Windows Features, and restart"

    def architecture(self) -> str:
        """``PROCESSOR_ARCHITECTURE``, in other words."""
        machine = platform.machine().lower()
        return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)

    def cpu_model(self) -> str:
        """``ProcessorNameString`` of the registry."""
        return _read_registry(_PROCESSOR, "ProcessorNameString").strip() or platform.processor()

    def memory_bytes(self) -> int:
        """Physical memory."""
        # It takes 20 ms to import, and most commands do without it.
        import psutil

        return int(psutil.virtual_memory().total)

    def cpu_count(self) -> int:
        """All logical processors."""
        return os.cpu_count() or 1

    def boot_id(self) -> str:
        """When the first program was started, in the system's own units.

        Windows has no such id, and the time of the boot that it computes is moved with the
        clock. A process's time is written down once, and the first (smss.exe) never ends.
        """
        return str(_first_start())

    def process_start(self, pid: int) -> float:
        """The time that the kernel wrote down."""
        import psutil

        try:
            return float(psutil.Process(pid).create_time())
        except psutil.Error as error:
            raise ProcessLookupError from error

    def shared_directories(self) -> tuple[str, ...]:
        """Every drive, also one that is plugged in later."""
        return tuple(f"{letter}:\\" for letter in string.ascii_uppercase)

    def make_private_directory(self, path: Path) -> None:
        """An access list with one entry, which files inside inherit."""
        from wherry.platform.windows import security

        security.make_private_directory(path)

    def default_docker_socket(self) -> Path | None:
        """None: clients look for a pipe, and pipes have no links."""
        return None

    def raise_descriptor_limit(self, wanted: int) -> int:
        """Nothing to do: a process may have millions of handles."""
        return wanted

    def give_memory_back(self) -> None:
        """The heap does by itself."""

    def leash(self, argv: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
        """By a job object, in a process of its own."""
        return [sys.executable, "-m", "wherry.platform.windows.leash", *argv]

    def short_directory(self) -> Path:
        """A directory of ours among the user's temporary files."""
        path = Path(tempfile.gettempdir()) / "wherry"
        self.make_private_directory(path)
        return path

    def docker_host(self, path: Path, known_as: str) -> str:
        """``npipe:////./pipe/…``, as Docker's clients write it."""
        return pipes.docker_host(path, known_as)

    def listen_local(self, path: Path, known_as: str = "") -> pipes.PipeListener:
        """A named pipe."""
        return pipes.listen(_kernel(), path, known_as)

    def connect_local(self, path: Path, timeout_s: float) -> pipes.PipeStream:
        """A connection to a pipe that has no name of its own."""
        return pipes.connect(_kernel(), pipes.pipe_name(path), timeout_s)

    def connect_unix(self, path: Path) -> socket.socket:
        """By Winsock itself."""
        return unix.connect(path)

    def watch_tree(
        self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]
    ) -> TreeWatcher:
        """ReadDirectoryChangesW."""
        from wherry.platform.directory_changes import DirectoryChangesWatcher

        return DirectoryChangesWatcher(root, sink, skipped)


@functools.cache
def _kernel() -> Kernel:
    from wherry.platform.windows.kernel import Kernel

    return Kernel()


@functools.cache
def _first_start() -> float:
    import psutil

    times = []
    for process in psutil.process_iter():
        try:
            if process.pid not in _SYSTEM_PIDS:
                times.append(process.create_time())
        except psutil.Error:
            continue
    return min(times)


def _read_registry(key: str, value: str) -> str:
    """Return a text of HKEY_LOCAL_MACHINE, empty if it is not there."""
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
            return str(winreg.QueryValueEx(opened, value)[0])
    except OSError:
        return ""
