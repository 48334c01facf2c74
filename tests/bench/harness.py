"""What the benchmarks of a relay share: the loopback's sshd, ssh -L beside ours, the table.

And what all benchmarks share: how their numbers are given to programs.

A client on one Unix socket, a server on another, and between them an sshd and either
our program (in a process of its own) or OpenSSH's client: as it comes, and with the
cipher that we choose, which is the harder peer. Runs alternate; the table shows medians
and the medians of the pairs' ratios to each peer.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from loopback_sshd import LoopbackSshd

from wherry.core.files import write_atomic
from wherry.tunnel.keys import known_hosts_line, load_keys
from wherry.tunnel.tunnel import Tunnel

PEERS = {"ssh": (), "ssh gcm": ("-c", "aes128-gcm@openssh.com")}
"""OpenSSH's client, by its options. It would choose chacha20-poly1305, which is slower here."""

MB = 1_000_000
CHUNK = bytes(1 << 20)
STREAMS = 8
ROUND_TRIPS = 40

Measures = dict[str, tuple[str, bool, Callable[[Path], float]]]
"""Name: unit, whether more is better, and how to measure it on a socket."""

Ask = Callable[[socket.socket], object]
"""Sends something small on a connection, and returns when it is answered."""


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    :param script: its file, which is run again for each program.
    :param serve: the server; gets the path of its socket and never returns.
    :param relay: our side; gets a connected tunnel, the directory of the sockets
        (``SIDE.sock`` to ``server.sock``), and returns what is to be closed at the end.
    :param ready: makes one connection to a socket and checks that it works.
    :param measures: makes the measures for a size of transfer in bytes.
    :param memory: measures the resident memory of our process, by a socket of it.
    :param ours: our sides, by the names of their sockets; the first is compared.
    """

    script: str
    serve: Callable[[str], None]
    relay: Callable[[Tunnel, Path], list[Any]]
    ready: Callable[[Path], object]
    measures: Callable[[int], Measures]
    memory: Callable[[Path, psutil.Process], dict[str, float]]
    ours: tuple[str, ...] = ("ours",)


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(60)
    connection.connect(str(path))
    connection.settimeout(None)
    return connection


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


def new_connections(
    path: Path, ask: Ask, *, times: int = ROUND_TRIPS, pause_s: float = 0.001
) -> float:
    """Median µs of connecting and a question, again and again."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        with connect(path) as connection:
            ask(connection)
            found.append(time.perf_counter() - begun)
        time.sleep(pause_s)
    return statistics.median(found) * 1e6


def kept_connection(
    path: Path, ask: Ask, *, times: int = 5 * ROUND_TRIPS, pause_s: float = 0.0005
) -> float:
    """Median µs of a question on a connection that stays."""
    with connect(path) as connection:
        return _median_us(connection, ask, range(times), pause_s)


def under_load(path: Path, ask: Ask, transfer: Callable[[Path, int], None], size: int) -> float:
    """Median µs of a question on a connection that stays, while all streams run."""
    ended = threading.Event()

    def load() -> None:
        try:
            rate(transfer, path, size, STREAMS)
        finally:
            ended.set()

    with connect(path) as connection:
        thread = threading.Thread(target=load)
        thread.start()
        time.sleep(0.05)
        found = _median_us(connection, ask, iter(ended.is_set, True), 0.002)
        thread.join()
    return found


def _median_us(
    connection: socket.socket, ask: Ask, rounds: Iterable[object], pause_s: float
) -> float:
    found = []
    for _ in rounds:
        begun = time.perf_counter()
        ask(connection)
        found.append(time.perf_counter() - begun)
        time.sleep(pause_s)
    return statistics.median(found) * 1e6


def run_relay(bench: Bench, directory: Path, port: int, user: str) -> None:
    """Our side, until the standard input ends."""
    from wherry.tunnel.connection import Connection

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
    relays = bench.relay(tunnel, directory)
    sys.stdin.read()
    for each in relays:
        each.close()
    tunnel.close()


