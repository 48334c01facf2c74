"""How fast the API's proxy is, next to ``ssh -L`` and to a relay that understands nothing.

    python tests/bench/api.py [--json FILE] [--runs N] [--size MB] [--only NAME]

The server answers HTTP as the engine does, in Go's chunks of 32 KiB where it streams.
See :mod:`harness` for how it is measured.
"""

from __future__ import annotations

import cProfile
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from harness import (
    MB,
    STREAMS,
    Bench,
    Measures,
    connect,
    kept_connection,
    main,
    new_connections,
    rate,
    under_load,
)

from wherry.tunnel.tunnel import Tunnel

GO_CHUNK = b"8000\r\n%s\r\n" % bytes(0x8000) * 32
"""A MiB as Go's ``net/http`` sends it when ``io.Copy`` feeds it."""

PING = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nUser-Agent: Docker-Client/28.5.2 (linux)\r\n\r\n"
PONG = (
    b"HTTP/1.1 200 OK\r\nApi-Version: 1.51\r\nBuilder-Version: 2\r\n"
    b"Cache-Control: no-cache, no-store, must-revalidate\r\nContent-Length: 2\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nDate: Mon, 23 Nov 2026 21:00:00 GMT\r\n"
    b"Docker-Experimental: false\r\nOstype: linux\r\nPragma: no-cache\r\n"
    b"Server: Docker/28.5.2 (linux)\r\nSwarm: inactive\r\n\r\nOK"
)


# -- the programs ----------------------------------------------------------------------------


def serve(path: str) -> None:
    """A stub of the engine: ``/_ping``, ``/down?SIZE``, ``/up`` with a chunked body."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(512)

    def one(connection: socket.socket) -> None:
        with connection:
            buffer = bytearray(1 << 20)
            while (count := connection.recv_into(buffer)) > 0:
                head = bytes(buffer[:count])
                if head.startswith(b"GET /_ping"):
                    connection.sendall(PONG)
                elif match := re.match(rb"GET /down\?(\d+)", head):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                    for _ in range(int(match[1]) >> 20):
                        connection.sendall(GO_CHUNK)
                    connection.sendall(b"0\r\n\r\n")
                else:
                    end = head[-5:]
                    while end != b"0\r\n\r\n":
                        count = connection.recv_into(buffer)
                        end = (end + buffer[max(0, count - 5) : count])[-5:]
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=one, args=(connection,), daemon=True).start()


def relay(tunnel: Tunnel, directory: Path) -> list[Any]:
    """The proxy, and a plain relay beside it."""
    from plain_relay import Relay

    from wherry.api.server import Endpoint
    from wherry.platform import current

    remote = str(directory / "server.sock")
    profile = os.environ.get("API_PROFILE")
    if profile:
        _profile_threads(profile)
    made: list[Any] = []
    for name, kind in (("ours", Endpoint), ("plain", Relay)):
        endpoint: Any = kind(  # type: ignore[operator]
            current().listen_local(directory / f"{name}.sock"),
            lambda: tunnel.begin_unix(remote),
            prepare=lambda: tunnel.prepare_unix(remote),
        )
        endpoint.start()
        made.append(endpoint)
    return made


def _profile_threads(path: str) -> None:
    """Profile each new thread; the first ones' statistics are written where told."""
    run = threading.Thread.run

    def profiled(self: threading.Thread) -> None:
        profiler = cProfile.Profile()
        profiler.runcall(run, self)
        profiler.dump_stats(f"{path}.{self.name}")

    threading.Thread.run = profiled  # type: ignore[method-assign]


# -- the client --------------------------------------------------------------------------------


def ping(connection: socket.socket) -> None:
    connection.sendall(PING)
    answer = b""
    while len(answer) < len(PONG):
        more = connection.recv(4096)
        assert more, f"the connection ended after {answer!r}"
        answer += more
    assert answer == PONG


def down(path: Path, size: int) -> None:
    size = size >> 20 << 20
    left = (size >> 20) * len(GO_CHUNK)
    with connect(path) as connection:
        connection.sendall(b"GET /down?%d HTTP/1.1\r\nHost: docker\r\n\r\n" % size)
        buffer = bytearray(1 << 20)
        count = connection.recv_into(buffer)
        left -= count - buffer.index(b"\r\n\r\n") - 4
        left += 5
        while left:
            count = connection.recv_into(buffer)
            assert count, "the stream ended early"
            left -= count


def up(path: Path, size: int) -> None:
    with connect(path) as connection:
        connection.sendall(
            b"POST /up HTTP/1.1\r\nHost: docker\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(size >> 20):
            connection.sendall(GO_CHUNK)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def memory(path: Path, process: psutil.Process) -> dict[str, float]:
    """MB of the proxy's resident memory: 200 connections, and 1 GB to a slow reader."""

    def rss() -> float:
        return process.memory_info().rss / MB

    before = rss()
    idle = [connect(path) for _ in range(200)]
    for connection in idle:
        ping(connection)
    with_idle = most = rss()
    left = 1000
    with connect(path) as connection:
        connection.sendall(b"GET /down?%d HTTP/1.1\r\nHost: docker\r\n\r\n" % (left << 20))
        buffer = bytearray(1 << 20)
        size = left * len(GO_CHUNK)
        while size > 0:
            count = connection.recv_into(buffer)
            size -= count
            time.sleep(0.0005)  # slower than the proxy could
            most = max(most, rss())
    for connection in idle:
        connection.close()
    return {
        "rss_start_mb": before,
        "rss_200_idle_mb": with_idle,
        "rss_peak_slow_reader_mb": most,
        "growth_mb": most - before,
        "threads": process.num_threads(),
    }


# -- the comparison -------------------------------------------------------------------------


def measures(size: int) -> Measures:
    return {
        "ping, new connection": ("µs", False, lambda path: new_connections(path, ping)),
        "the same, no pause": ("µs", False, lambda path: new_connections(path, ping, pause_s=0)),
        "ping, kept connection": ("µs", False, lambda path: kept_connection(path, ping)),
        "1 stream down": ("MB/s", True, lambda path: rate(down, path, size)),
        "1 stream up": ("MB/s", True, lambda path: rate(up, path, size)),
        "8 streams down": ("MB/s", True, lambda path: rate(down, path, size, STREAMS)),
        "8 streams up": ("MB/s", True, lambda path: rate(up, path, size, STREAMS)),
        "ping, 8 down": ("µs", False, lambda path: under_load(path, ping, down, size)),
        "ping, 8 up": ("µs", False, lambda path: under_load(path, ping, up, size)),
    }


if __name__ == "__main__":
    main(
        Bench(
            __file__,
            serve,
            relay,
            lambda path: new_connections(path, ping),
            measures,
            memory,
            ("ours", "plain"),
        ),
        "How fast the API's proxy is, next to ssh -L and a plain relay.",
    )
