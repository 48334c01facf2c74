"""A computer with a fake QEMU for the tests of a machine's life."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from fake_host import FakeHost
from fake_qemu import unshare


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip, and say why, where the fake guest cannot run."""
    for program in ("/usr/sbin/sshd", "unshare", "qemu-img"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    done = subprocess.run([*unshare(), "true"], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"needs namespaces of its own: {done.stderr.decode().strip()}")


@pytest.fixture
def host(namespaces: None) -> Iterator[FakeHost]:
    made = FakeHost()
    yield made
    made.close()
