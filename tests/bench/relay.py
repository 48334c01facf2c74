"""How fast the relay is, next to ``ssh -L``: one command, no VM.

    python tests/bench/relay.py [--json FILE] [--runs N] [--size MB] [--only NAME]

See :mod:`harness` for how it is measured.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from harness import CHUNK, MB, STREAMS, Bench, Measures, connect, main, rate

from wherry.tunnel.tunnel import Tunnel

ROUND_TRIPS = 40


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


def round_trip(path: Path, pause_s: float = 0.001) -> float:
    """Median µs of connecting and echoing one byte, again and again."""
    times = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        with connect(path) as connection:
            connection.sendall(b"e")
            assert connection.recv(1) == b"e"
            times.append(time.perf_counter() - start)
        time.sleep(pause_s)
    return statistics.median(times) * 1e6


def ping_under_load(
    transfer: Callable[[Path, int], None], path: Path, size: int
) -> tuple[float, float]:
    """MB/s of 8 streams, and the median µs of a small request and answer meanwhile."""
    times = []
    done = threading.Event()
    speed = [0.0]

    def load() -> None:
        speed[0] = rate(transfer, path, size, STREAMS)
        done.set()

    with connect(path) as connection:
        thread = threading.Thread(target=load)
        thread.start()
        time.sleep(0.05)
        while not done.is_set():
            start = time.perf_counter()
            connection.sendall(b"e")
            assert connection.recv(1) == b"e"
            times.append(time.perf_counter() - start)
            time.sleep(0.002)
        thread.join()
    return speed[0], statistics.median(times) * 1e6


def memory(path: Path, process: psutil.Process) -> dict[str, float]:
    """MB of the relay's resident memory, and how much it grew."""

    def rss() -> float:
        return process.memory_info().rss / MB

    before = rss()
    idle = [connect(path) for _ in range(200)]
    for connection in idle:
        connection.sendall(b"e")
        assert connection.recv(1) == b"e"
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
        "connect + 1 byte": ("µs", False, round_trip),
        "the same, no pause": ("µs", False, lambda path: round_trip(path, 0.0)),
        "8 streams down": ("MB/s", True, lambda path: rate(down, path, size, STREAMS)),
        "8 streams up": ("MB/s", True, lambda path: rate(up, path, size, STREAMS)),
        "ping, 8 down": ("µs", False, lambda path: ping_under_load(down, path, size)[1]),
        "ping, 8 up": ("µs", False, lambda path: ping_under_load(up, path, size)[1]),
    }


if __name__ == "__main__":
    main(
        Bench(__file__, serve, relay, round_trip, measures, memory),
        "How fast the relay is, next to ssh -L.",
    )
