"""A real sshd on loopback, with keys and a configuration of its own, and Unix-socket servers."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from fake_host import kill
from loopback import free_port

from wherry.tunnel.connection import Connection, Watcher
from wherry.tunnel.keys import MachineKeys, make_keys

_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/keys/host_ed25519
AuthorizedKeysFile {directory}/keys/user_ed25519.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
AllowStreamLocalForwarding {streamlocal}
StreamLocalBindUnlink yes
MaxStartups 100
MaxSessions 100
UseDNS no
# bash reads ~/.bashrc when sshd runs it: what it does there must not be killed half-way.
SetEnv HOME={directory}
PrintMotd no
LogLevel ERROR
"""


class LoopbackSshd:
    """sshd in the foreground; :meth:`stop` ends it and every session of it."""

    def __init__(self, directory: Path, *, streamlocal: bool = True) -> None:
        (directory / "keys").mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.keys: MachineKeys = make_keys(directory / "keys")
        self.user = getpass.getuser()
        self.port = free_port()
        self._streamlocal = streamlocal
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return "127.0.0.1", self.port

    def connect(self, watcher: Watcher, *, timeout_s: float = 30.0) -> Connection:
        """Connect to it as the tunnel of a machine does."""
        return Connection.connect(
            self.address,
            user=self.user,
            user_key=self.keys.user,
            host_public=self.keys.host.public,
            timeout_s=timeout_s,
            watcher=watcher,
        )

    def start(self) -> None:
        """Start it on the same port as before."""
        config = self.directory / "sshd_config"
        config.write_text(
            _CONFIG.format(
                port=self.port,
                directory=self.directory,
                streamlocal="yes" if self._streamlocal else "no",
            )
        )
        if os.geteuid() == 0:
            # The privilege separation directory, which the package makes at boot.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.directory / "sshd.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(self.address, timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline, "sshd did not start"
                time.sleep(0.01)
            else:
                return

    def sessions(self) -> list[psutil.Process]:
        """The processes that serve connections."""
        assert self._process is not None
        return psutil.Process(self._process.pid).children(recursive=True)

    def signal_sessions(self, number: signal.Signals) -> None:
        """Send a signal to each process that serves a connection."""
        fresh, known = set(self.sessions()), set[psutil.Process]()
        while fresh:
            known |= fresh
            for process in fresh:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            # One that has just let a user in hands its work to a child of its own.
            fresh.clear()
            for process in known:
                with contextlib.suppress(psutil.NoSuchProcess):
                    fresh.update(process.children())
            fresh -= known

    def stop(self) -> None:
        """Kill it and its sessions, as a machine that is switched off does."""
        if self._process is None:
            return
        # It first, and it begins no more sessions while they are counted: who is cut off tries
        # again at once, and would find it.
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        sessions = self.sessions()
        self._process.kill()
        self._process.wait()
        for process in sessions:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill(process.pid)
        self._process = None


Handler = Callable[[socket.socket], None]


@contextlib.contextmanager
def unix_server(path: Path, handler: Handler) -> Iterator[str]:
    """Serve a Unix socket, each connection in a thread; yields the path."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(512)
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            handler(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                thread = threading.Thread(target=serve, args=(connection,), name="stub-server")
                threads.append(thread)
                thread.start()

    acceptor = threading.Thread(target=accept, name="stub-acceptor")
    acceptor.start()
    try:
        yield str(path)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        path.unlink(missing_ok=True)


def echo(connection: socket.socket) -> None:
    """Send back what comes, until it ends; then end too."""
    while data := connection.recv(65536):
        connection.sendall(data)
