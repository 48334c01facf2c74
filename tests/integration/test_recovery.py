"""What a machine lives through: dead and hung services, stepped clocks, full disks, stuck engines.

Above all: what runs is never ended because something else failed, unless the user says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_host import Done, FakeHost, kill, mount_arguments, mounted, wait_until
from fake_qemu import unshare

pytestmark = pytest.mark.timeout(180)

GONE = "the virtual machine, which ran before, goes on; repeat the command, or end it"


def kill_service(host: FakeHost) -> int:
    """Kill the service; return QEMU's process."""
    status = host.status()
    kill(status["service_pid"])
    return int(status["qemu_pid"])


@contextlib.contextmanager
def engine_hidden(host: FakeHost) -> Iterator[None]:
    """Have the guest without its engine's socket for a while."""
    ssh = host.ssh()
    assert ssh("mv", "/run/docker.sock", "/run/hidden.sock").returncode == 0
    yield
    assert ssh("mv", "/run/hidden.sock", "/run/docker.sock").returncode == 0


# A service that takes over what another left


def test_an_adoption_that_fails_late_leaves_the_machine_running(host: FakeHost) -> None:
    host.good("start")
    with engine_hidden(host):
        qemu = kill_service(host)
        with host.serve(engine_s=0.2) as service:
            done = host.run("start")
            assert service.wait(20) == 1
        assert done.status == 1
        assert done.line.startswith("engine: nothing within")
        assert GONE in done.line
        assert done.line.endswith("wherry stop --force default")
        status = host.status()
        assert (status["state"], status["qemu_pid"]) == ("broken", qemu)
        assert "goes on" in status["reason"]
    host.good("start")
    assert host.status()["qemu_pid"] == qemu
    assert host.launches() == 1
    host.good("stop")
    host.at_rest()


def test_a_stop_that_cannot_take_the_machine_over_leaves_it_running(host: FakeHost) -> None:
    host.good("start")
    with engine_hidden(host):
        qemu = kill_service(host)
        # Long enough for the command to come before it is over, on a busy computer too.
        with host.serve(engine_s=2.0):  # four times that in emulation
            done = host.run("stop")
        assert done.status == 1
        # In other words if the service has left by then, and the command has begun another.
        assert "the virtual machine, which ran before, goes on" in done.line
        assert "wherry stop --force" in done.line
        assert psutil.pid_exists(qemu)
    assert host.good("stop") == "Machine default is stopped.\n"
    assert "poweroff" in host.service_log()
    host.at_rest()


def test_an_interrupted_adoption_ends_nothing(host: FakeHost) -> None:
    host.good("start")
    with engine_hidden(host):
        qemu = kill_service(host)
        command = host.spawn("start")
        wait_until(lambda: "the engine is not ready" in host.service_log(), 20, "it is waited for")
        os.killpg(command.pid, signal.SIGINT)
        assert host.finish(command).status == 130
    host.good("start")
    assert host.status()["qemu_pid"] == qemu
    assert host.launches() == 1


def test_a_qemu_that_does_not_answer_is_left_to_the_user(host: FakeHost) -> None:
    host.good("start")
    qemu = kill_service(host)
    os.kill(qemu, signal.SIGSTOP)
    with host.serve(adopt_s=0.3):
        done = host.run("start")
    assert done.status == 1
    assert done.line.startswith("adopt: QEMU's monitor did not answer within")
    assert GONE in done.line
    os.kill(qemu, signal.SIGCONT)
    host.good("start")
    assert host.status()["qemu_pid"] == qemu
    os.kill(qemu, signal.SIGSTOP)
    kill_service(host)
    assert host.good("stop", "--force") == "Machine default is stopped.\n"
    host.at_rest()


def test_an_adoption_needs_neither_the_image_nor_good_settings(host: FakeHost) -> None:
    host.good("start", "--cpus", "1")
    qemu = kill_service(host)
    shutil.rmtree(host.image)
    host.paths.config.write_text("cpus = 'many'")
    host.good("start")
    status = host.status()
    assert (status["state"], status["qemu_pid"], status["cpus"]) == ("running", qemu, 1)
    assert status["image"]["version"] == "1"
    kill_service(host)
    assert host.status()["image"]["version"] == "1"
    assert host.good("stop") == "Machine default is stopped.\n"
    host.at_rest()
    assert f"{host.paths.config}:1" in host.run("start").line


