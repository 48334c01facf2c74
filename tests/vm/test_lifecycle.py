"""A machine's life, with the real QEMU, the real guest and the real docker CLI.

The tests run in this order on the one machine of the run; each leaves it running.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import trustme
from loopback import free_port
from registry import tls_registry
from sandbox import Sandbox, wait_until

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.service.trust import FIRMWARE_BYTES

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def fetch(url: str) -> bytes:
    """Fetch, waiting for the port to appear and the server behind it to listen."""
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bytes(answer.read())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@pytest.fixture
def containers(machine: Sandbox) -> Iterator[None]:
    """For a test that makes some: when it fails, the next one finds none of them."""
    yield
    if left := machine.docker("ps", "-aq", check=False).stdout.decode().split():
        machine.docker("rm", "-f", *left, check=False)


def test_status_tells_what_scripts_rely_on(machine: Sandbox) -> None:
    status = machine.status()
    assert status["name"] == "default"
    assert status["state"] == "running"
    assert status["docker_host"].startswith("unix:///")
    assert status["docker_context"] == "wherry"
    assert status["accelerator"] in ("kvm", "hvf", "whpx", "tcg")
    assert (status["cpus"], status["memory_bytes"]) == (2, 2 << 30)
    assert set(status["image"]) == {"version", "sha256"}
    assert status["engine_version"].startswith("28.")
    assert psutil.pid_exists(status["service_pid"])
    assert psutil.pid_exists(status["qemu_pid"])
    assert status["uptime_s"] > 0
    assert status["idle_s"] is not None


def test_only_the_user_can_reach_the_engine(machine: Sandbox) -> None:
    path = Path(machine.status()["docker_host"].removeprefix("unix://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    # Whoever could connect to QEMU's monitor would have the whole machine.
    qmp = Layout(machine.home, current()).machine("default").qmp_socket
    assert qmp.is_socket()
    assert stat.S_IMODE(qmp.parent.stat().st_mode) == 0o700
    assert qmp.stat().st_uid == qmp.parent.stat().st_uid == os.getuid()


def test_the_engine_has_no_tcp_port(machine: Sandbox) -> None:
    listening = machine.wherry("shell", "--", "ss", "-Hltn").stdout.decode()
    ports = {line.split()[3].rsplit(":", 1)[1] for line in listening.splitlines()}
    assert ports == {"22"}


@pytest.mark.usefixtures("containers")
def test_a_container_runs_and_answers_on_its_port(machine: Sandbox) -> None:
    port = free_port()
    machine.docker(
        "run", "-d", "--name", "web", "-p", f"{port}:80", "busybox",
        "sh", "-c", "mkdir /www; echo here >/www/index.html; exec httpd -f -h /www",
    )  # fmt: skip
    assert fetch(f"http://127.0.0.1:{port}/") == b"here\n"
    machine.docker("rm", "-f", "web")

    def closed() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    wait_until(closed, 20, "the port is closed when its container is gone")


def test_a_second_start_reports_running(machine: Sandbox) -> None:
    before = machine.status()["qemu_pid"]
    done = machine.wherry("start")
    assert b"is running" in done.stdout
    assert machine.status()["qemu_pid"] == before


def test_a_setting_of_a_running_machine_is_refused(machine: Sandbox) -> None:
    done = machine.wherry("start", "--cpus", "1", check=False)
    assert done.returncode == 2
    assert b"is running" in done.stderr


def test_shell_passes_input_output_and_status(machine: Sandbox) -> None:
    assert machine.wherry("shell", "--", "cat", input=b"a\0b").stdout == b"a\0b"
    assert machine.wherry("shell", "--", "sh", "-c", "exit 7", check=False).returncode == 7
    assert machine.wherry("shell", "default", "--", "echo", "two  words").stdout == b"two  words\n"


def test_ssh_config_works_with_openssh(machine: Sandbox, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_bytes(machine.wherry("ssh-config").stdout)
    said = subprocess.check_output(["ssh", "-F", config, "wherry-default", "hostname"])
    assert said == b"wherry\n"


def test_logs_of_every_source(machine: Sandbox) -> None:
    assert b"wherry: ssh" in machine.wherry("logs", "--source", "console").stdout
    assert b"state running" in machine.wherry("logs").stdout
    assert b"API listen" in machine.wherry("logs", "--source", "engine").stdout


@pytest.mark.usefixtures("containers")
def test_a_killed_service_leaves_the_containers_running(machine: Sandbox) -> None:
    machine.docker("run", "-d", "--name", "survivor", "busybox", "sleep", "1000")
    before = machine.status()
    os.kill(before["service_pid"], signal.SIGKILL)
    wait_until(lambda: machine.status()["state"] == "broken", 5, "status tells the death")
    assert "service died" in machine.status()["reason"]
    assert psutil.pid_exists(before["qemu_pid"])
    machine.wherry("start")
    after = machine.status()
    assert after["qemu_pid"] == before["qemu_pid"]
    assert machine.docker("ps", "--format", "{{.Names}}").stdout == b"survivor\n"


@pytest.mark.usefixtures("containers")
def test_published_ports_survive_a_killed_service(machine: Sandbox) -> None:
    port = free_port()
    machine.docker(
        "run", "-d", "--name", "web", "-p", f"{port}:80", "busybox",
        "sh", "-c", "mkdir /www; echo here >/www/index.html; exec httpd -f -h /www",
    )  # fmt: skip
    assert fetch(f"http://127.0.0.1:{port}/") == b"here\n"
    os.kill(machine.status()["service_pid"], signal.SIGKILL)
    machine.wherry("start")
    assert fetch(f"http://127.0.0.1:{port}/") == b"here\n"
    machine.docker("rm", "-f", "web")

    def closed() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    wait_until(closed, 20, "the port is closed when its container is gone")


def test_a_killed_qemu_is_noticed_and_the_data_is_intact(machine: Sandbox) -> None:
    machine.docker("volume", "create", "kept")
    machine.docker("run", "--rm", "-v", "kept:/v", "busybox", "sh", "-c", "echo data >/v/f; sync")
    os.kill(machine.status()["qemu_pid"], signal.SIGKILL)
    wait_until(lambda: machine.status()["state"] == "broken", 5, "status tells the death")
    assert "QEMU" in machine.status()["reason"]
    done = machine.docker("ps", check=False)
    assert done.returncode != 0
    machine.wherry("start")
    said = machine.docker("run", "--rm", "-v", "kept:/v", "busybox", "cat", "/v/f")
    assert said.stdout == b"data\n"
    machine.docker("volume", "rm", "kept")


def test_two_starts_at_once_after_both_were_killed(machine: Sandbox) -> None:
    """Never two QEMUs on one disk, whoever starts them."""
    status = machine.status()
    os.kill(status["service_pid"], signal.SIGKILL)
    os.kill(status["qemu_pid"], signal.SIGKILL)
    results: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(machine.wherry("start", check=False).returncode)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0]
    running = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(machine.home) in " ".join(process.info["cmdline"] or ())
        and "qemu-system" in (process.info["cmdline"] or [""])[0]
    ]
    assert len(running) == 1


def test_a_cut_connection_comes_back_under_an_open_endpoint(machine: Sandbox) -> None:
    """The listener survives; a request after the cut waits for the new connection.

    One that was under way ends, and its client is not told that all is well.
    """
    address = machine.status()["docker_host"].removeprefix("unix://")
    listener = Path(address).stat().st_ino
    boot = machine.wherry("shell", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(address)
        client.sendall(b"GET /events HTTP/1.1\r\nHost: docker\r\n\r\n")
        said = client.recv(65536)
        assert said.startswith(b"HTTP/1.1 200 ")
        machine.cut_connection()
        with suppress(ConnectionError):
            while more := client.recv(65536):
                said += more
    # A chunked answer that is whole ends with a chunk of no bytes (RFC 9112, 7.1).
    assert b"Transfer-Encoding: chunked" in said
    assert not said.endswith(b"0\r\n\r\n")
    assert machine.docker("version", "--format", "{{.Server.Version}}", timeout=60).stdout
    assert Path(address).stat().st_ino == listener
    assert machine.wherry("shell", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout == boot


def test_a_second_machine_beside_the_first(machine: Sandbox) -> None:
    machine.wherry("start", "second", "--cpus", "1", "--memory", "1GiB")
    names = {each["name"]: each["state"] for each in json.loads(
        machine.wherry("list", "--json").stdout)}  # fmt: skip
    assert names == {"default": "running", "second": "running"}
    assert machine.docker("images", "-q", name="wherry-second").stdout == b""
    assert machine.docker("images", "-q").stdout != b""
    machine.wherry("delete", "--yes", "second")
    assert machine.wherry("status", "second", check=False).returncode == 3
    contexts = machine.docker("context", "ls", "--format", "{{.Name}}").stdout.split()
    assert b"wherry-second" not in contexts


@pytest.mark.usefixtures("containers")
def test_what_a_stop_leaves_and_a_start_brings(machine: Sandbox, tmp_path: Path) -> None:
    """Both take long here, so this is all of it."""
    before = sorted(machine.docker("images", "-q", "--no-trunc").stdout.split())
    machine.docker("run", "-d", "--name", "writer", "busybox", "sh", "-c",
                   "trap 'echo bye >/bye; exit 3' TERM; while :; do sleep 0.1; done")  # fmt: skip
    port = free_port()
    machine.docker(
        "run", "-d", "--name", "web", "--restart", "always", "-p", f"{port}:80", "busybox",
        "sh", "-c", "mkdir -p /www; echo back >/www/index.html; exec httpd -f -h /www",
    )  # fmt: skip
    machine.wherry("stop")
    status = machine.status()
    assert status["state"] == "stopped"
    assert (status["service_pid"], status["qemu_pid"]) == (None, None)
    assert "guest did not shut down" not in machine.wherry("logs").stdout.decode()
    assert machine.docker("ps", check=False).returncode != 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    with many_authorities(machine) as authority, tls_registry(tmp_path, authority) as registry:
        machine.wherry("start")
        # No request of a client's brings it up, only its restart policy.
        assert fetch(f"http://127.0.0.1:{port}/") == b"back\n"
        # The engine's first request already.
        name = f"{registry}/team/tool:1"
        machine.docker("tag", "busybox", name)
        machine.docker("push", "-q", name)
        machine.docker("rmi", name)
    assert sorted(machine.docker("images", "-q", "--no-trunc").stdout.split()) == before
    # The container was asked to end, and what it wrote then is there.
    code = machine.docker("inspect", "-f", "{{.State.ExitCode}}", "writer").stdout
    assert code == b"3\n"
    machine.docker("cp", "writer:/bye", str(machine.home / "bye"))
    assert (machine.home / "bye").read_bytes() == b"bye\n"


@contextmanager
def many_authorities(machine: Sandbox) -> Iterator[trustme.CA]:
    """More than go to the guest by its firmware; one of them."""
    trusted = machine.home / "certs.d"
    trusted.mkdir(exist_ok=True)
    found = [trustme.CA() for _ in range(100)]
    pem = b"".join(each.cert_pem.bytes() for each in found)
    assert len(gzip.compress(pem)) > FIRMWARE_BYTES
    (trusted / "many.pem").write_bytes(pem)
    try:
        yield found[-1]
    finally:
        (trusted / "many.pem").unlink()
