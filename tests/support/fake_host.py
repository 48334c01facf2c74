"""A computer for the command line: a home, a PATH with a fake QEMU, and what runs on it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_image import write_image

from wherry.config.layout import Layout, MachinePaths
from wherry.control.client import call
from wherry.core.errors import NotRunning
from wherry.platform import current
from wherry.service.machine import create

TIMEOUT_S = 45.0
"""Shorter than what a test may take, so that its failure tells more."""
SUPPORT = Path(__file__).parent

MACHINES = {"default", "other"}


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The one line that a failure prints."""
        assert self.stdout == ""
        (line,) = self.stderr.splitlines()
        assert line.startswith("wherry: ")
        return line.removeprefix("wherry: ")


class FakeHost:
    """A ``WHERRY_HOME`` with an image, and a QEMU that behaves as the test says."""

    def __init__(self, *, home: Path | None = None) -> None:
        # Not below pytest's directory, whose length would move the sockets elsewhere.
        self.directory = Path(tempfile.mkdtemp(prefix="wherry-test-"))
        self.home = home or self.directory / "home"
        self.bin = self.directory / "bin"
        self.bin.mkdir()
        self.default_socket = self.directory / "default.sock"
        for variable in ("DOCKER_HOST", "DOCKER_CONTEXT"):
            os.environ.pop(variable, None)
        self.env = {
            **os.environ,
            "WHERRY_HOME": str(self.home),
            "DOCKER_CONFIG": str(self.directory / "docker"),
            "WHERRY_DEFAULT_SOCKET": str(self.default_socket),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            # It trusts nobody, so there is nothing to give to the guest.
            "SSL_CERT_FILE": os.devnull,
            "SSL_CERT_DIR": str(self.directory / "no-certificates"),
            "PYTHONFAULTHANDLER": "1",  # see finish()
        }
        self.layout = Layout(self.home, current())
        self.architecture = current().architecture()
        self.layout.prepare()
        self.image = write_image(
            self.layout.images / f"1-{self.architecture}", "1", self.architecture
        )
        self.qemu = self.bin / f"qemu-system-{self.architecture}"
        self.qemu.write_text(
            f"#!{sys.executable} -IS\n"
            f"import sys\n__file__ = {str(SUPPORT / 'fake_qemu.py')!r}\n"
            "exec(compile(open(__file__).read(), __file__, 'exec'))\n"
        )
        self.qemu.chmod(0o755)
        self.behave()

    def behave(self, **behaviour: Any) -> None:
        """Say what goes wrong with a QEMU from now on; nothing by default."""
        (self.bin / "behaviour.json").write_text(json.dumps(behaviour))

    @property
    def paths(self) -> MachinePaths:
        """The files of the default machine."""
        return self.layout.machine("default")

    def make(self, **settings: Any) -> None:
        """Make the default machine without starting it."""
        path, os.environ["PATH"] = os.environ["PATH"], self.env["PATH"]
        try:
            create(self.layout, "default", settings)
        finally:
            os.environ["PATH"] = path

    def run(self, *arguments: str, timeout: float = TIMEOUT_S, **env: str) -> Done:
        """Run the command line to its end."""
        with self.spawn(*arguments, **env) as command:
            return self.finish(command, timeout)

    def spawn(self, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        """Start the command line in a process group of its own, as a shell does."""
        return subprocess.Popen(
            [sys.executable, "-m", "wherry", *arguments],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )

    def finish(self, command: subprocess.Popen[bytes], timeout: float = TIMEOUT_S) -> Done:
        """Wait for a command and return what it said; one that hangs shows where all is."""
        try:
            stdout, stderr = command.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for process in self.processes():
                if "python" in process.name():
                    process.send_signal(signal.SIGABRT)
            stdout, stderr = command.communicate(timeout=10)
            pytest.fail(f"{command.args} hangs:\n{stderr.decode()}\n{self.service_log()}")
        return Done(command.returncode, stdout.decode(), stderr.decode())

    def good(self, *arguments: str, **options: Any) -> str:
        """Run a command that must not fail and return its output."""
        done = self.run(*arguments, **options)
        assert done.status == 0, done.stderr + self.service_log()
        return done.stdout

    def status(self, name: str = "default") -> dict[str, Any]:
        """Return ``wherry status --json``."""
        fields: dict[str, Any] = json.loads(self.good("status", name, "--json"))
        return fields

    def service_log(self) -> str:
        """Return what the service logged."""
        with contextlib.suppress(OSError):
            return self.paths.service_log.read_text()
        return ""

    def serve(self, *hangs: str, **bounds: float) -> subprocess.Popen[bytes]:
        """Run the default machine's service with other bounds for its stages.

        It listens when this returns: a command that finds none starts one of its own.

        :param hangs: stages whose work is never done.
        """
        service = subprocess.Popen(
            [sys.executable, SUPPORT / "quick_service.py", "default", json.dumps(bounds), *hangs],
            env=self.env,
            start_new_session=True,
        )
        wait_until(self._is_served, 20, "the service listens")
        return service

    def _is_served(self) -> bool:
        try:
            call(current(), self.paths.control_socket, "hello", timeout_s=TIMEOUT_S)
        except NotRunning:
            return False
        return True

    def ssh(self) -> Callable[..., subprocess.CompletedProcess[bytes]]:
        """Return what runs a command in the guest, also when no service does."""
        config = self.directory / "ssh_config"
        config.write_text(self.good("ssh-config"))

        def run(*words: str) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(
                ["ssh", "-F", config, "wherry-default", *words], capture_output=True, timeout=30
            )

        return run

    def calls(self) -> list[list[str]]:
        """Return the arguments of each call of QEMU."""
        path = self.bin / "calls.jsonl"
        if not path.exists():
            return []
        return [json.loads(line)["argv"] for line in path.read_text().splitlines()]

    def launches(self) -> int:
        """Return how often a virtual machine was started."""
        return sum("-qmp" in argv for argv in self.calls())

    def processes(self) -> list[psutil.Process]:
        """Return all that runs for this home, other than ourselves."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get("WHERRY_HOME") == str(self.home)
                    and process.pid != os.getpid()
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def sockets(self) -> list[str]:
        """Return the sockets that are left in the machine's places."""
        found = [path for path in (self.home / "machines").rglob("*") if path.is_socket()]
        deep = (self.layout.machine(name) for name in ("default", "other"))
        for paths in deep:
            for path in (paths.docker_socket, paths.control_socket, paths.qmp_socket):
                if path.is_socket() and path not in found:
                    found.append(path)
        return [str(path) for path in found]

    def contexts(self) -> set[str]:
        """Return where the docker CLI's contexts lead."""
        found = (self.directory / "docker/contexts/meta").glob("*/meta.json")
        return {json.loads(each.read_text())["Endpoints"]["docker"]["Host"] for each in found}

    def at_rest(self) -> None:
        """Assert that nothing runs and nothing is left half-made."""
        wait_until(lambda: not self.processes(), 5, f"still there: {self.processes()}")
        assert self.sockets() == []
        names = {path.name for path in (self.home / "machines").iterdir()}
        assert names <= MACHINES | {f".{name}.lock" for name in MACHINES}
        for path in (self.home / "machines").glob("*/"):
            if not path.name.startswith("."):
                assert {"config.toml", "data.qcow2", "keys"} <= {
                    each.name for each in path.iterdir()
                }
                assert not [each for each in path.iterdir() if each.name.startswith(".")]
        machines = {
            f"unix://{self.layout.machine(each).docker_socket}" for each in MACHINES & names
        }
        assert self.contexts() <= machines

    def close(self) -> None:
        """Kill what still runs, and remove the directories."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
                process.kill()
        wait_until(lambda: not self.processes(), 10, "processes that cannot be killed")
        for socket in self.sockets():
            Path(socket).unlink()
        shutil.rmtree(self.directory, ignore_errors=True)


def kill(pid: int) -> None:
    """Kill without a word, and wait until all of it is gone."""

    def is_gone() -> bool:
        try:
            # With its last thread it lets go of its files and their locks.
            return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        except psutil.NoSuchProcess:
            return True

    process = psutil.Process(pid)
    process.kill()
    wait_until(is_gone, 10, f"{pid} ends")


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[Path]:
    """Mount a file system, which takes root."""
    if os.getuid() != 0:
        pytest.skip("needs root, to mount a file system")
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def mount_arguments(size: str) -> Sequence[str]:
    """Return the arguments for a small file system in memory."""
    return ("-t", "tmpfs", "-o", f"size={size}", "none")
