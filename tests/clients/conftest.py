"""Fixtures of the tests with real clients; nothing in them is mocked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_clients import Clients, wait_for
from downloads import PROGRAMS, debian_root, node_modules
from sandbox import Sandbox

from wherry.vm.image import Image


@pytest.fixture(scope="session")
def all_clients(
    machine: Sandbox, guest_image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Clients:
    """The clients of the run."""
    return Clients(machine, guest_image, tmp_path_factory.mktemp("docker-config"))


@pytest.fixture
def clients(all_clients: Clients) -> Iterator[Clients]:
    """The clients, and no container left behind by the test."""
    yield all_clients

    def none_left() -> bool:
        left = all_clients.said("ps", "-aq").split()
        # One that is being removed already cannot be removed, and is gone soon.
        return not left or not all_clients.docker("rm", "-fv", *left, check=False).returncode

    wait_for(none_left, "the test's containers are gone")


@pytest.fixture(scope="session")
def debian(all_clients: Clients) -> str:
    """An image with a small Debian: glibc, bash, ssh, a registry."""
    if shutil.which("mmdebstrap") is None and sys.platform != "linux":
        pytest.skip("a Debian root can only be made on Debian")
    with debian_root().open("rb") as root:
        all_clients.docker("import", "-", "debian:test", input=root.read(), timeout=300)
    return "debian:test"


@pytest.fixture(scope="session")
def node(all_clients: Clients) -> dict[str, str]:
    """What to add to the environment so that Node and the Node clients are found."""
    modules = node_modules()
    path = os.pathsep.join([str(PROGRAMS), all_clients.env["PATH"]])
    return {"NODE": str(PROGRAMS / "node"), "NODE_PATH": str(modules), "PATH": path}


@pytest.fixture
def containerd_store(clients: Clients) -> Iterator[None]:
    """The engine with containerd's image store, for builds that dockerd's own cannot make."""

    def use(store: str, *change: str) -> None:
        clients.machine.wherry("config", *change)
        assert clients.said("info", "-f", "{{.Driver}}") == store

    key = "engine.features.containerd-snapshotter"
    try:
        use("overlayfs", "set", key, "true")
        yield
    finally:
        use("overlay2", "unset", key)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A real ssh-agent with one key: its socket, and the key's fingerprint."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    printed = subprocess.check_output(["ssh-keygen", "-lf", key], text=True)
    socket = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        wait_for(socket.exists, "the agent's socket", 10)
        env = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
        subprocess.run(["ssh-add", "-q", key], env=env, check=True)
        yield str(socket), printed.split()[1]
    finally:
        process.terminate()
        process.wait(10)
