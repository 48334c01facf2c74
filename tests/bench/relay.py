"""How fast the relay is, next to ``ssh -L``: one command, no VM.

    python tests/bench/relay.py [--json FILE] [--runs N] [--size MB] [--only NAME]

See :mod:`harness` for how it is measured.
"""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from harness import (
    CHUNK,
    MB,
    STREAMS,
    Bench,
    Measures,
    connect,
    main,
    new_connections,
    rate,
    under_load,
)

from wherry.tunnel.tunnel import Tunnel

# -- the programs ----------------------------------------------------------------------------


def serve(path: str) -> None:
    """The server: ``D`` + size sends that much, ``U`` + size takes it, all else is echoed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(512)

    def one(connection: socket.socket) -> None:
        with connection:
            while head := connection.recv(1):
                if head == b"D":
                    left = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
                    while left:
                        left -= connection.send(memoryview(CHUNK)[: min(left, len(CHUNK))])
                elif head == b"U":
                    left = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
                    buffer = bytearray(1 << 20)
                    while left:
                        left -= connection.recv_into(buffer, min(left, len(buffer)))
                    connection.sendall(b"k")
                else:
                    connection.sendall(head)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=one, args=(connection,), daemon=True).start()


def relay(tunnel: Tunnel, directory: Path) -> list[Any]:
    """Our relay."""
    from plain_relay import Relay

    from wherry.platform import current

    listener = current().listen_local(directory / "ours.sock")
    remote = str(directory / "server.sock")
    endpoint = Relay(
        listener,
        lambda: tunnel.begin_unix(remote),
        prepare=lambda: tunnel.prepare_unix(remote),
    )
    endpoint.start()
    return [endpoint]


# -- the client --------------------------------------------------------------------------------


def down(path: Path, size: int) -> None:
    with connect(path) as connection:
        connection.sendall(b"D" + size.to_bytes(8, "big"))
        buffer = bytearray(1 << 20)
        while size:
            count = connection.recv_into(buffer)
            assert count, "the stream ended early"
            size -= count


def up(path: Path, size: int) -> None:
    with connect(path) as connection:
        connection.sendall(b"U" + size.to_bytes(8, "big"))
        while size:
            size -= connection.send(memoryview(CHUNK)[: min(size, len(CHUNK))])
        assert connection.recv(1) == b"k"


def echo(connection: socket.socket) -> None:
    connection.sendall(b"e")
    assert connection.recv(1) == b"e"


def memory(path: Path, process: psutil.Process) -> dict[str, float]:
    """MB of the relay's resident memory, and how much it grew."""

    def rss() -> float:
        return process.memory_info().rss / MB

    before = rss()
    idle = [connect(path) for _ in range(200)]
    for connection in idle:
        echo(connection)
    with_idle = rss()
    with connect(path) as connection:
        left = 1000 * MB
        connection.sendall(b"D" + left.to_bytes(8, "big"))
        buffer = bytearray(1 << 20)
        most = 0.0
        while left:
            count = connection.recv_into(buffer, min(left, len(buffer)))
            left -= count
            time.sleep(0.0005)  # slower than the relay could
            most = max(most, rss())
    after = rss()
    for connection in idle:
        connection.close()
    return {
        "rss_start_mb": before,
        "rss_200_idle_mb": with_idle,
        "rss_peak_slow_reader_mb": most,
        "growth_mb": max(most, after) - before,
        "threads": process.num_threads(),
    }


# -- the comparison -------------------------------------------------------------------------


def measures(size: int) -> Measures:
    return {
        "1 stream down": ("MB/s", True, lambda path: rate(down, path, size)),
        "1 stream up": ("MB/s", True, lambda path: rate(up, path, size)),
        "connect + 1 byte": ("µs", False, lambda path: new_connections(path, echo)),
        "the same, no pause": ("µs", False, lambda path: new_connections(path, echo, pause_s=0)),
        "8 streams down": ("MB/s", True, lambda path: rate(down, path, size, STREAMS)),
        "8 streams up": ("MB/s", True, lambda path: rate(up, path, size, STREAMS)),
        "ping, 8 down": ("µs", False, lambda path: under_load(path, echo, down, size)),
        "ping, 8 up": ("µs", False, lambda path: under_load(path, echo, up, size)),
    }


if __name__ == "__main__":
    main(
        Bench(
            __file__,
            serve,
            relay,
            lambda path: new_connections(path, echo),
            measures,
            memory,
        ),
        "How fast the relay is, next to ssh -L.",
    )
