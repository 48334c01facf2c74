"""How fast published ports are: one command, one machine of its own.

    python tests/bench/ports.py [--json FILE] [--runs N] [--size MB]

A container's port through our forwards, next to a ``hostfwd`` that was added by hand in
the same QEMU, and next to ``ssh -L`` to the same port. QEMU's monitor takes one client,
so the forward by hand is made and measured while the service is dead; ours stays in QEMU
meanwhile. Runs alternate; the table shows medians and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import give_json
from loopback import free_port
from sandbox import Sandbox, wait_until

MB = 1_000_000
CONNECTIONS = 100
DATAGRAMS = 1000
DATAGRAM_BYTES = 1200
DATAGRAM_PAUSE_S = 0.002

Address = tuple[str, int]

SERVER = """
import socket, threading
def tcp(connection, head):
    with connection:
        left = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
        if head == b"D":
            data = memoryview(bytes(1 << 20))
            while left:
                left -= connection.send(data[: min(left, len(data))])
        else:
            buffer = bytearray(1 << 20)
            while left:
                left -= connection.recv_into(buffer, min(left, len(buffer)))
            connection.sendall(b"k")
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", 80))
        while True:
            server.sendto(*server.recvfrom(65536))
threading.Thread(target=udp, daemon=True).start()
with socket.create_server(("", 80), backlog=512) as server:
    while True:
        connection = server.accept()[0]
        head = connection.recv(1)
        if head in (b"D", b"U"):
            threading.Thread(target=tcp, args=[connection, head], daemon=True).start()
        else:
            # A thread for each would cost as much as the way there.
            connection.sendall(head)
            connection.close()
"""


def connect(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=120)


def down(address: Address, size: int) -> float:
    """MB/s out of the container."""
    with connect(address) as connection:
        start = time.perf_counter()
        connection.sendall(b"D" + size.to_bytes(8, "big"))
        buffer, left = bytearray(1 << 20), size
        while left:
            count = connection.recv_into(buffer)
            assert count, "the stream ended early"
            left -= count
        return size / MB / (time.perf_counter() - start)


def up(address: Address, size: int) -> float:
    """MB/s into the container."""
    data = memoryview(bytes(1 << 20))
    with connect(address) as connection:
        start = time.perf_counter()
        connection.sendall(b"U" + size.to_bytes(8, "big"))
        left = size
        while left:
            left -= connection.send(data[: min(left, len(data))])
        assert connection.recv(1) == b"k"
        return size / MB / (time.perf_counter() - start)


def rate(address: Address, size: int) -> float:
    """Connections a second, each with a byte to the container and back."""
    start = time.perf_counter()
    for _ in range(CONNECTIONS):
        with connect(address) as connection:
            connection.sendall(b"e")
            assert connection.recv(1) == b"e"
    return CONNECTIONS / (time.perf_counter() - start)


def udp_lost(address: Address) -> int:
    """How many of the datagrams, sent at a moderate rate, do not come back."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    seen: set[bytes] = set()
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.connect(address)
        client.settimeout(DATAGRAM_PAUSE_S)

        def receive(until: float) -> None:
            while len(seen) < DATAGRAMS and time.perf_counter() < until:
                try:
                    seen.add(client.recv(65536)[:8])
                except TimeoutError:
                    pass

        start = time.perf_counter()
        for number in range(DATAGRAMS):
            client.send(number.to_bytes(8, "big").ljust(DATAGRAM_BYTES, b"x"))
            receive(start + (number + 1) * DATAGRAM_PAUSE_S)
        receive(time.perf_counter() + 5)
    return DATAGRAMS - len(seen)


MEASURES: dict[str, tuple[str, Callable[[Address, int], float]]] = {
    "1 stream down": ("MB/s", down),
    "1 stream up": ("MB/s", up),
    "connect + 1 byte": ("1/s", rate),
}


def compare(sides: dict[str, Address], runs: int, size: int) -> dict[str, Any]:
    """Measure each side in turn; the ratio is the first one's to the last one's."""
    results: dict[str, Any] = {}
    for name, (unit, measure) in MEASURES.items():
        found: dict[str, list[float]] = {side: [] for side in sides}
        for run in range(runs):
            for side in list(sides) if run % 2 else reversed(sides):
                found[side].append(measure(sides[side], size))
        results[name] = {"unit": unit, "samples": found}
    return results


def median_ratio(samples: dict[str, list[float]], side: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(samples[side], samples[base], strict=True))


