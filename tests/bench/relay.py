"""How fast the relay is, next to ``ssh -L``: one command, no VM.

    python tests/bench/relay.py [--json FILE] [--runs N] [--quick]

A client on one Unix socket, a server on another, and between them the loopback's
sshd and either our relay (in a process of its own) or OpenSSH's client with the
same cipher. Runs alternate; the table shows medians and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from loopback_sshd import LoopbackSshd

from wherry.core.files import write_atomic
from wherry.tunnel.keys import known_hosts_line, load_keys

MB = 1_000_000
CHUNK = bytes(1 << 20)
STREAMS = 8
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


def relay(directory: Path, port: int, user: str) -> None:
    """Our relay, until the standard input ends."""
    from wherry.platform import current
    from wherry.relay.relay import Relay
    from wherry.tunnel.connection import Connection
    from wherry.tunnel.tunnel import Tunnel

    keys = load_keys(directory / "keys")
    tunnel = Tunnel(
        lambda watcher: Connection.connect(
            ("127.0.0.1", port),
            user=user,
            user_key=keys.user,
            host_public=keys.host.public,
            watcher=watcher,
        )
    )
    tunnel.start()
    tunnel.wait(30)
    listener = current().listen_local(directory / "ours.sock")
    endpoint = Relay(listener, lambda: tunnel.begin_unix(str(directory / "server.sock")))
    endpoint.start()
    profile = os.environ.get("RELAY_PROFILE")
    sys.stdin.read()
    if profile:
        print(endpoint.counters, file=sys.stderr)
    endpoint.close()
    tunnel.close()


# -- the client --------------------------------------------------------------------------------


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(60)
    connection.connect(str(path))
    connection.settimeout(None)
    return connection


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


def rate(transfer: Callable[[Path, int], None], path: Path, size: int, streams: int = 1) -> float:
    """MB/s of all streams together."""
    threads = [
        threading.Thread(target=transfer, args=(path, size // streams)) for _ in range(streams)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return size / MB / (time.perf_counter() - start)


def round_trip(path: Path) -> float:
    """Median µs of connecting and echoing one byte."""
    times = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        with connect(path) as connection:
            connection.sendall(b"e")
            assert connection.recv(1) == b"e"
            times.append(time.perf_counter() - start)
        time.sleep(0.001)
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


def measures(size: int) -> dict[str, tuple[str, bool, Callable[[Path], float]]]:
    """Name: unit, whether more is better, and how to measure it on a socket."""
    return {
        "1 stream down": ("MB/s", True, lambda path: rate(down, path, size)),
        "1 stream up": ("MB/s", True, lambda path: rate(up, path, size)),
        "connect + 1 byte": ("µs", False, round_trip),
        "8 streams down": ("MB/s", True, lambda path: rate(down, path, size, STREAMS)),
        "8 streams up": ("MB/s", True, lambda path: rate(up, path, size, STREAMS)),
        "ping, 8 down": ("µs", False, lambda path: ping_under_load(down, path, size)[1]),
        "ping, 8 up": ("µs", False, lambda path: ping_under_load(up, path, size)[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--size", type=int, default=400, help="MB of a transfer (default 400)")
    parser.add_argument("--only", default="", help="measures whose name contains this")
    parser.add_argument("--internal", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.internal:
        kind, *rest = options.internal
        if kind == "serve":
            serve(rest[0])
        else:
            relay(Path(rest[0]), int(rest[1]), rest[2])
        return

    with tempfile.TemporaryDirectory(prefix="relay") as name:
        results = compare(Path(name), options)
    print_table(results)
    if options.json:
        write_atomic(options.json, json.dumps(results, indent=2).encode() + b"\n", mode=0o644)
    else:
        print(json.dumps(results))


def compare(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start everything, measure, stop everything."""
    sshd = LoopbackSshd(directory)
    known = directory / "known_hosts"
    known.write_text(known_hosts_line("127.0.0.1", sshd.port, sshd.keys.host.public) + "\n")
    me = [sys.executable, __file__, "--internal"]
    programs = []
    try:
        programs.append(subprocess.Popen([*me, "serve", str(directory / "server.sock")]))
        ours = subprocess.Popen(
            [*me, "relay", str(directory), str(sshd.port), sshd.user], stdin=subprocess.PIPE
        )
        programs.append(ours)
        ssh = ["ssh", "-F", "none", "-N", "-c", "aes128-gcm@openssh.com", "-o", "Compression=no"]
        ssh += ["-i", str(sshd.keys.user_path), "-o", f"UserKnownHostsFile={known}"]
        ssh += ["-L", f"{directory}/theirs.sock:{directory}/server.sock"]
        ssh += ["-p", str(sshd.port), f"{sshd.user}@127.0.0.1"]
        programs.append(subprocess.Popen(ssh))
        paths = {"ours": directory / "ours.sock", "ssh": directory / "theirs.sock"}
        for path in paths.values():
            deadline = time.monotonic() + 10
            while not path.exists():
                assert time.monotonic() < deadline, f"no {path}"
                time.sleep(0.02)
            round_trip(path)
        results: dict[str, Any] = {"runs": options.runs, "size_mb": options.size, "measures": {}}
        if options.only in "memory":
            results["memory"] = memory(paths["ours"], psutil.Process(ours.pid))
        for name, (unit, more, measure) in measures(options.size * MB).items():
            if options.only not in name:
                continue
            found: dict[str, list[float]] = {"ours": [], "ssh": []}
            for run in range(options.runs):
                for side in ("ours", "ssh") if run % 2 else ("ssh", "ours"):
                    found[side].append(measure(paths[side]))
            ratios = [a / b for a, b in zip(found["ours"], found["ssh"], strict=True)]
            results["measures"][name] = {
                "unit": unit,
                "more_is_better": more,
                "ours": statistics.median(found["ours"]),
                "ssh": statistics.median(found["ssh"]),
                "ratio": statistics.median(ratios),
                "samples": found,
            }
        return results
    finally:
        for program in programs:
            if program.stdin is not None:
                program.stdin.close()
                program.wait(10)
            program.terminate()
            program.wait(10)
        sshd.stop()


def print_table(results: dict[str, Any]) -> None:
    print(f"{'':20} {'ours':>9} {'ssh -L':>9} {'':5} {'ratio':>6}")
    for name, found in results["measures"].items():
        print(
            f"{name:20} {found['ours']:9.0f} {found['ssh']:9.0f} {found['unit']:5}"
            f" {found['ratio']:5.2f}x"
        )
    for name, value in results.get("memory", {}).items():
        print(f"{name:30} {value:9.1f}")


if __name__ == "__main__":
    main()
