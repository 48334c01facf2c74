"""A computer with a fake QEMU for the tests of a machine's life."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from fake_host import FakeHost


def missing() -> str:
    """Return what the fake guest needs and this computer has not."""
    if not hasattr(os, "getuid") or os.getuid() != 0:
        return "root, for namespaces of the fake guest's own"
    for program in ("/usr/sbin/sshd", "unshare", "qemu-img"):
        if shutil.which(program) is None:
            return program
    return ""


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip, and say why, where the fake guest cannot run."""
    if needed := missing():
        pytest.skip(f"needs {needed}")
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip(f"needs unshare: {done.stderr.decode().strip()}")


@pytest.fixture
def host(namespaces: None) -> Iterator[FakeHost]:
    made = FakeHost()
    yield made
    made.close()
