"""``@devcontainers/cli``, which is what an IDE does to open a project in a container.

The workspace is the host's directory, mounted as the client mounts it by default. Features are
left out: they make the client build with a
``# syntax=`` line, for which BuildKit pulls a frontend from Docker Hub.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from docker_clients import Clients, write_tree

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def test_up_and_exec(clients: Clients, node: dict[str, str], debian: str, tmp_path: Path) -> None:
    """The container is built and started, its commands run in it, and a second up finds it."""
    configuration = {
        "name": "small",
        "build": {"dockerfile": "Dockerfile"},
        "remoteUser": "dev",
        "containerEnv": {"FROM_CONTAINER": "one"},
        "remoteEnv": {"FROM_REMOTE": "${containerEnv:FROM_CONTAINER}-two"},
        "postCreateCommand": "echo made by $(id -un) >created",
    }
    workspace = write_tree(
        tmp_path / "small",
        {
            ".devcontainer/devcontainer.json": json.dumps(configuration),
            ".devcontainer/Dockerfile": f"FROM {debian}\nRUN useradd -m -s /bin/bash dev\n",
            "main.c": "int main;\n",
        },
    )
    devcontainer = Path(node["NODE_PATH"]) / ".bin" / "devcontainer"
    where = ["--workspace-folder", workspace]

    def run(*arguments: str | Path) -> str:
        command = [node["NODE"], devcontainer, *arguments]
        return clients.run(command, timeout=200, **node).stdout.decode()

    up = json.loads(run("up", *where).splitlines()[-1])
    assert up["outcome"] == "success"
    assert up["remoteUser"] == "dev"
    assert up["remoteWorkspaceFolder"] == "/workspaces/small"

    # What a command made in the container is on the host, and the other way round.
    assert (workspace / "created").read_text() == "made by dev\n"
    (workspace / "main.c").write_text("int changed;\n")
    script = "pwd; id -un; cat main.c; echo $FROM_REMOTE"
    said = run("exec", *where, "bash", "-c", script).splitlines()
    assert said == ["/workspaces/small", "dev", "int changed;", "one-two"]

    again = json.loads(run("up", *where).splitlines()[-1])
    assert again["containerId"] == up["containerId"]
    clients.docker("rm", "-f", up["containerId"])
