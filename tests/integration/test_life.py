"""A machine's life through the command line, with a fake QEMU and a real sshd."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from fake_host import FakeHost, kill, wait_until
from filelock import FileLock

from wherry.core.errors import TunnelError
from wherry.tunnel.connection import Connection
from wherry.tunnel.keys import load_keys


def ping(host: FakeHost) -> str:
    """Ask the engine through the machine's endpoint, as a Docker client does."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(host.status()["docker_host"].removeprefix("unix://"))
        client.sendall(b"GET /_ping HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    return answer.decode()


def test_from_nothing_to_running_and_back(host: FakeHost) -> None:
    said = host.good("start", "--cpus", "1", "--memory", "1GiB", "--disk", "2GiB")
    assert "Machine default is running Docker 28.5.2" in said
    status = host.status()
    assert (status["state"], status["cpus"], status["memory_bytes"]) == ("running", 1, 1 << 30)
    assert (status["engine_version"], status["image"]["version"]) == ("28.5.2", "1")
    assert status["uptime_s"] >= 0
    assert {status["service_pid"], status["qemu_pid"]} <= {p.pid for p in host.processes()}
    assert "200 OK" in ping(host)
    (context,) = (host.directory / "docker/contexts/meta").glob("*/meta.json")
    endpoint = json.loads(context.read_text())["Endpoints"]["docker"]["Host"]
    assert endpoint == status["docker_host"]
    assert json.loads(host.good("list", "--json"))[0]["state"] == "running"
    assert host.good("stop") == "Machine default is stopped.\n"
    host.at_rest()
    assert host.status()["state"] == "stopped"
    assert host.good("stop") == "Machine default was not running.\n"
    host.good("delete", "--yes")
    host.at_rest()
    assert not host.paths.directory.exists()
    assert not list((host.directory / "docker/contexts/meta").iterdir())


def test_settings_keys_and_disk_stay(host: FakeHost) -> None:
    host.good("start", "--cpus", "1", "--disk", "2GiB")
    keys = {path.name: path.read_bytes() for path in host.paths.keys.iterdir()}
    assert host.run("start", "--cpus", "2").status == 2
    host.good("restart")
    assert host.status()["cpus"] == 1
    host.good("stop")
    host.good("start", "--memory", "1GiB")
    status = host.status()
    assert (status["cpus"], status["memory_bytes"], status["disk_bytes"]) == (1, 1 << 30, 2 << 30)
    assert keys.items() <= {p.name: p.read_bytes() for p in host.paths.keys.iterdir()}.items()


def test_a_second_start_finds_it_running(host: FakeHost) -> None:
    host.good("start")
    before = host.status()
    assert "is running" in host.good("start")
    after = host.status()
    assert (after["qemu_pid"], after["service_pid"]) == (before["qemu_pid"], before["service_pid"])
    assert host.launches() == 1


def test_starts_at_once_start_one(host: FakeHost) -> None:
    commands = [host.spawn("start") for _ in range(3)]
    for command in commands:
        done = host.finish(command)
        assert (done.status, "is running" in done.stdout) == (0, True), done
    assert host.launches() == 1


def test_a_start_meanwhile_waits_until_it_runs(host: FakeHost) -> None:
    host.behave(delay_s=0.5)
    first = host.spawn("start")
    wait_until(host.launches, 10, "QEMU")
    assert "is running" in host.good("start")
    assert host.finish(first).status == 0
    assert host.launches() == 1


def test_a_start_waits_for_the_service_before_to_be_quite_gone(host: FakeHost) -> None:
    host.make()
    with FileLock(host.paths.service_lock):
        command = host.spawn("start")
        time.sleep(1)
        assert command.poll() is None
    assert host.finish(command).status == 0
    assert host.status()["state"] == "running"


def test_stop_and_start_at_once_end_in_one_or_the_other(host: FakeHost) -> None:
    host.good("start")
    stop, start = host.spawn("stop"), host.spawn("start")
    assert host.finish(stop).status == 0
    assert host.finish(start).status == 0
    assert host.status()["state"] in ("running", "stopped")
    assert host.launches() <= 2


def test_two_machines_live_side_by_side(host: FakeHost) -> None:
    host.good("start")
    host.good("start", "other")
    assert [each["name"] for each in json.loads(host.good("list", "--json"))] == [
        "default",
        "other",
    ]
    assert host.status("other")["docker_context"] == "wherry-other"
    host.good("delete", "--yes", "other")
    assert host.status()["state"] == "running"


def test_a_killed_service_leaves_a_machine_that_the_next_one_adopts(host: FakeHost) -> None:
    host.behave(trial={"kvm": "crashes"})
    host.good("start")
    before = host.status()
    assert before["accelerator"] == "tcg"
    kill(before["service_pid"])
    broken = host.status()
    assert (broken["state"], broken["qemu_pid"]) == ("broken", before["qemu_pid"])
    assert broken["reason"] == "the service died; the virtual machine still runs"
    assert "is running" in host.good("start")
    after = host.status()
    assert (after["state"], after["qemu_pid"]) == ("running", before["qemu_pid"])
    assert after["service_pid"] != before["service_pid"]
    assert (after["accelerator"], after["warning"]) == ("tcg", before["warning"])
    assert "200 OK" in ping(host)
    assert host.launches() == 1
    host.good("stop")
    host.at_rest()


def test_a_machine_without_its_service_can_be_stopped_in_order(host: FakeHost) -> None:
    host.good("start")
    kill(host.status()["service_pid"])
    assert host.good("stop") == "Machine default is stopped.\n"
    host.at_rest()
    assert "poweroff" in host.service_log()
    assert host.status()["state"] == "stopped"


def test_a_service_killed_while_it_starts(host: FakeHost) -> None:
    host.behave(last_line="wherry: init")
    command = host.spawn("start")
    wait_until(lambda: host.launches() and host.paths.qmp_socket.exists(), 10, "QEMU")
    (service,) = [p for p in host.processes() if "wherry.service" in " ".join(p.cmdline())]
    kill(service.pid)
    done = host.finish(command)
    assert done.status == 1
    assert "the machine's service ended before it answered; see: wherry logs" in done.line
    assert host.status()["state"] == "broken"
    host.good("stop", "--force")
    host.at_rest()
    host.behave()
    host.good("start")


def test_a_killed_qemu_is_noticed_and_a_start_recovers(host: FakeHost) -> None:
    host.good("start")
    first = host.status()["qemu_pid"]
    kill(first)
    wait_until(lambda: host.status()["state"] == "broken", 5, "status broken")
    assert "killed by signal 9" in host.status()["reason"]
    host.at_rest()
    host.good("start")
    assert host.status()["qemu_pid"] != first
    assert "200 OK" in ping(host)


def test_an_adopted_qemu_that_is_killed_is_noticed_too(host: FakeHost) -> None:
    host.good("start")
    kill(host.status()["service_pid"])
    host.good("start")
    kill(host.status()["qemu_pid"])
    wait_until(lambda: host.status()["state"] == "broken", 5, "status broken")
    host.at_rest()
    host.good("start")


def test_everything_killed_at_once_as_when_the_power_fails(host: FakeHost) -> None:
    host.good("start")
    status = host.status()
    kill(status["service_pid"])
    kill(status["qemu_pid"])
    assert host.status()["state"] == "broken"
    assert host.good("stop") == "Machine default was not running.\n"
    host.at_rest()
    host.good("start")
    assert host.status()["state"] == "running"


def test_a_number_that_another_program_has_now(host: FakeHost) -> None:
    host.good("start")
    status = host.status()
    kill(status["service_pid"])
    kill(status["qemu_pid"])
    with subprocess.Popen(["sleep", "60"]) as bystander:
        record = json.loads(host.paths.state.read_text())
        for who in ("service", "qemu"):
            record[who]["pid"] = bystander.pid
        host.paths.state.write_text(json.dumps(record))
        found = host.status()
        assert (found["state"], found["service_pid"], found["qemu_pid"]) == ("broken", None, None)
        host.good("stop", "--force")
        host.good("start")
        host.good("delete", "--yes")
        assert bystander.poll() is None
        bystander.kill()


def test_a_service_that_hangs_is_told_and_can_be_ended(host: FakeHost) -> None:
    host.good("start")
    service = host.status()["service_pid"]
    os.kill(service, signal.SIGSTOP)
    done = host.run("start")
    assert (done.status, "did not answer within 5 s; it may hang" in done.line) == (1, True)
    assert host.good("stop", "--force") == "Machine default is stopped.\n"
    host.at_rest()


def test_a_guest_that_powers_off_by_itself_stops_the_machine(host: FakeHost) -> None:
    host.good("start")
    assert host.run("shell", "--", "poweroff").status in (0, 255)
    wait_until(lambda: host.status()["state"] == "stopped", 10, "stopped")
    assert host.status()["reason"] == ""
    host.at_rest()


def monitor_status(host: FakeHost) -> str:
    """Return what QEMU says of itself, which no service asks now (QMP's ``query-status``)."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(host.paths.qmp_socket))
        lines = monitor.makefile("rw")
        lines.readline()
        for command in ("qmp_capabilities", "query-status"):
            lines.write(json.dumps({"execute": command}) + "\n")
            lines.flush()
            while "return" not in (answer := json.loads(lines.readline())):
                pass
        return str(answer["return"]["status"])


def test_a_guest_that_powers_off_while_no_service_runs(host: FakeHost) -> None:
    host.good("start")
    config = host.directory / "ssh_config"
    config.write_text(host.good("ssh-config"))
    kill(host.status()["service_pid"])
    ssh = ["ssh", "-F", config, "-o", "ConnectTimeout=10", "wherry-default", "poweroff"]

    def is_off() -> bool:
        if monitor_status(host) == "shutdown":
            return True
        # Once did nothing on a computer with much to do.
        subprocess.run(ssh, check=False, timeout=30)
        return False

    wait_until(is_off, 40, "powered off")
    host.good("start")
    assert "its guest has powered off" in host.service_log()
    assert host.status()["state"] == "running"


def test_a_guest_that_does_not_power_off_is_ended_with_its_bound(host: FakeHost) -> None:
    host.behave(deaf=True)
    host.make()
    with host.serve(guest_stop_s=0.3) as service:
        host.good("start")
        host.good("stop")
        service.wait(10)
    assert "the guest did not shut down" in host.service_log()
    host.at_rest()


def test_a_qemu_that_does_not_end_when_told_to_is_killed(host: FakeHost) -> None:
    """The guest powers off too late, and QEMU's monitor says that it quits, and does not."""
    host.behave(deaf=True, stays=True)
    host.make()
    with host.serve(guest_stop_s=0.3) as service:
        host.good("start")
        qemu = host.status()["qemu_pid"]
        begun = time.monotonic()
        host.good("stop")
        assert time.monotonic() - begun < 25
        service.wait(10)
    assert not psutil.pid_exists(qemu)
    host.at_rest()


def test_qemu_told_to_end_by_the_system(host: FakeHost) -> None:
    """The system's own shutdown sends SIGTERM to all; the machine must not hang it."""
    host.good("start")
    service = host.status()["service_pid"]
    os.kill(service, signal.SIGTERM)
    wait_until(lambda: not host.processes(), 20, "all ended")
    assert host.status()["state"] == "stopped"
    host.at_rest()


def test_a_home_of_many_letters(host: FakeHost) -> None:
    deep = host.directory / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    other = FakeHost(home=deep / "home")
    try:
        other.good("start")
        assert "200 OK" in ping(other)
        assert len(other.status()["docker_host"]) < 110
        kill(other.status()["service_pid"])
        other.good("start")
        other.good("delete", "--yes")
        other.at_rest()
    finally:
        other.close()


def test_a_home_of_strange_letters(host: FakeHost) -> None:
    other = FakeHost(home=host.directory / "it's, 100% ü")
    try:
        other.good("start")
        assert "200 OK" in ping(other)
        assert other.good("shell", "--", "echo", "a  b").endswith("a  b\n")
        said = other.good("env", "--shell", "bash")
        shown = subprocess.run(
            ["bash", "-c", 'eval "$1"; printf %s "$DOCKER_HOST"', "-", said],
            capture_output=True,
            check=True,
        )
        assert shown.stdout.decode() == other.status()["docker_host"]
        kill(other.status()["service_pid"])
        other.good("start")
        assert other.launches() == 1
        other.good("stop")
        other.at_rest()
    finally:
        other.close()


def test_the_guests_commands_keep_their_words_and_status(host: FakeHost) -> None:
    host.good("start")
    words = ["a  b", "$HOME", "'", '"', "*", "--debug", ""]
    said = host.good("shell", "--", "printf", "[%s]", *words)
    assert said == "".join(f"[{word}]" for word in words)
    assert host.run("shell", "--", "sh", "-c", "exit 7").status == 7
    block = host.good("ssh-config")
    config = host.directory / "ssh_config"
    config.write_text(block)
    done = subprocess.run(
        ["ssh", "-F", config, "wherry-default", shlex.join(["echo", "it", "works"])],
        capture_output=True,
        timeout=20,
    )
    assert done.stdout == b"it works\n"


def test_a_guest_with_another_key_is_shown_no_command(host: FakeHost) -> None:
    """Neither by ours nor with the block, whatever the user's own ssh would make of it."""
    host.good("start")
    marker, config = host.directory / "marker", host.directory / "ssh_config"
    make_marker = ["touch", str(marker)]
    config.write_text(host.good("ssh-config"))
    ssh = ["ssh", "-F", config, "wherry-default", shlex.join(make_marker)]
    key = host.paths.keys / "host_ed25519"
    address = host.status()["ssh"]

    def log_in() -> None:
        Connection.connect(
            (address["host"], address["port"]),
            user_key=load_keys(host.paths.keys).user,
            host_public=load_keys(host.paths.keys).host.public,
        ).close()

    # All of them can, as long as it is the machine's key.
    for command in (lambda: host.good("shell", "--", *make_marker), lambda: subprocess.run(ssh)):
        command()
        marker.unlink()
    log_in()
    # Seen from here, the guest then has a key that is not the machine's.
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], input=b"y\n")
    refused = host.run("shell", "--", *make_marker)
    assert refused.status == 255
    assert "Host key verification failed" in refused.stderr
    config.write_text(host.good("ssh-config"))
    done = subprocess.run(ssh, capture_output=True, timeout=20)
    assert done.returncode == 255
    assert b"Host key verification failed" in done.stderr
    with pytest.raises(TunnelError, match="key"):
        log_in()
    assert not marker.exists()


