"""An endpoint over a stub of the engine."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stub_engine import Client, SocketStream, StubEngine

from wherry.api.hooks import Hooks
from wherry.api.server import Endpoint
from wherry.core.errors import TunnelError
from wherry.platform import current
from wherry.tunnel.stream import Stream


@dataclass
class Proxy:
    """An endpoint, the engine behind it, and the streams between them."""

    path: Path
    engine: StubEngine
    hooks: Hooks = field(default_factory=Hooks)
    limit: int = 512
    head_timeout_s: float = 300.0
    problem: TunnelError | None = None
    streams: list[SocketStream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.endpoint = Endpoint(
            current().listen_local(self.path),
            self.open_stream,
            hooks=self.hooks,
            limit=self.limit,
            head_timeout_s=self.head_timeout_s,
        )
        self.endpoint.start()

    def open_stream(self) -> Stream:
        if self.problem is not None:
            raise self.problem
        try:
            sock = self.engine.connect()
        except OSError as error:
            raise TunnelError(f"nothing answers at the engine's socket: {error}") from error
        stream = SocketStream(sock)
        self.streams.append(stream)
        return stream

    def client(self) -> Client:
        return Client(self.path)

    def ping(self) -> None:
        with self.client() as client:
            client.request("GET", "/_ping")
            assert client.answer()[::2] == (200, b"OK")


MakeProxy = Callable[..., Proxy]


@contextlib.contextmanager
def proxies(directory: Path) -> Iterator[MakeProxy]:
    """Make endpoints and engines, and end them all; no thread may be left."""
    made: list[Proxy] = []

    def make(**options: object) -> Proxy:
        proxy = Proxy(directory / "docker.sock", StubEngine(directory / "engine.sock"), **options)  # type: ignore[arg-type]
        made.append(proxy)
        return proxy

    yield make
    for proxy in made:
        proxy.endpoint.close()
        with contextlib.suppress(OSError):
            proxy.engine.stop()
    left = [each.name for each in threading.enumerate() if each.name.startswith("endpoint")]
    assert not left


class PipeLike:
    """A LocalStream that is no socket and cannot be polled, as a named pipe of Windows."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.recv, self.recv_into, self.send = end.recv, end.recv_into, end.send
        self.sendall, self.shutdown, self.close = end.sendall, end.shutdown, end.close

    def fileno(self) -> int:
        return -1

    def recv_ready(self, buffer: memoryview) -> int | None:
        try:
            return self._end.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def await_gone(self) -> None:
        # Its descriptor may be another one's after close().
        with self._end.dup() as end:
            poller = select.poll()
            poller.register(end, 0)
            poller.poll()


class PipeListener:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()

    def accept(self) -> PipeLike:
        return PipeLike(self._socket.accept()[0])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