def main(bench: Bench, title: str) -> None:
    """Run the benchmark by the command line's options."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--size", type=int, default=400, help="MB of a transfer (default 400)")
    parser.add_argument("--only", default="", help="measures whose name contains this")
    parser.add_argument("--internal", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.internal:
        kind, *rest = options.internal
        if kind == "serve":
            bench.serve(rest[0])
        else:
            run_relay(bench, Path(rest[0]), int(rest[1]), rest[2])
        return

    with tempfile.TemporaryDirectory(prefix="relay") as name:
        results = compare(bench, Path(name), options)
    print_table(results)
    give_json(results, options.json)


def give_json(results: Mapping[str, Any], file: Path | None) -> None:
    """Write the numbers of any benchmark to a file, or else print them in a line."""
    if file is None:
        print(json.dumps(results))
    else:
        write_atomic(file, json.dumps(results, indent=2).encode() + b"\n", mode=0o644)


def compare(bench: Bench, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start everything, measure, stop everything."""
    sshd = LoopbackSshd(directory)
    known = directory / "known_hosts"
    known.write_text(known_hosts_line("127.0.0.1", sshd.port, sshd.keys.host.public) + "\n")
    me = [sys.executable, bench.script, "--internal"]
    programs = []
    try:
        programs.append(subprocess.Popen([*me, "serve", str(directory / "server.sock")]))
        ours = subprocess.Popen(
            [*me, "relay", str(directory), str(sshd.port), sshd.user], stdin=subprocess.PIPE
        )
        programs.append(ours)
        processes = {"ours": psutil.Process(ours.pid)}
        for name, options_of_it in PEERS.items():
            ssh = ["ssh", "-F", "none", "-N", "-o", "Compression=no", *options_of_it]
            ssh += ["-i", str(sshd.keys.user_path), "-o", f"UserKnownHostsFile={known}"]
            ssh += ["-L", f"{directory}/{name}.sock:{directory}/server.sock"]
            ssh += ["-p", str(sshd.port), f"{sshd.user}@127.0.0.1"]
            programs.append(subprocess.Popen(ssh))
            processes[name] = psutil.Process(programs[-1].pid)
        paths = {side: directory / f"{side}.sock" for side in (*bench.ours, *PEERS)}
        for path in (directory / "server.sock", *paths.values()):
            deadline = time.monotonic() + 20
            while True:
                try:
                    bench.ready(path)
                    break
                except OSError:
                    # Not bound yet, or not listening yet.
                    assert time.monotonic() < deadline, f"nothing answers at {path}"
                    time.sleep(0.02)
        results: dict[str, Any] = {"runs": options.runs, "size_mb": options.size, "measures": {}}
        if options.only in "memory":
            results["memory"] = bench.memory(paths["ours"], psutil.Process(ours.pid))
        results["measures"] = alternate(
            bench.measures(options.size * MB),
            paths,
            options.runs,
            options.only,
            processes,
        )
        return results
    finally:
        for program in programs:
            if program.stdin is not None:
                program.stdin.close()
                program.wait(10)
            program.terminate()
            program.wait(10)
        sshd.stop()


def alternate(
    measures: Measures,
    paths: dict[str, Path],
    runs: int,
    only: str = "",
    programs: Mapping[str, psutil.Process] | None = None,
) -> dict[str, Any]:
    """Measure each side in turns, and return medians and the medians of the pairs' ratios.

    :param paths: the socket of each side, of ours first; each other run takes them backwards.
    :param programs: of some sides, to tell the processor's time that each measuring took,
        which a busy computer distorts less than it does the rest.
    """
    programs = programs or {}
    results: dict[str, Any] = {}
    sides = list(paths)
    for name, (unit, more, measure) in measures.items():
        if only not in name:
            continue
        found: dict[str, list[float]] = {side: [] for side in sides}
        processor: dict[str, list[float]] = {side: [] for side in programs}
        for run in range(runs):
            for side in sides if run % 2 else sides[::-1]:
                before = _processor_s(programs.get(side))
                found[side].append(measure(paths[side]))
                if side in programs:
                    processor[side].append(_processor_s(programs[side]) - before)
        ratios = {
            peer: statistics.median(a / b for a, b in zip(found["ours"], found[peer], strict=True))
            for peer in PEERS
            if peer in paths
        }
        results[name] = {
            "unit": unit,
            "more_is_better": more,
            **{side: statistics.median(found[side]) for side in sides},
            "ratios": ratios,
            "samples": found,
            "processor_s": {side: statistics.median(used) for side, used in processor.items()},
        }
        # Some take half an hour, and what is ended before the table has been of some use.
        said = ", ".join(f"{ratio:.2f}x of {peer}" for peer, ratio in ratios.items())
        print(f"  {name}: {said}", file=sys.stderr, flush=True)
    return results


def _processor_s(program: psutil.Process | None) -> float:
    if program is None:
        return 0.0
    used = program.cpu_times()
    return used.user + used.system


def print_table(results: dict[str, Any]) -> None:
    """Print each measure: what each side reached, ours to each peer, the processor's time.

    That of a transfer is per MB: what a stream costs, however fast the others let it be.
    """
    table = Table(box=None)
    for name, found in results["measures"].items():
        sides, ratios, used = found["samples"], found["ratios"], found["processor_s"]
        if not table.columns:
            for title in ("", *sides, "", *(f"of {peer}" for peer in ratios)):
                table.add_column(title, justify="right")
            table.add_column(f"processor: {' / '.join(used)}" if used else "")
        scale, unit = 1.0, "s"
        if found["unit"] == "MB/s" and "size_mb" in results:
            scale, unit = 1000 / results["size_mb"], "ms/MB"
        each = " / ".join(f"{scale * value:.2f}" for value in used.values())
        table.add_row(
            name,
            *(f"{found[side]:.0f}" for side in sides),
            found["unit"],
            *(f"{ratio:.2f}x" for ratio in ratios.values()),
            f"{each} {unit}" if used else "",
        )
    Console(width=120).print(table)
    for name, value in results.get("memory", {}).items():
        print(f"{name:30} {value:9.1f}")
