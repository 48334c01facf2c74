"""npm's ``dockerode``, which most Node programs use the Docker API with."""

from __future__ import annotations

from pathlib import Path

import pytest
from docker_clients import Clients, write_tree
from downloads import NODE_CLIENTS

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "program", ["exec", "attach", "tty", "build", "events", "logs_and_archives"]
)
def test_dockerode(clients: Clients, node: dict[str, str], tmp_path: Path, program: str) -> None:
    """Each is a program of ``dockerode.cjs``, which says what it does."""
    write_tree(
        tmp_path,
        {"Dockerfile": "FROM busybox\nRUN echo was-run\n", "go": "content of go\n"},
    )
    done = clients.run([node["NODE"], NODE_CLIENTS / "dockerode.cjs", program, tmp_path], **node)
    assert done.stdout == b"passed\n"