def test_an_adopted_machine_has_todays_settings_but_for_its_hardware(host: FakeHost) -> None:
    host.good("start", "--cpus", "1")
    host.good("config", "set", "endpoint.default_socket", "true")
    host.good("config", "set", "cpus", "2")
    default = Path(host.env["WHERRY_DEFAULT_SOCKET"])
    assert default.is_symlink()
    kill_service(host)
    host.good("start")
    assert host.status()["cpus"] == 1
    assert default.is_symlink()
    host.good("restart")
    assert host.status()["cpus"] == 2


def test_a_newer_image_is_none_of_a_machine_that_runs(host: FakeHost) -> None:
    host.good("start")
    newer = host.layout.images / f"2-{host.architecture}"
    shutil.copytree(host.image, newer)
    manifest = newer / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": "1"', '"version": "2"'))
    kill_service(host)
    host.good("start")
    assert host.status()["image"]["version"] == "1"
    host.good("restart")
    assert host.status()["image"]["version"] == "2"


# Who is who


def stepped(host: FakeHost, *arguments: str) -> Done:
    """Run a command on a computer whose clock was set forward by two seconds meanwhile."""
    stat = Path("/proc/stat").read_text()
    (boot,) = [line for line in stat.splitlines() if line.startswith("btime ")]
    fake = host.directory / "stat"
    fake.write_text(stat.replace(boot, f"btime {int(boot.split()[1]) + 2}"))
    with subprocess.Popen(
        [
            *unshare()[:-4],
            *("sh", "-c"),
            'mount --bind "$1" /proc/stat && shift && exec "$@"',
            *("-", fake, sys.executable, "-m", "wherry", *arguments),
        ],
        env=host.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as command:
        return host.finish(command)


def test_a_clock_that_is_set_makes_nobody_another(host: FakeHost) -> None:
    host.good("start")
    qemu = kill_service(host)
    status = json.loads(stepped(host, "status", "--json").stdout)
    assert (status["qemu_pid"], status["reason"]) == (
        qemu,
        "the service died; the virtual machine still runs",
    )
    assert stepped(host, "start").status == 0
    time.sleep(0.5)  # an adopted QEMU is looked at five times a second
    status = host.status()
    assert (status["state"], status["qemu_pid"]) == ("running", qemu)
    os.kill(status["service_pid"], signal.SIGSTOP)
    assert host.good("stop", "--force") == "Machine default is stopped.\n"
    host.at_rest()


def test_a_home_by_way_of_a_link_is_the_same_home(host: FakeHost) -> None:
    link = host.directory / "link"
    link.symlink_to(host.home)
    host.good("start")
    qemu = kill_service(host)
    host.paths.state.unlink()
    host.good("start", WHERRY_HOME=str(link))
    assert host.status()["qemu_pid"] == qemu
    assert host.launches() == 1
    kill_service(host)
    host.paths.state.unlink()
    said = host.good("stop", "--force", WHERRY_HOME=str(link))
    assert said == "Machine default is stopped.\n"
    host.at_rest()


def test_a_deep_home_is_found_from_cron_as_well(host: FakeHost) -> None:
    """The environment differs there; the machine is the same."""
    deep = host.directory / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    other = FakeHost(home=deep / "home")
    try:
        other.good("start", XDG_RUNTIME_DIR=str(host.directory))
        other.env.pop("XDG_RUNTIME_DIR", None)
        assert other.status()["state"] == "running"
        assert other.good("stop") == "Machine default is stopped.\n"
        other.at_rest()
    finally:
        other.close()


# What hangs


def test_a_service_that_hangs_while_it_starts_ends_the_command(host: FakeHost) -> None:
    host.behave(last_line="wherry: init")
    command = host.spawn("start")
    wait_until(host.paths.qmp_socket.exists, 20, "QEMU")
    os.kill(host.status()["service_pid"], signal.SIGSTOP)
    done = host.finish(command)
    assert (done.status, "did not answer within 5 s; it may hang" in done.line) == (1, True)
    assert host.good("stop", "--force") == "Machine default is stopped.\n"
    host.at_rest()


def test_a_stuck_engine_does_not_keep_the_start(host: FakeHost) -> None:
    host.behave(stuck=["/volumes", "/containers/json"])
    host.make()
    with host.serve(files_s=0.2) as service:
        assert "is running" in host.good("start")
        assert "bind mounts are not known" in host.service_log()
        assert host.status()["state"] == "running"
        host.good("stop")
        service.wait(30)
    host.at_rest()


def test_a_qemu_that_is_slow_to_execute_is_no_service_that_hangs(host: FakeHost) -> None:
    host.make()
    host.behave(version_takes_s=9)
    known = len(host.calls())
    command = host.spawn("start")
    wait_until(lambda: len(host.calls()) > known, 20, "QEMU is asked for its version")
    assert host.status()["state"] == "starting"
    assert host.finish(command).status == 0


def test_a_start_during_a_stop_waits_for_its_end(host: FakeHost) -> None:
    host.behave(deaf=True)
    host.make()
    with host.serve(guest_stop_s=5.0) as service:
        host.good("start")
        stop = host.spawn("stop")
        wait_until(lambda: "state stopping" in host.service_log(), 20, "stopping")
        os.killpg(stop.pid, signal.SIGINT)
        assert host.finish(stop).status == 130
        assert "is running" in host.good("start")
        assert service.wait(10) == 0
    assert host.launches() == 2
    assert host.status()["state"] == "running"


# What ceases to work


@pytest.mark.parametrize(
    "how", [{"refuses": "qemu: failed to initialize kvm: Busy"}, {"last_line": "[    0.1] Linux"}]
)
def test_an_accelerator_that_ceases_to_work_is_left(how: dict[str, str], host: FakeHost) -> None:
    if host.layout.platform.accelerator_problem("kvm"):
        pytest.skip("needs a /dev/kvm that can be opened")
    host.good("start")
    assert host.status()["accelerator"] == "kvm"
    host.good("stop")
    host.behave(trial={"kvm": "crashes"}, bad_accelerators={"kvm": how})
    with host.serve(boot_s=2.0):
        done = host.run("start")
        assert (done.status, "warning: running in emulation" in done.stderr) == (0, True), done
        assert host.status()["accelerator"] == "tcg"
        host.good("stop")
    host.at_rest()


def test_an_agent_that_dies_is_replaced(host: FakeHost) -> None:
    host.behave(agent_delay_s=2)
    host.good("start")
    # It has been waited for: names lead to this computer from the first request on.
    status = host.status()
    guest = status["guest"]
    assert (status["engine_health"], status["engine_problem"]) == ("healthy", "")
    assert 0 < guest["memory_used_bytes"] < guest["memory_total_bytes"]
    assert "  Guest:       uses " in host.good("status")
    assert host.run("shell", "--", "pkill", "-KILL", "-f", "/run/[w]herry/").status == 0
    wait_until(lambda: "the agent ended" in host.service_log(), 20, "it is noticed")
    wait_until(lambda: host.status()["guest"], 20, "another answers")
    assert host.service_log().count("agent ready") == 2


# A full disk


@pytest.fixture
def small(host: FakeHost) -> Iterator[tuple[FakeHost, Path]]:
    """A computer with a disk of its own, and a file to fill that with."""
    with mounted(host.directory / "small", *mount_arguments("1100m")) as place:
        other = FakeHost(home=place / "home")
        try:
            yield other, place / "filler"
        finally:
            other.close()


def fill(filler: Path) -> None:
    free = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (free.f_bavail - 256) * free.f_frsize)


