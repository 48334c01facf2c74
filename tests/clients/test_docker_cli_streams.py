"""The docker CLI's long answers: they come as they are made, and end when the client ends."""

from __future__ import annotations

import hashlib
import json
import signal
import socket

import pytest
from docker_clients import Clients, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

REGISTRY = r"""
read -r method target version || exit
while read -r header && [ ${#header} -gt 1 ]; do :; done
answer() { printf 'HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n' "$@"
    printf 'Connection: close\r\n\r\n'; }
case "$method $target" in
    "GET /v2/") answer text/plain 0 ;;
    "HEAD "*/manifests/*) answer "$KIND" ${#MANIFEST} ;;
    "GET "*/manifests/*) answer "$KIND" ${#MANIFEST}; printf %s "$MANIFEST" ;;
    "GET "*/blobs/*aaaa) answer application/octet-stream 1073741824
        trap '' PIPE; echo layer asked >>/log
        while echo drop 2>/dev/null; do sleep 0.1; done; echo hung up >>/log ;;
    "GET "*/blobs/*) answer application/octet-stream ${#CONFIG}; printf %s "$CONFIG" ;;
esac
"""
"""A connection to it; what is not a plain request, such as TLS, is hung up on."""

CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

DOCKERD = "/usr/lib/wherry/services/dockerd"


def test_logs_come_as_they_are_written_and_end_with_the_container(clients: Clients) -> None:
    script = "echo first; until [ -e /go ]; do sleep 0.1; done; echo second; echo third >&2"
    clients.docker("run", "-d", "--name", "writer", "busybox", "sh", "-c", script)
    with clients.started("logs", "-f", "writer") as logs:
        logs.expect("first")
        clients.docker("exec", "writer", "touch", "/go")
        assert logs.wait() == 0
        assert sorted(logs.lines) == ["first", "second", "third"]
    assert clients.said("logs", "--tail", "2", "--since", "1h", "writer").startswith("second")


def test_events_come_as_they_happen(clients: Clients) -> None:
    since = clients.engine_time()
    with clients.started(
        "events", "--since", since, "--filter", "container=seen", "--format", "{{.Action}}"
    ) as events:
        clients.docker("run", "-d", "--name", "seen", "busybox", "sleep", "1000")
        events.expect("start")
        assert "die" not in events.lines
        clients.docker("rm", "-f", "seen")
        events.expect("destroy")
        assert [line for line in events.lines if line in ("create", "start", "die", "destroy")] == [
            "create", "start", "die", "destroy",
        ]  # fmt: skip
        assert events.process.poll() is None


def test_stats_once_and_streamed(clients: Clients) -> None:
    clients.docker("run", "-d", "--name", "busy", "busybox", "sleep", "1000")
    once = clients.said("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}")
    assert once.startswith("busy ")
    assert "iB / " in once
    with clients.started("stats", "--format", "{{.Name}} {{.PIDs}}", "busy") as stats:
        wait_for(lambda: sum("busy 1" in line for line in stats.lines) >= 3, "more samples")


@pytest.mark.parametrize("command", ["events", "logs", "attach", "stats"])
def test_a_client_that_leaves_closes_its_stream_in_the_engine(
    clients: Clients, command: str
) -> None:
    """By Ctrl-C, or killed where the CLI does not heed Ctrl-C without a terminal."""
    arguments, leaves_by = {
        "events": (["events"], signal.SIGINT),
        "logs": (["logs", "-f", "quiet"], signal.SIGINT),
        "attach": (["attach", "--no-stdin", "quiet"], signal.SIGKILL),
        "stats": (["stats", "quiet"], signal.SIGKILL),
    }[command]
    clients.docker(
        "run", "-d", "--name", "quiet", "busybox", "sh", "-c", "echo ready; sleep 100000"
    )
    with socket.socket(socket.AF_UNIX) as idle:
        # It gets the stream that is held ready; another is made after the next answer, and both
        # count as long as they live, which is longer than this waits.
        idle.connect(clients.socket)
        # Those of the command before are closing.
        before = clients.steady_engine_connections()
        with clients.started(*arguments) as live:
            wait_for(lambda: clients.engine_connections() > before, "the stream is open")
            opened = clients.steady_engine_connections()
            live.process.send_signal(leaves_by)
            live.wait(30)
            wait_for(lambda: clients.engine_connections() < opened, "the stream is closed", 20)
    assert clients.said("inspect", "-f", "{{.State.Running}}", "quiet") == "true"


def test_ctrl_c_cancels_a_pull_in_the_engine(clients: Clients) -> None:
    """The engine hangs up on the registry, which here is one that sends the layer in drops.

    Of one that sends nothing at all it notices later, with or without wherry between.
    """
    layer = "sha256:" + "a" * 64
    config = json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer]}})
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    digest = "sha256:" + hashlib.sha256(config.encode()).hexdigest()
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": {"mediaType": CONFIG, "size": len(config), "digest": digest},
        "layers": [{"mediaType": LAYER, "size": 1 << 30, "digest": layer}],
    }
    env = {"SERVE": REGISTRY, "KIND": kind, "MANIFEST": json.dumps(manifest), "CONFIG": config}
    clients.docker(
        "run", "-d", "--name", "registry", "-p", "127.0.0.1:5999:80",
        *(f"--env={name}={value}" for name, value in env.items()),
        "busybox", "sh", "-c",
        'touch /log; nc -ll -p 80 -e sh -c "$SERVE" & exec tail -f /log',
    )  # fmt: skip
    serving = "until wget -qO- http://127.0.0.1/v2/; do sleep 0.1; done"
    clients.docker("exec", "registry", "sh", "-c", serving)
    with (
        clients.started("logs", "-f", "registry") as registry,
        clients.started("pull", "127.0.0.1:5999/nothing") as pull,
    ):
        registry.expect("layer asked")
        assert "hung up" not in registry.lines
        assert pull.interrupt() != 0
        registry.expect("hung up", 20)


def test_an_engine_that_restarts_ends_its_clients_and_takes_new_ones(clients: Clients) -> None:
    """Nobody hangs: open streams end with an error, and the next request that works, works."""
    since = clients.engine_time()
    script = "echo begun; exec sleep 100000"
    clients.docker("run", "-d", "--name", "victim", "busybox", "sh", "-c", script)
    with (
        clients.started("events", "--since", since) as events,
        clients.started("logs", "-f", "victim") as logs,
        clients.started("exec", "victim", "sleep", "1000") as exec_,
    ):
        wait_for(
            lambda: "sleep 1000" in clients.guest("pgrep", "-ax", "sleep", check=False),
            "the exec runs",
        )
        events.expect("container start")
        logs.expect("begun")
        clients.guest("s6-svc", "-r", DOCKERD)
        assert events.wait() != 0
        logs.wait()
        assert exec_.wait() != 0

    # The next request waits for the engine and is answered; a refused one may be repeated.
    wait_for(
        lambda: clients.docker("version", check=False, timeout=200).returncode == 0,
        "the engine answers again",
        200,
    )
    assert clients.said("inspect", "-f", "{{.State.Running}}", "victim") == "false"
