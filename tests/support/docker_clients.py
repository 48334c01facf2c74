"""Real Docker clients, pointed at a machine's endpoint as a user points them.

`DOCKER_HOST` leads to the endpoint, which is what ``eval "$(wherry env)"`` sets. The docker
CLI and its plugins are those of the guest image where it has them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import pytest
from sandbox import Sandbox, run, wait_until

from wherry.vm.image import Image

CALL_TIMEOUT_S = 120
"""For one command against a guest that is emulated on a busy computer."""


class Clients:
    """The environment that clients run in, and the docker CLI in it.

    :param machine: runs, and is named ``default``.
    :param image: whose exported clients are used.
    :param directory: for the docker CLI's configuration; exists.
    """

    def __init__(self, machine: Sandbox, image: Image, directory: Path) -> None:
        self.machine = machine
        self.url: str = machine.status()["docker_host"]
        config = {"cliPluginsExtraDirs": [str(image.clients / "cli-plugins")]}
        (directory / "config.json").write_text(json.dumps(config))
        self.env: dict[str, str] = {
            **machine.env,
            "DOCKER_HOST": self.url,
            "DOCKER_CONFIG": str(directory),
            "BUILDKIT_PROGRESS": "plain",
        }
        for name in [name for name in self.env if name.startswith(("COMPOSE_", "TESTCONTAINERS_"))]:
            del self.env[name]
        exported = image.clients / "docker"
        self.program = str(exported) if exported.exists() else "docker"
        if exported.exists():
            self.env["PATH"] = f"{image.clients}{os.pathsep}{self.env['PATH']}"

    @property
    def socket(self) -> str:
        """The path of the endpoint's socket."""
        return self.url.removeprefix("unix://")

    def docker(
        self,
        *arguments: str | Path,
        check: bool = True,
        timeout: float = CALL_TIMEOUT_S,
        input: bytes | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the docker CLI to its end."""
        return run(
            [self.program, *map(str, arguments)],
            env={**self.env, **(env or {})},
            check=check,
            timeout=timeout,
            input=input,
        )

    def said(self, *arguments: str | Path, input: bytes | None = None) -> str:
        """Run the docker CLI and return what it printed, without blanks around it."""
        return self.docker(*arguments, input=input).stdout.decode().strip()

    def run(
        self, argv: list[str | Path], *, timeout: float = CALL_TIMEOUT_S, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run another client to its end; a failure shows what it printed."""
        return run(
            [str(each) for each in argv],
            env={**self.env, **env},
            check=True,
            timeout=timeout,
            input=None,
        )

    @contextlib.contextmanager
    def started(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Iterator[Live]:
        """Start the docker CLI and leave it running; it is killed at the end if need be."""
        process = subprocess.Popen(
            [self.program, *map(str, arguments)],
            env={**self.env, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        live = Live(process)
        try:
            yield live
        finally:
            live.end()

    def engine_time(self) -> str:
        """The engine's clock, for ``--since``: the guest's may differ from the host's."""
        return self.said("info", "--format", "{{.SystemTime}}")

    def engine_time_s(self) -> int:
        """The same in whole seconds since the epoch."""
        return int(datetime.fromisoformat(self.engine_time()[:19] + "Z").timestamp())

    def guest(self, *arguments: str, check: bool = True) -> str:
        """Run a command in the guest and return what it printed."""
        done = self.machine.wherry("shell", "--", *arguments, check=check, timeout=60)
        return done.stdout.decode()

    def engine_connections(self) -> int:
        """How many connections the engine in the guest has on its socket.

        Those whose other side is closed do not count: the engine may notice that late, as
        with an attach that has no input.
        """
        listed = self.guest("ss", "-Hx", "state", "connected", "src", "*docker.sock")
        return sum(line.split()[-1] != "0" for line in listed.splitlines())

    def steady_engine_connections(self) -> int:
        """The same when those that are being opened or closed are so: at three looks in a row."""
        looks: list[int] = []

        def steady() -> bool:
            looks.append(self.engine_connections())
            return len(looks) > 2 and len({*looks[-3:]}) == 1

        wait_until(steady, 60, "the engine's connections stay the same")
        return looks[-1]


class Live:
    """A program that runs, its output read line by line as it comes.

    :param process: with pipes; owned from now on.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=[process.stdout], daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.lines.append(line.decode(errors="replace").rstrip("\n"))

    def expect(self, text: str, timeout_s: float = 60) -> str:
        """Wait until a line contains the text, and return the line."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        def done() -> bool:
            if not found() and self.process.poll() is not None:
                self._reader.join(5)
                assert found(), f"it ended without {text!r}: {self.lines}"
            return bool(found())

        try:
            wait_until(done, timeout_s, f"the line {text!r}")
        except pytest.fail.Exception as error:
            raise AssertionError(f"{error}: {self.lines}") from None
        return found()[0]

    def interrupt(self, timeout_s: float = 30) -> int:
        """Press Ctrl-C, and return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for the end of the program and of its output, and return the exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        assert not self._reader.is_alive()
        return status

    def end(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def write_tree(directory: Path, files: dict[str, str]) -> Path:
    """Write files by their relative names, and return the directory."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def wait_for(condition: Any, what: str, timeout_s: float = 60) -> None:
    """Wait for something that each look at costs a command: half a second between two."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.5)