def test_a_guest_that_waits_for_space_is_told_and_goes_on(small: tuple[FakeHost, Path]) -> None:
    host, filler = small
    host.good("start", "--disk", "1GiB")
    qemu = host.status()["qemu_pid"]
    fill(filler)
    os.kill(qemu, signal.SIGUSR1)
    wait_until(lambda: "disk is full" in host.status()["reason"], 30, "status tells it")
    status = host.status()
    assert (status["state"], status["qemu_pid"]) == ("running", qemu)
    done = host.run("stop")
    assert done.status == 1
    assert "cannot be stopped in order: this computer's disk is full" in done.line
    assert "free some space" in done.line
    # Nor does a service that comes later pull the plug.
    kill_service(host)
    done = host.run("start")
    assert done.status == 1
    assert "disk is full, so the guest is paused; the virtual machine" in done.line
    filler.unlink()
    host.good("start")
    fill(filler)
    os.kill(qemu, signal.SIGUSR1)
    wait_until(lambda: "disk is full" in host.status()["reason"], 30, "status tells it")
    filler.unlink()
    wait_until(lambda: host.status()["reason"] == "", 20, "it goes on")
    assert host.status()["qemu_pid"] == qemu
    host.good("stop")
    host.at_rest()


def test_a_disk_that_fills_while_the_guest_boots(small: tuple[FakeHost, Path]) -> None:
    host, _ = small
    host.behave(full_at="wherry: init", delay_s=0.2, last_line="wherry: init")
    done = host.run("start", "--disk", "1GiB")
    assert done.status == 1
    assert done.line.startswith("boot: this computer's disk is full, so the guest is paused; free")
    host.at_rest()