def add_by_hand(monitor: Path, rule: str) -> None:
    """Run ``hostfwd_add`` in a QEMU whose service is dead."""
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.settimeout(10)
        qmp.connect(str(monitor))
        lines = qmp.makefile("rw")
        lines.readline()
        for request in (
            {"execute": "qmp_capabilities"},
            {
                "execute": "human-monitor-command",
                "arguments": {"command-line": f"hostfwd_add net0 {rule}"},
            },
        ):
            lines.write(json.dumps(request) + "\n")
            lines.flush()
            answer = json.loads(lines.readline())
            while "event" in answer:
                answer = json.loads(lines.readline())
            assert not answer["return"], answer


def answers(address: Address) -> bool:
    try:
        with connect(address) as connection:
            connection.sendall(b"e")
            return connection.recv(1) == b"e"
    except OSError:
        return False


def measure(directory: Path, runs: int, size: int) -> dict[str, Any]:
    """Start a machine and everything else, measure, stop everything."""
    sandbox = Sandbox(directory)
    ssh: subprocess.Popen[bytes] | None = None
    try:
        sandbox.wherry("start", "--cpus", "2", "--memory", "2GiB")
        context = directory / "image"
        context.mkdir()
        (context / "busybox").write_bytes(
            sandbox.wherry("shell", "--", "cat", "/usr/bin/busybox").stdout
        )
        (context / "busybox").chmod(0o755)
        (context / "Dockerfile").write_text(
            'FROM scratch\nCOPY busybox /bin/busybox\nENTRYPOINT ["/bin/busybox"]\n'
        )
        sandbox.docker("build", "-q", "-t", "busybox", str(context))
        port, by_ssh, by_hand = free_port(), free_port(), free_port()
        sandbox.docker(
            "run", "-d", "--name", "server", "-p", f"{port}:80", "-p", f"{port}:80/udp",
            "busybox", "sleep", "99999",
        )  # fmt: skip
        process = sandbox.docker("inspect", "-f", "{{.State.Pid}}", "server").stdout.decode()
        enter = ("setsid", "nsenter", "-t", process.strip(), "-n", "python3", "-c", SERVER)
        sandbox.wherry("shell", "--", "sh", "-c", '"$@" </dev/null >/dev/null 2>&1 &', "sh", *enter)
        config = directory / "ssh-config"
        config.write_bytes(sandbox.wherry("ssh-config").stdout)
        forward = f"127.0.0.1:{by_ssh}:127.0.0.1:{port}"
        ssh = subprocess.Popen(
            ["ssh", "-F", str(config), "-c", "aes128-gcm@openssh.com", "-N", "-L", forward,
             "wherry-default"]
        )  # fmt: skip
        ours, ours6 = ("127.0.0.1", port), ("::1", port)
        for each in (ours, ours6, ("127.0.0.1", by_ssh)):
            wait_until(lambda each=each: answers(each), 60, f"{each} answers")
        results = {
            "to_ssh": compare(
                {"ours": ours, "::1": ours6, "ssh -L": ("127.0.0.1", by_ssh)}, runs, size
            ),
            "udp_lost": {"127.0.0.1": udp_lost(ours), "::1": udp_lost(ours6)},
        }
        ssh.terminate()
        os.kill(sandbox.status()["service_pid"], signal.SIGKILL)
        wait_until(lambda: sandbox.status()["state"] == "broken", 10, "the service is dead")
        monitor = sandbox.home / "machines" / "default" / "qmp.sock"
        add_by_hand(monitor, f"tcp:127.0.0.1:{by_hand}-:{port}")
        results["to_hostfwd"] = compare(
            {"ours": ours, "hostfwd": ("127.0.0.1", by_hand)}, runs, size
        )
        return results
    finally:
        if ssh is not None:
            ssh.kill()
            ssh.wait(10)
        sandbox.stop_all()


def print_table(results: dict[str, Any]) -> None:
    for base, key in (("ssh -L", "to_ssh"), ("hostfwd", "to_hostfwd")):
        for name, found in results[key].items():
            samples = found["samples"]
            values = "  ".join(
                f"{side} {statistics.median(each):.0f}" for side, each in samples.items()
            )
            ratios = "  ".join(
                f"{side} {median_ratio(samples, side, base):.2f}x of {base}"
                for side in samples
                if side != base
            )
            print(f"{name:18} {found['unit']:5} {values:45} {ratios}")
    for address, lost in results["udp_lost"].items():
        print(f"UDP echo to {address}: {lost} of {DATAGRAMS} lost")


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast published ports are.")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--size", type=int, default=100, help="MB of a transfer (default 100)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ports") as name:
        results = measure(Path(name), options.runs, options.size * MB)
    print_table(results)
    give_json(results, options.json)


if __name__ == "__main__":
    main()
