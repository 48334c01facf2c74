"""Containers and builds of the architecture that the guest does not have."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from docker_clients import Clients
from downloads import FOREIGN, foreign_busybox

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}

DOCKERFILE = """
FROM scratch
ARG TARGETARCH
COPY $TARGETARCH /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox uname -m >/machine"]
"""


@pytest.fixture
def context(clients: Clients, tmp_path: Path) -> Path:
    """A context with a busybox for each architecture."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("a foreign busybox comes from Debian by mmdebstrap")
    (native,) = MACHINES.keys() - {FOREIGN}
    shutil.copy(foreign_busybox(), tmp_path / FOREIGN)
    (tmp_path / native).write_bytes(
        clients.machine.wherry("shell", "--", "cat", "/usr/bin/busybox").stdout
    )
    for name in MACHINES:
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    return tmp_path


def test_a_foreign_image_is_built_and_run(clients: Clients, context: Path) -> None:
    platform = f"--platform=linux/{FOREIGN}"
    clients.docker("buildx", "build", platform, "-t", "foreign", "--load", context)
    said = clients.said("run", "--rm", platform, "foreign", "/bin/busybox", "uname", "-m")
    assert said == MACHINES[FOREIGN]
    # The build's own step ran there too, and the emulator is not in the container.
    said = clients.said("run", "--rm", "foreign", "/bin/busybox", "sh", "-c", "cat /machine; ls /")
    assert said.split() == [MACHINES[FOREIGN], "bin", "dev", "etc", "machine", "proc", "sys"]
    clients.docker("rmi", "foreign")


@pytest.mark.endurance
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("containerd_store")
def test_one_build_for_both_platforms(clients: Clients, context: Path, tmp_path: Path) -> None:
    both = "--platform=linux/amd64,linux/arm64"
    results = tmp_path / "results"
    clients.docker("buildx", "build", both, "-o", f"type=local,dest={results}", context)
    for name, machine in MACHINES.items():
        assert (results / f"linux_{name}" / "machine").read_text().strip() == machine
    archive = tmp_path / "image.tar"
    clients.docker("buildx", "build", both, "-o", f"type=oci,dest={archive}", context)
    with tarfile.open(archive) as image:
        index = json.load(image.extractfile("index.json"))  # type: ignore[arg-type]
        blob = index["manifests"][0]["digest"].replace(":", "/")
        manifests = json.load(image.extractfile(f"blobs/{blob}"))["manifests"]  # type: ignore[arg-type]
    found = {each["platform"]["architecture"] for each in manifests}
    assert MACHINES.keys() <= found
