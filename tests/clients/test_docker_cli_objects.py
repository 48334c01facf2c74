"""The docker CLI with images, volumes, networks and what they take on the disk."""

from __future__ import annotations

import io
import json
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest
from docker_clients import Clients, wait_for

REGISTRY = """\
version: 0.1
http: {addr: ":5000"}
storage: {filesystem: {rootdirectory: /srv}}
"""

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def manifest(saved: bytes) -> Any:
    """The first image in the archive that ``docker save`` made."""
    with tarfile.open(fileobj=io.BytesIO(saved)) as tar:
        member = tar.extractfile("manifest.json")
        assert member is not None
        return json.load(member)[0]


def test_an_image_is_saved_and_loaded(clients: Clients, tmp_path: Path) -> None:
    clients.docker("tag", "busybox", "saved:1")
    archive = tmp_path / "saved.tar"
    clients.docker("save", "-o", archive, "saved:1")
    assert manifest(archive.read_bytes())["RepoTags"] == ["saved:1"]
    assert manifest(clients.docker("save", "saved:1").stdout)["RepoTags"] == ["saved:1"]
    clients.docker("rmi", "saved:1")
    assert clients.said("load", "-i", archive) == "Loaded image: saved:1"
    assert clients.said("run", "--rm", "saved:1", "echo", "ran") == "ran"
    clients.docker("rmi", "saved:1")


def test_a_container_is_exported_imported_and_committed(clients: Clients) -> None:
    clients.docker(
        "run", "--name", "source", "busybox", "sh", "-c", "echo data >/data; rm -rf /home"
    )
    exported = clients.docker("export", "source").stdout
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        assert "data" in tar.getnames()
    clients.docker("import", "-c", "CMD cat /data", "-", "flat:1", input=exported)
    assert clients.said("run", "--rm", "flat:1") == "data"

    clients.docker("commit", "-m", "with data", "-c", "ENV MADE=here", "source", "committed:1")
    assert clients.said("run", "--rm", "committed:1", "sh", "-c", "cat /data; echo $MADE") == (
        "data\nhere"
    )
    assert clients.said("history", "--format", "{{.Comment}}", "committed:1").startswith(
        "with data"
    )
    clients.docker("rmi", "flat:1", "committed:1")


def test_a_volume_outlives_its_containers(clients: Clients) -> None:
    clients.docker("volume", "create", "--label", "of=test", "kept-data")
    clients.docker("run", "--rm", "-v", "kept-data:/v", "busybox", "sh", "-c", "echo one >/v/f")
    assert clients.said("run", "--rm", "-v", "kept-data:/v:ro", "busybox", "cat", "/v/f") == "one"
    assert clients.said("volume", "ls", "-q", "--filter", "label=of=test") == "kept-data"
    clients.docker("volume", "rm", "kept-data")
    assert clients.docker("volume", "inspect", "kept-data", check=False).returncode == 1


def test_containers_of_a_network_find_each_other_by_name(clients: Clients) -> None:
    clients.docker("network", "create", "lane")
    clients.docker(
        "run", "-d", "--name", "server", "--network", "lane", "--network-alias", "alias",
        "busybox", "sh", "-c", "echo served >/index.html; exec httpd -f -h /",
    )  # fmt: skip
    script = "until wget -qO- http://server; do sleep 0.2; done; wget -qO- http://alias"
    said = clients.said("run", "--rm", "--network", "lane", "busybox", "sh", "-c", script)
    assert said == "served\nserved"
    clients.docker("network", "disconnect", "lane", "server")
    clients.docker("network", "rm", "lane")


def test_what_is_unused_is_counted_and_pruned(clients: Clients) -> None:
    clients.docker("run", "--name", "done", "-v", "/anonymous", "busybox", "true")
    clients.docker("network", "create", "unused")
    usage = clients.said("system", "df", "--format", "{{.Type}} {{.TotalCount}}")
    assert "Containers 1" in usage
    assert clients.docker("system", "df", "-v").stdout
    pruned = clients.said("system", "prune", "-f", "--volumes")
    assert "Deleted Containers:" in pruned
    networks = pruned.partition("Deleted Networks:\n")[2].partition("\n\n")[0]
    assert "unused" in networks.splitlines()
    assert "Deleted Volumes:" in pruned
    assert clients.said("ps", "-aq") == ""
    assert clients.said("image", "inspect", "-f", "{{.RepoTags}}", "busybox")
    for kind in ("container", "image", "volume", "network", "builder"):
        clients.docker(kind, "prune", "-f")


def test_an_image_is_pushed_and_pulled(clients: Clients, debian: str) -> None:
    """The registry runs in a container: the engine trusts its own loopback without TLS."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clients.docker(
        "run", "-d", "--name", "registry", "-p", f"{port}:5000", debian,
        "sh", "-c", f"echo '{REGISTRY}' >/r.yml; exec docker-registry serve /r.yml",
    )  # fmt: skip
    name = f"127.0.0.1:{port}/team/tool:1"
    clients.docker("tag", "busybox", name)
    wait_for(
        lambda: clients.docker("push", "-q", name, check=False).returncode == 0, "the push works"
    )
    clients.docker("rmi", name)
    pulled = clients.said("pull", name)
    assert f"Status: Downloaded newer image for {name}" in pulled
    assert clients.said("run", "--rm", "--pull", "always", "-q", name, "echo", "ran") == "ran"
    clients.docker("rmi", name)


def test_the_engine_introduces_itself(clients: Clients) -> None:
    """``docker version`` and ``docker info`` tell the engine's own facts."""
    version = json.loads(clients.said("version", "--format", "{{json .}}"))
    assert version["Server"]["Os"] == "linux"
    assert version["Client"]["ApiVersion"] == version["Server"]["ApiVersion"]
    info = json.loads(clients.said("info", "--format", "{{json .}}"))
    assert not info.get("ServerErrors")
    assert info["NCPU"] == clients.machine.status()["cpus"]
