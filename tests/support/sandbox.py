"""A home of the tests' own, with the command line and the docker CLI run as a user would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from wherry.config.layout import Layout
from wherry.platform import current

START_TIMEOUT_S = 400
"""A start in emulation on a busy computer; the service's own bounds are shorter."""


class Sandbox:
    """A WHERRY_HOME and a DOCKER_CONFIG of the tests' own; images are the user's, by link.

    :param trusted: the authorities that this computer trusts, as PEM.
    """

    def __init__(self, directory: Path, trusted: bytes = b"") -> None:
        self.home = directory / "home"
        self.docker_config = directory / "docker"
        self.home.mkdir()
        self.docker_config.mkdir()
        (directory / "trusted.pem").write_bytes(trusted)
        (directory / "no-certificates").mkdir()
        (self.home / "images").symlink_to(Layout.current(current()).images)
        self.env: dict[str, str] = {
            **os.environ,
            "WHERRY_HOME": str(self.home),
            "DOCKER_CONFIG": str(self.docker_config),
            "WHERRY_DEFAULT_SOCKET": str(directory / "default.sock"),
            "SSL_CERT_FILE": str(directory / "trusted.pem"),
            "SSL_CERT_DIR": str(directory / "no-certificates"),
        }
        for name in [*self.env]:
            # What the user has set for other programs is no part of a test.
            if name in ("DOCKER_HOST", "DOCKER_CONTEXT") or name.lower().endswith("_proxy"):
                del self.env[name]

    def wherry(
        self,
        *arguments: str,
        check: bool = True,
        timeout: float = START_TIMEOUT_S,
        input: bytes | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the command line as a user would."""
        return run(
            [sys.executable, "-m", "wherry", *arguments],
            env=self.env,
            check=check,
            timeout=timeout,
            input=input,
        )

    def status(self, name: str = "default") -> dict[str, Any]:
        """Return ``wherry status --json``."""
        fields: dict[str, Any] = json.loads(self.wherry("status", name, "--json").stdout)
        return fields

    def docker(
        self,
        *arguments: str,
        name: str = "wherry",
        check: bool = True,
        timeout: float = 300,
        input: bytes | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the docker CLI on a machine's context."""
        return run(
            ["docker", "--context", name, *arguments],
            env=self.env,
            check=check,
            timeout=timeout,
            input=input,
        )

    def add_busybox(self) -> None:
        """Make the image ``busybox`` of the guest's own, which is static."""
        busybox = self.wherry("shell", "--", "cat", "/usr/bin/busybox").stdout
        context = self.home / "busybox-image"
        context.mkdir()
        (context / "busybox").write_bytes(busybox)
        (context / "busybox").chmod(0o755)
        (context / "Dockerfile").write_text(
            "FROM scratch\nCOPY busybox /bin/busybox\n"
            'RUN ["/bin/busybox", "--install", "-s", "/bin"]\nCMD ["sh"]\n'
        )
        self.docker("build", "-q", "-t", "busybox", str(context))
        shutil.rmtree(context)

    def cut_connection(self) -> None:
        """Cut the service's connection to the guest, and wait until it has noticed."""

        def losses() -> int:
            return self.wherry("logs").stdout.count(b" tunnel lost: ")

        before = losses()
        # Its own connection ends too, and with that the command that it waits for.
        self.wherry("shell", "--", "pkill", "-f", "sshd-session", check=False)
        wait_until(lambda: losses() > before, 60, "the connection is lost")

    def stop_all(self) -> None:
        """Leave nothing running, whatever the tests did."""
        for name in Layout(self.home, current()).machine_names():
            self.wherry("stop", name, "--force", check=False)


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    check: bool,
    timeout: float,
    input: bytes | None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program; a failure shows what it printed."""
    done = subprocess.run(argv, env=env, capture_output=True, timeout=timeout, input=input)
    if check and done.returncode != 0:
        pytest.fail(f"{argv} ended with {done.returncode}:\n{done.stdout!r}\n{done.stderr!r}")
    return done


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)
