"""``docker compose`` with a build, a network, a healthcheck, a volume and a watched directory."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_clients import Clients, wait_for, write_tree
from terminal import Terminal

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

COMPOSE = """\
name: harbour
services:
  web:
    build: .
    ports: ["{port}:80"]
    networks: [front]
    volumes: ["data:/data"]
    healthcheck:
      test: ["CMD", "wget", "-qO/dev/null", "http://127.0.0.1/"]
      interval: 2s
      timeout: 20s
      retries: 30
    develop:
      watch:
        - action: sync
          path: ./www
          target: /www
        - action: rebuild
          path: ./version
  visitor:
    image: busybox
    networks: [front]
    depends_on:
      web: {{condition: service_healthy}}
    command: ["sh", "-c", "wget -qO- http://web && exec sleep 1000"]
    stop_signal: KILL
networks:
  front:
volumes:
  data:
"""

DOCKERFILE = """\
FROM busybox
COPY version /version
COPY www /www
CMD ["sh", "-c", "echo start >>/data/starts; cat /version; exec httpd -f -h /www"]
STOPSIGNAL KILL
"""


@pytest.fixture
def project(clients: Clients, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A project's directory and its published port; nothing of it is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    write_tree(
        tmp_path,
        {
            "compose.yaml": COMPOSE.format(port=port),
            "Dockerfile": DOCKERFILE,
            "version": "version-1\n",
            "www/index.html": "first\n",
        },
    )
    yield tmp_path, port
    clients.docker(
        "compose", "--project-directory", tmp_path, "down", "-v", "--rmi", "local", check=False
    )


def page(port: int, wanted: str, timeout_s: float = 60) -> None:
    """Wait until the published port serves the page."""
    end = time.monotonic() + timeout_s
    said = ""
    while said != wanted:
        assert time.monotonic() < end, f"the page is {said!r}, not {wanted!r}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                said = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            # The file may become another one while it is served.
            said = repr(error)
            time.sleep(0.2)


def test_up_watch_and_down(clients: Clients, project: tuple[Path, int]) -> None:
    """What a day with Compose is made of."""
    directory, port = project
    compose = ["compose", "--project-directory", directory]
    clients.docker(*compose, "up", "-d", "--wait", timeout=200)
    page(port, "first\n")
    assert clients.said(*compose, "ps", "--format", "{{.Service}} {{.Health}}", "web") == (
        "web healthy"
    )
    # That it runs does not mean that it has asked.
    logs = (*compose, "logs", "--no-log-prefix", "visitor")
    wait_for(lambda: "first" in clients.said(*logs), "the visitor sees the page")
    assert clients.said(*compose, "exec", "-T", "web", "cat", "/data/starts") == "start"

    with clients.started(*compose, "watch", "--no-up") as watch:
        watch.expect("Watch enabled")
        (directory / "www" / "index.html").write_text("second\n")
        page(port, "second\n")
        (directory / "version").write_text("version-2\n")
        logs = (*compose, "logs", "--no-log-prefix", "web")
        wait_for(
            # While the container is replaced there are no logs.
            lambda: b"version-2" in clients.docker(*logs, check=False).stdout,
            "the service is rebuilt",
            120,
        )
        watch.interrupt()
    # The new container has the old one's volume.
    assert clients.said(*compose, "exec", "-T", "web", "cat", "/data/starts") == "start\nstart"

    clients.docker(*compose, "down", "-v", "--rmi", "local")
    for kind in ("container", "network", "volume"):
        every = ["-a"] if kind == "container" else []
        label = "label=com.docker.compose.project=harbour"
        assert clients.said(kind, "ls", *every, "-q", "--filter", label) == ""


def test_up_in_a_terminal_until_ctrl_c(clients: Clients, project: tuple[Path, int]) -> None:
    """The services stop, and nothing of the command is left at the engine."""
    directory, port = project
    compose = ["compose", "--project-directory", str(directory)]
    before = clients.engine_connections()
    with Terminal([clients.program, *compose, "up"], clients.env) as terminal:
        terminal.expect("first", 200)
        page(port, "first\n")
        assert clients.said(*compose, "ps", "-q").count("\n") == 1
        terminal.type("\x03")
        # Which of them is up to Compose: 2.40 says 0 once all have stopped in good order.
        assert terminal.wait(60) in (0, 130)
    states = clients.said(*compose, "ps", "-a", "--format", "{{.Service}} {{.State}}")
    assert sorted(states.splitlines()) == ["visitor exited", "web exited"]
    wait_for(lambda: clients.engine_connections() <= before, "the connections are closed")


def test_run_takes_input_and_gives_the_status(clients: Clients, project: tuple[Path, int]) -> None:
    """``docker compose run`` as a step of a pipe."""
    compose = ["compose", "--project-directory", project[0]]
    done = clients.docker(
        *compose, "run", "--rm", "-T", "--no-deps", "visitor", "sh", "-c", "wc -c; exit 7",
        input=b"12345", check=False,
    )  # fmt: skip
    assert done.returncode == 7
    assert done.stdout.split()[-1] == b"5"
