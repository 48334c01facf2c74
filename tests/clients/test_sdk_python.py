"""PyPI's ``docker``, the Python SDK, in the process of the test."""

from __future__ import annotations

import gc
import io
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from typing import Any

import docker
import pytest
import websocket
from docker.errors import BuildError, ContainerError, NotFound
from docker.models.containers import Container
from docker_clients import Clients

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    # The SDK leaves the connections of exec_run and of streams to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


@pytest.fixture
def sdk(clients: Clients) -> Iterator[docker.DockerClient]:
    """A client made from the environment, as programs make it."""
    made = docker.from_env(environment=clients.env, timeout=120)
    yield made
    made.close()
    # Here, where it is known whose they are, and not in another test.
    gc.collect()


@pytest.fixture
def box(sdk: docker.DockerClient) -> Container:
    """A container that runs and does nothing."""
    return sdk.containers.run("busybox", ["sleep", "100000"], detach=True, init=True)


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def read_all(raw: Any) -> bytes:
    """Read a hijacked stream to its end, without the frames of the multiplexed format."""
    data = b""
    while header := raw.recv(8, socket.MSG_WAITALL):
        data += raw.recv(int.from_bytes(header[4:], "big"), socket.MSG_WAITALL)
    return data


def test_run_returns_the_output_or_raises_with_the_status(sdk: docker.DockerClient) -> None:
    assert sdk.ping()
    assert sdk.containers.run("busybox", ["echo", "hello"], remove=True) == b"hello\n"
    with pytest.raises(ContainerError) as caught:
        sdk.containers.run("busybox", ["sh", "-c", "echo oops >&2; exit 3"], remove=True)
    assert caught.value.exit_status == 3
    assert b"oops" in caught.value.stderr
    with pytest.raises(NotFound):
        sdk.containers.get("nobody")


def test_exec_run_in_its_forms(box: Container) -> None:
    script = ["sh", "-c", "echo out; echo err >&2; exit 4"]
    assert box.exec_run(script, demux=True) == (4, (b"out\n", b"err\n"))
    assert b"".join(box.exec_run(["echo", "a", "b"], stream=True).output) == b"a b\n"


def test_exec_run_with_a_socket_is_closed_from_either_side(box: Container) -> None:
    """The SDK's socket is the connection itself, after the answer's head."""
    wrapped = box.exec_run(["sh", "-c", "cat; echo end"], stdin=True, socket=True).output
    raw = wrapped._sock
    try:
        raw.settimeout(60)
        raw.sendall(b"ping\n")
        header = raw.recv(8, socket.MSG_WAITALL)
        assert raw.recv(int.from_bytes(header[4:], "big"), socket.MSG_WAITALL) == b"ping\n"
        raw.sendall(b"last")
        raw.shutdown(socket.SHUT_WR)
        assert read_all(raw) == b"lastend\n"
    finally:
        raw.close()
        wrapped.close()


def test_attach_streams_and_takes_input(sdk: docker.DockerClient) -> None:
    made = sdk.containers.create("busybox", ["sh", "-c", "cat; echo end"], stdin_open=True)
    wrapped = made.attach_socket(params={"stdin": 1, "stdout": 1, "stream": 1})
    raw = wrapped._sock
    try:
        raw.settimeout(60)
        made.start()
        raw.sendall(b"through\n")
        raw.shutdown(socket.SHUT_WR)
        assert read_all(raw) == b"through\nend\n"
    finally:
        raw.close()
        wrapped.close()
    assert made.wait()["StatusCode"] == 0
    assert made.logs() == b"through\nend\n"


