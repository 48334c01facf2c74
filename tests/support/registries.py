"""Real registries and a real proxy on this computer's loopback, and what cuts connections."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import trustme
from downloads import debian_programs
from loopback import free_port
from sandbox import wait_until

LOOPBACK = "127.0.0.1"
HOST = "host.docker.internal"
"""This computer, as the engine in the guest has to call it."""

USER, PASSWORD = "tester", "correct-horse-battery"


def wait_listening(port: int) -> None:
    """Wait until something accepts connections."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 1):
            return True
        return False

    wait_until(listens, 30, f"port {port} listens")


class Server:
    """A program that listens on a port, and its log."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.process = process
        self.name = f"{HOST}:{port}"
        self.log = log

    def said(self) -> str:
        """What it has logged."""
        return self.log.read_text()


@contextlib.contextmanager
def registry(directory: Path, authority: trustme.CA | None = None) -> Iterator[Server]:
    """Run Debian's docker-registry: with TLS and a password if there is an authority."""
    directory.mkdir()
    port = free_port()
    config = [
        "version: 0.1",
        "log: {level: info}",
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}",
        "http:",
        f"  addr: {LOOPBACK}:{port}",
        "  secret: of-a-test",
    ]
    if authority is not None:
        certificate = authority.issue_cert(HOST, "registry.test")
        certificate.private_key_pem.write_to_path(directory / "key.pem")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(directory / "cert.pem", append=True)
        config.append(f"  tls: {{certificate: {directory}/cert.pem, key: {directory}/key.pem}}")
        hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
        (directory / "htpasswd").write_text(f"{USER}:{hashed}\n")
        config.append(f"auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}")
    (directory / "config.yml").write_text("\n".join(config))
    program = debian_programs() / "docker-registry"
    with _running([program, "serve", directory / "config.yml"], port, directory / "log") as server:
        yield server


@contextlib.contextmanager
def tinyproxy(directory: Path, *names: str) -> Iterator[Server]:
    """Run Debian's tinyproxy, for which these names are this computer.

    They are nowhere else, so who reached one has come through the proxy.
    """
    directory.mkdir()
    port = free_port()
    log = directory / "log"
    log.touch()
    (directory / "hosts").write_text(f"{LOOPBACK} localhost {' '.join(names)}\n")
    (directory / "config").write_text(
        f"Port {port}\nListen {LOOPBACK}\nTimeout 60\nMaxClients 50\nLogLevel Connect\n"
    )
    script = 'mount --bind "$1" /etc/hosts && exec "$2" -d -c "$3"'
    program = debian_programs() / "tinyproxy"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "-"]
    argv = [*unshare, directory / "hosts", program, directory / "config"]
    with _running(argv, port, log) as server:
        yield server


@contextlib.contextmanager
def _running(argv: list[str | Path], port: int, log: Path) -> Iterator[Server]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, argv)), stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        wait_listening(port)
        yield Server(port, log, process)
    finally:
        process.terminate()
        process.wait(10)


class Cutter:
    """Hands connections on to a port, and cuts the first answers that are long.

    :param target: the port.
    :param after: bytes of an answer that pass before the connection is cut.
    :param times: how many connections are cut.
    """

    def __init__(self, target: int, *, after: int, times: int) -> None:
        self._target = target
        self._after = after
        self.left = times
        self._lock = threading.Lock()
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        self.name = f"{HOST}:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more; those that are open end with their clients."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((LOOPBACK, self._target))
                for source, sink, cut in ((client, server, False), (server, client, True)):
                    pump = threading.Thread(target=self._pump, args=(source, sink, cut))
                    pump.daemon = True
                    pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, cut: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
                passed += len(data)
                if cut and passed > self._after and self._take_one():
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _take_one(self) -> bool:
        with self._lock:
            self.left -= 1
            return self.left >= 0
