"""Linux."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from wherry.platform import roots
from wherry.platform.base import ChangeSink, TreeWatcher
from wherry.platform.posix import Posix

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""``malloc.h``."""

_LARGE_BYTES = 128 * 1024
"""From this on a piece of memory is a mapping of its own: glibc's value as it starts."""


class Linux(Posix):
    """Linux: KVM, the XDG directories."""

    name = "linux"
    accelerators = ("kvm", "tcg")
    qemu_hint = "install it with your package manager, on Debian: apt install qemu-system"

    def low_port_hint(self, address: str, port: int) -> str:
        """The kernel's limit is a setting (ip-sysctl(7), ``ip_unprivileged_port_start``)."""
        return (
            f"publish one above, such as {port + 8000}, or allow it: "
            f"sudo sysctl net.ipv4.ip_unprivileged_port_start={port}"
        )

    def lengthen_queue(self, pid: int, address: str, port: int) -> None:
        """pidfd_getfd(2)."""
        from wherry.platform import listeners

        listeners.lengthen(pid, address, port)

    def give_memory_back(self) -> None:
        """mallopt(3): with a threshold set, glibc no longer raises both up to 32 MiB by itself.

        malloc_trim(3): what is free between what is used is returned by that alone.
        """
        import ctypes  # which a command of the CLI need not pay for

        library = ctypes.CDLL(None)
        try:
            mallopt, malloc_trim = library.mallopt, library.malloc_trim
        except AttributeError:
            return  # musl has no such thing
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(option, _LARGE_BYTES)
        malloc_trim(0)

    def accelerator_problem(self, accelerator: str) -> str | None:
        """Open /dev/kvm: its permissions, not its existence, decide."""
        if accelerator == "tcg":
            return None
        if accelerator != "kvm":
            return "Linux does not have it"
        try:
            os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return "this system has no /dev/kvm"
        except PermissionError:
            return "/dev/kvm may not be opened: join the group kvm and log in again"
        except OSError as error:
            return f"/dev/kvm cannot be opened: {error.strerror}"
        return None

    def cpu_model(self) -> str:
        """``model name`` of /proc/cpuinfo; arm64 has implementer and part instead."""
        facts: dict[str, str] = {}
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                facts.setdefault(key.strip(), value.strip())
        keys = ("model name", "CPU implementer", "CPU part", "microcode")
        return " ".join(facts[key] for key in keys if key in facts)

    def cpu_count(self) -> int:
        """The processors in this process's affinity mask."""
        return len(os.sched_getaffinity(0))

    def process_start(self, pid: int) -> float:
        """``starttime`` of /proc/PID/stat, in ticks since the boot (proc(5)).

        psutil's ``create_time`` adds the time of the boot, which the kernel derives from the
        clock: each step of the clock moves it for all processes.
        """
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except FileNotFoundError as error:
            raise ProcessLookupError from error
        # The name, second, may have blanks and brackets itself; starttime is field 22.
        ticks = int(stat.rpartition(b")")[2].split()[22 - 3])
        return ticks / os.sysconf("SC_CLK_TCK")

    def boot_id(self) -> str:
        """random(4)."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    def trusted_roots(self) -> list[bytes]:
        """The system's bundle."""
        return roots.linux(os.environ)

    def watch_tree(
        self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]
    ) -> TreeWatcher:
        """inotify."""
        from wherry.platform.inotify import InotifyWatcher

        return InotifyWatcher(root, sink, skipped)
