"""An engine on a Unix socket that answers as dockerd does, and a stream to it without SSH.

On Windows it is on the loopback network.
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h11

from wherry.core.errors import TunnelError
from wherry.core.sockets import SharedSocket
from wherry.tunnel.inbox import Inbox
from wherry.tunnel.stream import CopyingSender, DrainWrite, Sink

WINDOW_BYTES = 2 * 1024 * 1024
WAIT_S = 20.0
FAMILY = getattr(socket, "AF_UNIX", socket.AF_INET)


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes that differ from place to place."""
    block = b"".join(hashlib.sha256(bytes([seed % 256, n])).digest() for n in range(251))
    return (block * (size // len(block) + 1))[:size]


class StubEngine:
    """Serves what the tests ask for; remembers what came.

    Paths, after an optional ``/vN.NN``: ``/_ping``, ``/bytes?n=``, ``/chunked?n=&size=``,
    ``/close?n=`` (until the end), ``/echo`` (the body comes back), ``/digest`` (its
    SHA-256), ``/trailers``, ``/status?code=``, ``/break?n=`` (half of it), ``/hangup``,
    ``/never``, ``/stuck`` (reads nothing more), ``/events?n=`` (so many at once),
    ``/containers/create`` (the body's SHA-256 is the id), ``/containers/ID/start``, ``…/wait``,
    ``…/archive`` (put: the SHA-256; get: as ``/chunked``), ``…/attach`` and ``/exec/ID/start``
    (echo), ``/session`` and ``/grpc`` (h2c), ``…/attach/ws``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heads: list[bytes] = []
        """The raw heads of all requests, in the order in which they came."""
        self.wire: list[bytearray] = []
        """All bytes of each connection."""
        self.said: list[tuple[str, str]] = []
        """Method and target of all requests."""
        self.cancelled = threading.Event()
        """Set when a client goes away from /never, /events or a wait."""
        self.open = 0
        self.events: list[Callable[[bytes], None]] = []
        self.exit = threading.Event()
        """Ends /containers/ID/wait."""
        self.respond_first = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._address: Any = ("127.0.0.1", 0)
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        listener = self._listener = socket.socket(FAMILY, socket.SOCK_STREAM)
        listener.bind(str(self.path) if FAMILY != socket.AF_INET else self._address)
        listener.listen(512)
        self._address = listener.getsockname()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    thread = threading.Thread(target=self._serve, args=(connection,))
                    with self._lock:
                        self._connections.add(connection)
                        self._threads.append(thread)
                    thread.start()

        thread = threading.Thread(target=accept, name="stub-engine")
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """Stop as a killed engine does: all connections end."""
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        self.exit.set()
        # Who was accepted at the last moment is cut too.
        for accepting in self._threads[:1]:
            accepting.join(WAIT_S)
        self.cut_all()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        self._threads.clear()

    def cut_all(self) -> None:
        """End every connection."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def connect(self) -> socket.socket:
        connection = socket.socket(FAMILY, socket.SOCK_STREAM)
        try:
            connection.connect(self._address)
        except OSError:
            connection.close()
            raise
        return connection

    @property
    def connections(self) -> int:
        """Open connections."""
        with self._lock:
            return len(self._connections)

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError, h11.RemoteProtocolError):
                _Client(self, sock).serve()
        finally:
            with self._lock:
                self._connections.discard(sock)


class _Client:
    def __init__(self, engine: StubEngine, sock: socket.socket) -> None:
        self.engine = engine
        self.sock = sock
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        self.wire = bytearray()
        engine.wire.append(self.wire)

    def serve(self) -> None:
        while True:
            event = self.next_event()
            if not isinstance(event, h11.Request):
                return
            method, target = event.method.decode(), event.target.decode()
            self.engine.said.append((method, target))
            url = urlsplit(target)
            path = url.path
            if path.startswith("/v1."):
                path = "/" + path.split("/", 2)[2]
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if not self.answer(event, method, path, query):
                return
            while self.h11.their_state is h11.SEND_BODY:
                self.next_event()
            # The answer was written by hand; h11 is told so.
            self.h11.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
            self.h11.send(h11.EndOfMessage())
            if self.h11.our_state is h11.MUST_CLOSE:
                return
            self.h11.start_next_cycle()

    def next_event(self) -> object:
        while True:
            event = self.h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            data = self.sock.recv(1 << 18)
            if len(self.wire) < 1 << 20:
                self.wire += data
            self.h11.receive_data(data)

    def body(self) -> Iterator[bytes]:
        while isinstance(event := self.next_event(), h11.Data):
            yield bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            raise ConnectionError

    def digest(self) -> bytes:
        """The SHA-256 of the body."""
        digest = hashlib.sha256()
        for data in self.body():
            digest.update(data)
        return digest.hexdigest().encode()

    def send(self, head: str, body: bytes = b"") -> None:
        self.sock.sendall(
            f"HTTP/1.1 {head}\r\nServer: Docker/28.5.2 (linux)\r\n\r\n".encode() + body
        )

    def full(self, status: str, body: bytes, *, head_only: bool = False) -> None:
        self.send(f"{status}\r\nContent-Length: {len(body)}", b"" if head_only else body)

    def chunk(self, data: bytes) -> None:
        self.sock.sendall(b"%x\r\n%s\r\n" % (len(data), data))

    def until_gone(self) -> None:
        """Wait until the client goes away, as Go's server does beside a handler."""
        while True:
            try:
                if not self.sock.recv(65536):
                    break
            except OSError:
                break
        self.engine.cancelled.set()

    def answer(self, request: h11.Request, method: str, path: str, query: dict[str, str]) -> bool:
        """Answer; False when the connection is used up."""
        size = int(query.get("n", "0"))
        headers = dict(request.headers)
        upgrade = headers.get(b"upgrade", b"").decode()
        if headers.get(b"expect") == b"100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if path == "/_ping":
            self.full("200 OK", b"OK", head_only=method == "HEAD")
        elif path == "/bytes":
            self.full("200 OK", pattern(size), head_only=method == "HEAD")
        elif path == "/chunked" or (path.endswith("/archive") and method == "GET"):
            step = int(query.get("size", "1000"))
            self.send("200 OK\r\nTransfer-Encoding: chunked")
            data = pattern(size)
            for at in range(0, size, step):
                self.chunk(data[at : at + step])
            self.sock.sendall(b"0\r\n\r\n")
        elif path == "/trailers":
            self.send("200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum")
            self.sock.sendall(b"3;a=b\r\nabc\r\n0\r\nX-Sum: 12\r\n\r\n")
        elif path == "/close":
            self.send("200 OK\r\nConnection: close", pattern(size))
            self.sock.shutdown(socket.SHUT_WR)
            while data := self.sock.recv(65536):
                self.wire += data  # nothing should come
            return False
        elif path == "/echo":
            self.full("200 OK", b"".join(self.body()))
        elif path == "/digest" or (path.endswith("/archive") and method == "PUT"):
            self.full("200 OK", self.digest())
        elif path.endswith("/archive"):
            self.send("200 OK\r\nX-Docker-Container-Path-Stat: e30=\r\nContent-Length: 0")
        elif path == "/containers/create":
            self.full("201 Created", b'{"Id":"%s"}\n' % self.digest())
        elif path.startswith("/containers/") and path.endswith("/start"):
            self.send("204 No Content")
        elif path == "/early":
            self.send("404 Not Found\r\nConnection: close\r\nContent-Length: 2", b"no")
            return False
        elif path == "/status":
            code = int(query["code"])
            if code in (204, 304):
                self.send(f"{code} Whatever")
            else:
                self.full(f"{code} Whatever", b"{}")
        elif path == "/break":
            self.send(f"200 OK\r\nContent-Length: {size}", pattern(size // 2))
            return False
        elif path == "/hangup":
            return False
        elif path == "/stuck":
            poller = select.poll()
            poller.register(self.sock.fileno(), 0)
            if poller.poll(WAIT_S * 1000):
                self.engine.cancelled.set()
            return False
        elif path == "/never":
            self.until_gone()
            return False
        elif path == "/events":
            self.send("200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked")
            for number in range(size):
                self.chunk(b'{"n":%d}\n' % number)
            self.engine.events.append(self.chunk)
            self.until_gone()
            return False
        elif path.endswith("/wait"):
            self.send("200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked")
            self.engine.exit.wait(WAIT_S)
            self.chunk(b'{"StatusCode":7}\n')
            self.sock.sendall(b"0\r\n\r\n")
        elif path.endswith(("/attach", "/start")) and "missing" in path:
            self.send(
                "404 Not Found\r\nContent-Type: application/vnd.docker.raw-stream", b"no such\r\n"
            )
            return False
        elif path.endswith(("/attach", "/start", "/attach/ws")) or path in ("/session", "/grpc"):
            for _ in self.body():
                pass
            return self.hijack(upgrade, query)
        else:
            for _ in self.body():
                pass
            self.full("404 Not Found", b'{"message":"page not found"}\n')
        return True

    def hijack(self, upgrade: str, query: dict[str, str]) -> bool:
        kind = "Content-Type: application/vnd.docker.raw-stream"
        if upgrade:
            head = (
                f"HTTP/1.1 101 UPGRADED\r\n{kind}\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
            )
        else:
            head = f"HTTP/1.1 200 OK\r\n{kind}\r\n"
        greeting = query.get("greet", "").encode()
        self.sock.sendall(head.encode() + b"\r\n" + greeting)
        early, _ = self.h11.trailing_data
        if "half" in query:
            # The engine's side ends first, then it still reads.
            self.sock.shutdown(socket.SHUT_WR)
        got = bytearray(early)
        if early and "half" not in query:
            self.sock.sendall(early)
        while data := self.sock.recv(65536):
            if len(got) < 1 << 20:
                got += data
            if "half" not in query:
                self.sock.sendall(data)
        self.wire += got
        if "half" not in query:
            self.sock.sendall(b"<end>")
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        return False


class SocketStream(CopyingSender):
    """A connected socket as a :class:`wherry.tunnel.stream.Stream`, with a channel's window."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = SharedSocket(sock)
        self._inbox = Inbox()
        self._error: TunnelError | None = None
        self._gone = False
        self._closed = False
        self._room = threading.Condition()
        self._waiting = 0
        self._thread = threading.Thread(target=self._read, name="stub-stream", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        buffer = memoryview(bytearray(1 << 17))
        try:
            while count := self._sock.recv_into(buffer):
                with self._room:
                    self._waiting += count
                # A sink may close the stream in here.
                self._taken(self._inbox.feed([buffer[:count]]))
                with self._room:
                    while self._waiting > WINDOW_BYTES and not self._closed:
                        self._room.wait()
        except OSError:
            pass
        self._inbox.close()
        self._inbox.tell_end(self._error, gone=self._gone or self._closed)
        if hasattr(select, "poll"):
            poller = select.poll()
            poller.register(self._sock.fileno(), 0)
            while not self._closed and not poller.poll(50):
                pass
        else:
            with self._room:
                self._room.wait_for(lambda: self._closed)
        self._gone = True
        self._inbox.tell_end(self._error, gone=True)
        with self._room:
            self._room.wait_for(lambda: self._closed)
        self._sock.close()

    def _taken(self, count: int) -> None:
        with self._room:
            self._waiting -= count
            self._room.notify_all()

    def recv(self, size: int) -> bytes:
        data: bytes = self._inbox.read(size)
        self._taken(len(data))
        if not data and self._error:
            raise self._error
        return data

    def recv_into(self, buffer: memoryview) -> int:
        count: int = self._inbox.read_into(buffer)
        self._taken(count)
        if not count and self._error:
            raise self._error
        return count

    def sendall(self, data: memoryview | bytes, waiting: Callable[[], None] | None = None) -> None:
        if not hasattr(select, "poll"):
            try:
                self._sock.sendall(data)
            except OSError as error:
                raise TunnelError("the stub engine takes no more") from error
            return
        poller = select.poll()
        left = memoryview(data)
        try:
            poller.register(self._sock.fileno(), select.POLLOUT)
            while left:
                try:
                    left = left[self._sock.send(left, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    if waiting is not None:
                        waiting()
                    poller.poll(50)
        except (OSError, ValueError) as error:  # the latter if it was closed meanwhile
            raise TunnelError("the stub engine takes no more") from error

    def shutdown_write(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._end(TunnelError("the stream was closed"))
        self._inbox.detach()

    def cut(self) -> None:
        """Break off as a lost connection does."""
        self._end(TunnelError("the connection to the guest was lost"))

    def _end(self, error: TunnelError) -> None:
        with self._room:
            if self._closed:
                return
            self._error = error
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._closed = True
            self._room.notify_all()
        self._inbox.close()
        self._inbox.tell_end(error, gone=True)
        if threading.current_thread() is not self._thread:
            self._thread.join(WAIT_S)

    def deliver_to(self, sink: Sink) -> None:
        self._inbox.attach(sink)
        self._inbox.tell_end(self._error, gone=self._gone)

    def drain(self, sink_write: DrainWrite) -> None:
        taken: list[int] = []
        try:
            while self._inbox.drain(sink_write, taken):
                self._taken(taken.pop())
        finally:
            self._inbox.tell_end(self._error, gone=self._gone)


class Client:
    """A raw client of a Unix socket, or of what is connected already; every wait is bounded."""

    def __init__(self, place: Path | Any, timeout_s: float = WAIT_S) -> None:
        if isinstance(place, Path):
            self.sock = socket.socket(FAMILY, socket.SOCK_STREAM)
            self.sock.settimeout(timeout_s)
            self.sock.connect(str(place))
        else:
            self.sock = place
        self.buffer = bytearray()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, method: str, target: str, *headers: str, body: bytes | None = None) -> None:
        lines = [f"{method} {target} HTTP/1.1", "Host: docker", *headers]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode() + (body or b""))

    def more(self) -> bool:
        data = self.sock.recv(1 << 18)
        self.buffer += data
        return bool(data)

    def take(self, count: int) -> bytes:
        while len(self.buffer) < count:
            assert self.more(), f"the stream ended after {bytes(self.buffer)!r}"
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            assert self.more(), f"the stream ended after {bytes(self.buffer)!r}"
        return self.take(self.buffer.index(mark) + len(mark))

    def rest(self) -> bytes:
        """Everything until the end of the stream."""
        with contextlib.suppress(ConnectionResetError):
            while self.more():
                pass
        return self.take(len(self.buffer))

    def answer(self, *, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Read one answer."""
        while True:
            head = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
            if status >= 200 or status == 101:
                break
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        if status == 101 or method == "HEAD" or status in (204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b"".join(self.chunks())
        elif "content-length" in headers:
            body = self.take(int(headers["content-length"]))
        else:
            body = self.rest()
        return status, headers, body

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.until(b"\r\n").split(b";")[0], 16):
            yield self.take(size)
            assert self.take(2) == b"\r\n"
        while self.until(b"\r\n") != b"\r\n":
            pass


def eventually(condition: Callable[[], object], what: str = "", timeout_s: float = WAIT_S) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what or "it did not happen"
        time.sleep(0.005)