@pytest.mark.parametrize("source", ["service", "console"])
def test_logs(source: str, host: FakeHost) -> None:
    host.good("start")
    said = host.good("logs", "--source", source)
    assert ("state running" if source == "service" else "wherry: ssh") in said


def test_a_disk_is_new_until_a_guest_has_started_with_it(host: FakeHost) -> None:
    """Also when the service that started it was killed, and another one took it over."""
    host.make()
    assert host.paths.new_disk.exists()
    host.good("start")
    assert "wherry.new_disk" in " ".join(host.calls()[-1])
    assert not host.paths.new_disk.exists()
    host.paths.new_disk.touch()
    os.kill(host.status()["service_pid"], signal.SIGKILL)
    host.good("start")
    assert not host.paths.new_disk.exists()
    host.good("stop")
    host.good("start")
    assert "wherry.new_disk" not in " ".join(host.calls()[-1])


def test_the_disk_grows_and_never_shrinks(host: FakeHost) -> None:
    host.make(disk="2GiB")
    size = host.paths.data_disk.stat().st_size
    done = host.run("config", "set", "disk", "1GiB")
    assert (done.status, "smaller than the data disk, 2 GiB" in done.line) == (2, True)
    host.paths.config.write_text('disk = "1GiB"\n')
    done = host.run("start")
    assert (done.status, "a disk can only grow" in done.line) == (1, True)
    assert host.paths.data_disk.stat().st_size == size
    host.at_rest()
    host.paths.config.write_text('disk = "3GiB"\n')
    host.good("start")
    said = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", host.paths.data_disk],
        capture_output=True,
        check=True,
    )
    assert json.loads(said.stdout)["virtual-size"] == 3 << 30


def test_what_is_running_is_not_deleted_by_halves(host: FakeHost) -> None:
    host.good("start")
    with contextlib.suppress(AssertionError):
        assert host.run("delete").status != 0  # nobody is there to be asked
    assert host.status()["state"] == "running"
    host.good("delete", "--yes")
    host.at_rest()
    assert not Path(host.paths.directory).exists()


def test_a_machine_whose_settings_file_is_gone_starts_with_the_defaults(host: FakeHost) -> None:
    host.make()
    host.paths.config.unlink()
    host.good("start")
    assert host.status()["state"] == "running"
