"""What integration tests share: a computer with a fake QEMU, an endpoint, an sshd."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_proxy import MakeProxy, Proxy, proxies
from fake_host import FakeHost
from fake_qemu import unshare
from loopback_sshd import LoopbackSshd


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


@pytest.fixture
def make_proxy(tmp_path: Path) -> Iterator[MakeProxy]:
    with proxies(tmp_path) as make:
        yield make


@pytest.fixture
def proxy(make_proxy: MakeProxy) -> Proxy:
    return make_proxy()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackSshd]:
    server = LoopbackSshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()
