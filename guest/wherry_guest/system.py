"""What the agent asks of, and does to, the guest's kernel."""

from __future__ import annotations

import _thread
import fcntl
import os
import socket
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# _IOWR('X', 121, struct fstrim_range) of linux/fs.h, the same number on x86-64 and arm64.
_FITRIM = 0xC0185879
_MS_BIND = 4096  # mount(2)
_PAUSE_S = 0.05
_FSTRIM_RANGE = struct.Struct("=QQQ")  # start, len, minlen


def boot_id() -> str:
    """Return the id of this boot (random(4))."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def uptime_s() -> float:
    """Return the seconds since boot, including those suspended (proc_uptime(5))."""
    return float(_read("/proc/uptime").split()[0])


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


def memory() -> tuple[int, int]:
    """Return the bytes of memory: all of it, and what programs could still get."""
    return parse_memory(_read("/proc/meminfo"))


def parse_memory(text: str) -> tuple[int, int]:
    """Return MemTotal and MemAvailable of proc_meminfo(5), in bytes.

    :raises OSError: one of them is not there.
    """
    # "kB" there means 1024 bytes.
    sizes = {
        words[0]: int(words[1]) * 1024
        for words in (line.split() for line in text.splitlines())
        if len(words) == 3 and words[2] == "kB"
    }
    try:
        return sizes["MemTotal:"], sizes["MemAvailable:"]
    except KeyError as error:
        raise OSError(f"/proc/meminfo has no {error}") from error


def space(path: str) -> tuple[int, int]:
    """Return the bytes of the filesystem at a path: all of it, and what is free to use.

    :raises OSError: there is no such path.
    """
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def give_memory_back() -> None:
    """Return memory that is free to the system (malloc_trim(3)); after large work it is much."""
    import ctypes  # which costs memory itself, and the synchronisation alone needs it

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_clock(time_s: float) -> None:
    """Set the clock to seconds since the epoch.

    :raises OSError: we are not root.
    """
    time.clock_settime(time.CLOCK_REALTIME, time_s)


def trim(path: str) -> int:
    """Discard the free blocks of the filesystem at a path and return how many bytes they have.

    The call that fstrim(8) makes, without starting a program.

    :raises OSError: the filesystem or its disk cannot discard.
    """
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        argument = bytearray(_FSTRIM_RANGE.pack(0, 2**64 - 1, 0))
        fcntl.ioctl(directory, _FITRIM, argument)
    except OSError as error:
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)} (FITRIM)", path) from error
    finally:
        os.close(directory)
    trimmed: int = _FSTRIM_RANGE.unpack(argument)[1]
    return trimmed


def bind(source: str, target: str) -> None:
    """Make what is at one path also appear at another one, which is made if missing.

    Nothing is done if it is there already, as when a directory above was bound before.

    :raises OSError: there is something else in the way.
    """
    import ctypes

    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    one, other = os.stat(source), os.stat(target)
    if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino):
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def power_off() -> None:
    """Have the guest's own poweroff(8) shut it down.

    :raises OSError: there is no such program, or it refuses.
    """
    process = os.posix_spawnp("poweroff", ["poweroff"], os.environ)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status != 0:
        raise OSError(f"poweroff failed with status {status}")


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def listen(path: str, serve: Callable[[socket.socket], None]) -> None:
    """Have each connection to a socket of ours served in a thread, for the agent's life.

    :raises OSError: the socket cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    try:
        os.unlink(path)  # an earlier agent may have had our number
    except FileNotFoundError:
        pass
    listener.bind(path)
    listener.listen(16)

    def accept() -> None:
        while True:
            connection = None
            try:
                connection = listener.accept()[0]
                _thread.start_new_thread(serve, (connection,))
            except (OSError, RuntimeError) as error:
                # Out of descriptors or threads: some connection will end.
                print(f"a connection cannot be served: {error}", file=sys.stderr)
                if connection is not None:
                    connection.close()
                time.sleep(_PAUSE_S)

    _thread.start_new_thread(accept, ())
