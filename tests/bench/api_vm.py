"""How fast a real engine is through our endpoint, next to ``ssh -L`` into the same guest.

    python tests/bench/api_vm.py [--runs N] [--size MB] [--only NAME] [--json FILE]

Both lead to the engine's socket of one machine, ours by its ``docker.sock``, OpenSSH's by
``ssh -F CONFIG -L docker.sock:/run/docker.sock`` with what ``wherry ssh-config`` prints. The
client is the docker CLI, as users run it, except for the pings. They alternate; the table
shows medians and the median of the pairs' ratios, of which less is better.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import (
    MB,
    Measures,
    alternate,
    give_json,
    kept_connection,
    new_connections,
    print_table,
)
from sandbox import Sandbox

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.vm import image

CPUS, MEMORY = 2, "2GiB"
TIMEOUT_S = 900
ROUND_TRIPS = 20
PING = b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n"


class Engine:
    """One machine's engine, asked through any socket that leads to it."""

    def __init__(self, sandbox: Sandbox, directory: Path, size: int) -> None:
        self._directory = directory
        self._size = size
        platform = current()
        clients = image.choose(Layout.current(platform), "", platform.architecture()).clients
        config = directory / "docker-config"
        config.mkdir()
        plugins = {"cliPluginsExtraDirs": [str(clients / "cli-plugins")]}
        (config / "config.json").write_text(json.dumps(plugins))
        self._program = str(clients / "docker") if (clients / "docker").exists() else "docker"
        self._env = {**sandbox.env, "DOCKER_CONFIG": str(config), "BUILDKIT_PROGRESS": "plain"}
        self._archive = directory / "image.tar"
        self._context = directory / "context"
        self._context.mkdir()

    def prepare(self, path: Path) -> None:
        """Make the image that is saved and loaded."""
        (self._context / "Dockerfile").write_text("FROM scratch\nCOPY data /data\n")
        (self._context / "data").write_bytes(os.urandom(self._size))
        self.docker(path, "build", "-q", "-t", "large", str(self._context))
        self.docker(path, "save", "-o", str(self._archive), "large")
        (self._context / "Dockerfile").write_text(
            "FROM busybox\nRUN --mount=type=bind,target=/context [ -s /context/data ]\n"
        )

    def docker(self, path: Path, *arguments: str) -> float:
        """Run the docker CLI, and return the ms it took."""
        begun = time.perf_counter()
        done = subprocess.run(
            [self._program, *arguments],
            env={**self._env, "DOCKER_HOST": f"unix://{path}"},
            capture_output=True,
            timeout=TIMEOUT_S,
        )
        took = time.perf_counter() - begun
        if done.returncode != 0:
            sys.exit(f"docker {' '.join(arguments)}: {done.stderr.decode()}")
        return took * 1e3

    def load(self, path: Path) -> float:
        """Load the image, none of which is there."""
        self.docker(path, "rmi", "-f", "large")
        return self.docker(path, "load", "-q", "-i", str(self._archive))

    def save(self, path: Path) -> float:
        """Save the image."""
        return self.docker(path, "save", "-o", str(self._directory / "saved.tar"), "large")

    def build(self, path: Path) -> float:
        """Send a context of which nothing is known yet, and look at it in a step."""
        (self._context / "data").write_bytes(os.urandom(self._size // 2))
        return self.docker(path, "build", "-q", "--no-cache", str(self._context))

    def measures(self) -> Measures:
        size = self._size // MB
        return {
            "ping, new connection": (
                "µs",
                False,
                lambda path: new_connections(path, ping, times=ROUND_TRIPS, pause_s=0.01),
            ),
            "ping, kept connection": (
                "µs",
                False,
                lambda path: kept_connection(path, ping, times=2 * ROUND_TRIPS, pause_s=0.005),
            ),
            "docker ps": ("ms", False, lambda path: self.docker(path, "ps")),
            "docker run --rm": (
                "ms",
                False,
                lambda path: self.docker(path, "run", "--rm", "busybox", "true"),
            ),
            f"docker save, {size} MB": ("ms", False, self.save),
            f"docker load, {size} MB": ("ms", False, self.load),
            f"docker build, {size // 2} MB": ("ms", False, self.build),
        }


def ping(connection: Any) -> None:
    connection.sendall(PING)
    answer = b""
    while not answer.endswith(b"\r\n\r\nOK"):
        chunk = connection.recv(4096)
        assert chunk, answer
        answer += chunk


def forward(sandbox: Sandbox, directory: Path, path: Path) -> subprocess.Popen[bytes]:
    """Start OpenSSH's forwarding, and return when it listens."""
    config = directory / "ssh-config"
    config.write_bytes(sandbox.wherry("ssh-config").stdout)
    process = subprocess.Popen(
        ["ssh", "-F", config, "-N", "-o", "ExitOnForwardFailure=yes",
         "-L", f"{path}:/run/docker.sock", "wherry-default"],
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            sys.exit("ssh -L does not listen")
        time.sleep(0.05)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--size", type=int, default=200, help="MB of the image (default 200)")
    parser.add_argument("--only", default="", help="measures whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Ended from outside, it still ends its machine.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="wherry-bench-") as scratch:
        directory = Path(scratch)
        sandbox = Sandbox(directory)
        ssh = None
        try:
            sandbox.wherry("start", "--cpus", str(CPUS), "--memory", MEMORY)
            sandbox.add_busybox()
            status = sandbox.status()
            paths = {
                "ours": Path(status["docker_host"].removeprefix("unix://")),
                "ssh": directory / "ssh.sock",
            }
            ssh = forward(sandbox, directory, paths["ssh"])
            engine = Engine(sandbox, directory, options.size * MB)
            if not options.only.startswith(("ping", "docker ps", "docker run")):
                engine.prepare(paths["ours"])
            results: dict[str, Any] = {
                "accelerator": status["accelerator"],
                "runs": options.runs,
                "size_mb": options.size,
                "measures": alternate(engine.measures(), paths, options.runs, options.only),
            }
        finally:
            if ssh is not None:
                ssh.terminate()
                ssh.wait(10)
            sandbox.stop_all()
    print_table(results)
    give_json(results, options.json)


if __name__ == "__main__":
    main()
