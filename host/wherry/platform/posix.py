"""What Linux and macOS share: Unix sockets, permissions, processors."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
import socket
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from wherry.platform import resolvers
from wherry.platform.resolvers import Resolvers

_BACKLOG = 4096
"""As the Docker engine asks for, which Linux grants: a client that does not wait gets EAGAIN from a
socket whose queue is full (connect(2))."""

_SHARED = Path("/tmp")
_PROBE_TIMEOUT_S = 1.0

_LEASH = """\
exec 3<&0
"$@" </dev/null 3<&- &
program=$!
{ read -r _; kill -9 "$program"; } <&3 >/dev/null 2>&1 &
watch=$!
exec 3<&- </dev/null 2>/dev/null
wait "$program"
status=$?
kill "$watch"
exit "$status"
"""
"""A background command of a shell has no input of the shell's, hence descriptor 3."""


class UnixListener:
    """A Unix socket of mode 0600."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale_socket(path)
            # The mode is set by umask and not afterwards: between bind and chmod
            # another user could connect.
            previous = os.umask(0o177)
            try:
                self._socket.bind(os.fspath(path))
            finally:
                os.umask(previous)
            self._identity = _identity(path)
            self._socket.listen(_BACKLOG)
        except BaseException:
            self._socket.close()
            raise

    def accept(self) -> socket.socket:
        """Wait for a connection; OSError once the listener is closed."""
        connection, _ = self._socket.accept()
        return connection

    def close(self) -> None:
        """Stop listening and remove the socket, unless another program replaced it."""
        if self._socket.fileno() < 0:
            return
        if _identity(self._path) == self._identity:
            self._path.unlink(missing_ok=True)
        try:
            # On Linux close() alone leaves a thread waiting in accept().
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # macOS: the socket is not connected
        self._socket.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale_socket(path: Path) -> None:
    """Remove a socket that nobody listens on any more."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "something that is no socket is in the way", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, "another program listens there", str(path))


class Posix:
    """The parts of :class:`wherry.platform.base.Platform` that POSIX defines."""

    socket_path_limit: int | None = 103
    """macOS has 104 bytes with the NUL (``sys/un.h``), Linux 108: one limit for both."""

    hosts_file = Path("/etc/hosts")
    resolvers_file = Path("/etc/resolv.conf")
    drives = False

    @property
    def data_directory(self) -> Path:
        """platformdirs' data directory."""
        return platformdirs.user_data_path("wherry", appauthor=False)

    def architecture(self) -> str:
        """The machine's own word, which macOS and Linux differ in for arm64."""
        machine = platform.machine()
        return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)

    def memory_bytes(self) -> int:
        """Physical memory, by sysconf(3)."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def resolvers(self) -> Resolvers:
        """resolv.conf(5), which on Linux may lead to systemd-resolved: it knows what is split."""
        try:
            text = self.resolvers_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return Resolvers()
        return resolvers.resolv_conf(text)

    def shared_directories(self) -> tuple[str, ...]:
        """The user's home and the directory for temporary files."""
        return tuple(dict.fromkeys((str(Path.home()), tempfile.gettempdir())))

    def make_private_directory(self, path: Path) -> None:
        """Mode 0700; an existing directory is narrowed to it, and must be ours."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "the directory belongs to another user", str(path))
        if stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o700)

    def short_directory(self) -> Path:
        """A directory of ours in /tmp.

        Nothing of the environment chooses it: a command that runs from cron or by sudo has
        to find the machine too. ($XDG_RUNTIME_DIR would also go when the user logs out, and
        the service stays; $TMPDIR is itself some 50 bytes deep on macOS.) Anybody may make
        something of this name first, so what is there is looked at, and not what a link
        leads to.
        """
        path = _SHARED / f"wherry-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "something is in the way", str(path))
        self.make_private_directory(path)
        return path

    def default_docker_socket(self) -> Path | None:
        """``/var/run/docker.sock`` (docker/cli, ``client.DefaultDockerHost``)."""
        return Path(os.environ.get("WHERRY_DEFAULT_SOCKET") or "/var/run/docker.sock")

    def raise_descriptor_limit(self, wanted: int) -> int:
        """The soft limit of RLIMIT_NOFILE: 256 on macOS, 1024 on Linux unless told otherwise."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return wanted if soft == resource.RLIM_INFINITY else soft
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            # macOS has a lower bound that it does not tell (kern.maxfilesperproc).
            return soft
        return wanted

    def give_memory_back(self) -> None:
        """Only glibc has to be told."""

    def leash(self, argv: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
        """By a shell that waits for the program, and another that waits for the input's end."""
        return ["/bin/sh", "-c", _LEASH, "leash", *argv]

    def listen_local(self, path: Path, known_as: str = "") -> UnixListener:
        """A Unix socket."""
        return UnixListener(path)

    def docker_host(self, path: Path, known_as: str) -> str:
        """The socket's path."""
        return f"unix://{path}"

    def connect_local(self, path: Path, timeout_s: float) -> socket.socket:
        """A connection to a Unix socket, in blocking mode."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(os.fspath(path))
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return connection

    def connect_unix(self, path: Path) -> socket.socket:
        """The same as any other: a full backlog is an error at once."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(os.fspath(path))
        except BaseException:
            connection.close()
            raise
        return connection