def test_attach_over_a_websocket(sdk: docker.DockerClient, clients: Clients) -> None:
    """``/attach/ws``, which browsers use; the SDK itself speaks it only over TCP."""
    made = sdk.containers.create("busybox", ["cat"], stdin_open=True, tty=True)
    made.start()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(clients.socket)
        path = f"/v1.43/containers/{made.id}/attach/ws?stream=1&stdin=1&stdout=1"
        connection = websocket.create_connection(f"ws://localhost{path}", socket=raw)
        connection.send("over the wire\n")
        received = ""
        while received.count("over the wire") < 2:  # the terminal's echo, then cat's
            message = connection.recv()
            received += message if isinstance(message, str) else message.decode()
        connection.close()


def test_build_and_its_log(sdk: docker.DockerClient) -> None:
    context = archive({"Dockerfile": b"FROM busybox\nRUN echo was-run\nLABEL made=here\n"})
    image, log = sdk.images.build(
        fileobj=io.BytesIO(context), custom_context=True, tag="sdk:1", rm=True, nocache=True
    )
    assert image.labels["made"] == "here"
    assert "was-run\n" in [line.get("stream") for line in log]
    with pytest.raises(BuildError):
        sdk.images.build(fileobj=io.BytesIO(b"FROM busybox\nRUN exit 2\n"), rm=True)
    sdk.images.remove("sdk:1")


def test_events_are_followed_from_another_thread(
    sdk: docker.DockerClient, clients: Clients
) -> None:
    """Closing the stream ends the thread that reads it."""
    filters = {"type": "container", "label": "followed"}
    events = sdk.events(decode=True, since=clients.engine_time_s(), filters=filters)
    seen: list[str] = []
    started = threading.Event()

    def read() -> None:
        for event in events:
            seen.append(event["Action"])
            if event["Action"] == "destroy":
                started.set()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    sdk.containers.run("busybox", ["true"], remove=True, labels=["followed"])
    assert started.wait(60)
    events.close()
    thread.join(20)
    assert not thread.is_alive()
    assert seen[0] == "create"
    assert seen.index("start") < seen.index("die") < seen.index("destroy")


def test_stats_once_and_streamed(box: Container) -> None:
    once: dict[str, Any] = box.stats(stream=False)
    assert once["pids_stats"]["current"] >= 1
    stream = box.stats(decode=True)
    names = {next(stream)["name"] for _ in range(2)}
    assert names == {f"/{box.name}"}
    stream.close()


def test_logs_are_streamed_while_they_are_written(sdk: docker.DockerClient) -> None:
    script = "echo first; until [ -e /go ]; do sleep 0.1; done; echo second"
    made = sdk.containers.run("busybox", ["sh", "-c", script], detach=True)
    lines = made.logs(stream=True, follow=True)
    assert next(lines) == b"first\n"
    made.exec_run(["touch", "/go"])
    assert b"".join(lines) == b"second\n"


def test_archives_are_put_and_got(box: Container) -> None:
    data = os.urandom(3 << 20)
    assert box.put_archive("/", archive({"data": data}))
    chunks, stat = box.get_archive("/data")
    assert stat["size"] == len(data)
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
        found = tar.extractfile("data")
        assert found is not None
        assert found.read() == data


def test_images_are_saved_and_loaded(sdk: docker.DockerClient) -> None:
    sdk.images.get("busybox").tag("sdk-saved", "1")
    saved = b"".join(sdk.images.get("sdk-saved:1").save(named="sdk-saved:1"))
    sdk.images.remove("sdk-saved:1")
    (loaded,) = sdk.images.load(saved)
    assert loaded.tags.count("sdk-saved:1") == 1
    sdk.images.remove("sdk-saved:1")


def test_volumes_and_networks(sdk: docker.DockerClient) -> None:
    network = sdk.networks.create("sdk-lane")
    volume = sdk.volumes.create("sdk-data")
    said = sdk.containers.run(
        "busybox", ["sh", "-c", "echo x >/d/f; cat /d/f"], remove=True,
        network=network.name, volumes={volume.name: {"bind": "/d", "mode": "rw"}},
    )  # fmt: skip
    assert said == b"x\n"
    volume.remove()
    network.remove()
