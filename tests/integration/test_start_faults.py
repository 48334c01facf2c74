"""What goes wrong with a start: one line that says what, why and what next, nothing half-made."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from fake_host import SUPPORT, Done, FakeHost, kill, mount_arguments, mounted, wait_until

from wherry.service.stages import Bounds

HOLD_LOCK = """
import fcntl, os, struct, sys
disk = os.open(sys.argv[1], os.O_RDWR)
for byte in (100, 101, 103, 201, 203):
    fcntl.fcntl(disk, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
print("held", flush=True)
sys.stdin.read()
"""


def failed(done: Done, *, status: int, says: str, next_step: str) -> None:
    """Assert that a command failed as every command should."""
    assert (done.status, done.stdout) == (status, "")
    assert says in done.line
    assert next_step in done.line.partition(";")[2]
    assert "Traceback" not in done.stderr


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_qemu(host: FakeHost) -> None:
    host.make()
    for name in ("default", "other"):
        failed(
            host.run("start", name, PATH=str(host.directory)),
            status=1,
            says="is not on PATH: QEMU is not installed",
            next_step="install",
        )
    host.at_rest()
    assert not host.layout.machine("other").directory.exists()


def test_an_old_qemu(host: FakeHost) -> None:
    host.behave(version="7.1.0")
    done = host.run("start")
    failed(done, status=1, says="is too old: 7.2 is needed", next_step="install")
    assert host.run("version").stdout.splitlines()[1].startswith("QEMU: QEMU 7.1.0")
    host.at_rest()
    assert not host.paths.directory.exists()


@pytest.mark.parametrize(
    ("text", "line", "says", "next_step"),
    [
        ("cpus = 1\nmemroy = '1GiB'\n", 2, "unknown key memroy", "did you mean memory?"),
        ("\n\ncpus = 'many'\n", 3, "'many' is not a whole number", "virtual processors"),
        ("cpus = \n", 1, "not valid TOML", "edit"),
    ],
)
def test_a_wrong_configuration(
    text: str, line: int, says: str, next_step: str, host: FakeHost
) -> None:
    host.make()
    before = digest(host.paths.data_disk)
    host.paths.config.write_text(text)
    done = host.run("start")
    failed(done, status=1, says=says, next_step=next_step)
    assert done.line.startswith(f"{host.paths.config}:{line}: ")
    status = host.status()
    assert (status["state"], f":{line}: " in status["reason"]) == ("broken", True)
    assert digest(host.paths.data_disk) == before
    host.at_rest()
    host.paths.config.write_text("")
    host.good("start")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (("--cpus", "9999"), "cpus = 9999 is more than the"),
        (("--memory", "900TiB"), "memory = 900 TiB is more than the"),
        (("--disk", "900TiB"), "disk = 900 TiB is more than the"),
        (("--accel", "hvf"), "accelerator = hvf does not exist on"),
        (("--accel", "warp"), "'warp' is none of auto, kvm"),
        (("--cpus", "0"), "0 is not a whole number above 0"),
        (("--memory", "tiny"), "'tiny' is not a size"),
    ],
)
def test_what_the_computer_has_not(setting: tuple[str, str], says: str, host: FakeHost) -> None:
    failed(host.run("start", *setting), status=2, says=says, next_step="")
    host.at_rest()
    assert not host.paths.directory.exists()
    host.make()
    before = host.paths.config.read_text()
    failed(host.run("start", *setting), status=2, says=says, next_step="")
    assert host.paths.config.read_text() == before
    assert host.calls() == [["--version"]] * len(host.calls())


@pytest.mark.parametrize("text", ["cpus = 9999", "memory = '900TiB'", "disk = '900TiB'"])
def test_a_configuration_that_asks_for_more_than_there_is(text: str, host: FakeHost) -> None:
    host.make()
    host.paths.config.write_text(text)
    done = host.run("start")
    failed(done, status=1, says="is more than the", next_step="use a smaller")
    assert done.line.startswith(f"{host.paths.config}:1: ")
    host.at_rest()


def test_no_image(host: FakeHost) -> None:
    (host.image / "manifest.json").unlink()
    failed(host.run("start"), status=1, says="no guest image", next_step="wherry image build")
    assert not host.paths.directory.exists()
    host.at_rest()


def test_an_image_that_is_not_what_its_manifest_says(host: FakeHost) -> None:
    (host.image / "root").write_bytes(b"r" * 5000)
    done = host.run("start")
    failed(done, status=1, says="image: ", next_step="wherry image pull")
    assert f"{host.image}/root has SHA-256" in done.line
    assert host.launches() == 0
    host.at_rest()
    (host.image / "root").write_bytes(b"R" * 5000)
    host.good("start")


def truncate(path: Path) -> None:
    os.truncate(path, 70_000)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "is missing"),
        (truncate, "is truncated or corrupt"),
        (lambda path: path.write_bytes(b"no disk" * 1000), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
    ],
)
def test_a_damaged_data_disk_is_never_replaced(
    damage: Callable[[Path], None], says: str, host: FakeHost
) -> None:
    host.make(disk="2GiB")
    damage(host.paths.data_disk)
    left = digest(host.paths.data_disk) if host.paths.data_disk.exists() else ""
    done = host.run("start")
    failed(done, status=1, says=says, next_step="restore data.qcow2 from a backup, or delete")
    assert done.line.startswith(f"disk: the data disk {host.paths.data_disk} ")
    assert (digest(host.paths.data_disk) if host.paths.data_disk.exists() else "") == left
    assert host.launches() == 0
    wait_until(lambda: not host.processes(), 5, "ended")


def test_a_data_disk_in_use_is_not_called_damaged(host: FakeHost) -> None:
    host.make(disk="2GiB")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, host.paths.data_disk],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        done = host.run("start")
        failed(done, status=1, says="is in use by another program", next_step="end what uses it")
        holder.communicate()
    host.good("start")


@pytest.mark.parametrize("what", ["inodes", "bytes"])
def test_a_full_disk_while_a_machine_is_made(what: str, host: FakeHost) -> None:
    """However little space there is, there is a whole machine or none."""
    outcomes = []
    with mounted(host.directory / "small", *mount_arguments("1100m")) as place:
        other = FakeHost(home=place / "home")
        used = os.statvfs(place)
        filler = place / "filler"
        try:
            for left in (
                range(2, 40, 3) if what == "inodes" else (1, 1 << 16, 1 << 18, 1 << 19, 8 << 20)
            ):
                if what == "bytes":
                    leave_bytes(filler, left)
                else:
                    inodes = used.f_files - used.f_ffree + left
                    remount = ["mount", "-o", f"remount,nr_inodes={inodes}", place]
                    subprocess.run(remount, check=True)
                done = other.run("start")
                outcomes.append(done.status)
                if done.status == 0:
                    other.good("delete", "--yes")
                    break
                assert done.status == 1
                assert "No space left" in done.line, done
                assert ";" in done.line
                other.at_rest()
        finally:
            other.close()
    assert outcomes[0] == 1
    assert outcomes[-1] == 0


def leave_bytes(filler: Path, left: int) -> None:
    """Fill a file system but for so many bytes."""
    with filler.open("ab") as file:
        found = os.statvfs(filler.parent)
        size = file.tell() + found.f_bavail * found.f_frsize - left
        if size > file.tell():
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)


def test_a_disk_that_fills_while_the_machine_runs(host: FakeHost) -> None:
    with mounted(host.directory / "small", *mount_arguments("1100m")) as place:
        other = FakeHost(home=place / "home")
        try:
            other.good("start", "--disk", "1GiB")
            leave_bytes(place / "filler", 0)
            assert other.status()["state"] == "running"
            assert other.good("stop") == "Machine default is stopped.\n"
            wait_until(lambda: not other.processes(), 5, "ended")
            (place / "filler").unlink()
            other.good("start")
        finally:
            other.close()


@pytest.mark.parametrize(
    "name", ["/", "..", "a b", "x" * 200, "Big", "con", "", "a/b", "ä", "-", "a..b", "\n"]
)
def test_bad_names(name: str, host: FakeHost) -> None:
    done = host.run("start", "--", name)
    failed(done, status=2, says="cannot be a machine's name", next_step="small letters")
    assert len(done.line) < 200
    assert list((host.home / "machines").iterdir()) == []


@pytest.mark.parametrize("command", ["stop", "status", "delete", "shell", "env", "logs"])
def test_a_bad_name_is_bad_usage_for_every_command(command: str, host: FakeHost) -> None:
    done = host.run(command, "../images")
    failed(done, status=2, says="cannot be a machine's name", next_step="small letters")
    assert host.image.exists()


AS_NOBODY = """
import os, sys
import wherry.cli.machine, wherry.service.machine
from wherry.platform import current

current()
os.setgroups([])
os.setuid(65534)
wherry.cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_a_home_that_is_not_ours(host: FakeHost) -> None:
    theirs = host.directory / "theirs"
    theirs.mkdir(mode=0o755)
    host.directory.chmod(0o755)
    for home in (theirs, theirs / "home"):
        command = subprocess.Popen(
            [sys.executable, "-c", AS_NOBODY, "start"],
            env={**host.env, "WHERRY_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with command:
            done = host.finish(command)
        failed(done, status=1, says="cannot be used", next_step="set WHERRY_HOME to a directory")
    assert list(theirs.iterdir()) == []


def test_a_home_on_a_disk_that_is_read_only(host: FakeHost) -> None:
    place = host.directory / "frozen"
    with mounted(place, *mount_arguments("64m")):
        other = FakeHost(home=place / "home")
        try:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
            for command in (["start"], ["status"], ["delete", "-y"]):
                done = other.run(*command)
                assert done.status in (1, 3)
                assert "Traceback" not in done.stderr
                assert ";" in done.line
            failed(other.run("start"), status=1, says="Read-only", next_step="set WHERRY_HOME")
        finally:
            other.close()


def test_a_file_in_the_way_of_the_home(host: FakeHost) -> None:
    in_the_way = host.directory / "file"
    in_the_way.write_text("precious")
    done = host.run("start", WHERRY_HOME=str(in_the_way))
    failed(done, status=1, says=f"{in_the_way} cannot be used", next_step="set WHERRY_HOME")
    assert in_the_way.read_text() == "precious"


@pytest.mark.parametrize("socket", ["docker.sock", "control.sock"])
def test_a_file_in_the_way_of_a_socket(socket: str, host: FakeHost) -> None:
    host.make()
    (host.paths.directory / socket).write_text("precious")
    done = host.run("start")
    failed(done, status=1, says="something that is no socket is in the way", next_step="")
    assert (host.paths.directory / socket).read_text() == "precious"
    wait_until(lambda: not host.processes(), 5, "ended")


@pytest.mark.parametrize(
    ("behaviour", "says", "next_step"),
    [
        (
            {"refuses": "qemu: -device virtio-balloon-pci: no such thing"},
            "machine: QEMU ended before its monitor answered: qemu: -device virtio-balloon-pci",
            "qemu.log",
        ),
        (
            {
                "delay_s": 0.2,
                "last_line": "wherry: init",
                "fatal": "wherry: fatal: the data disk has no file system",
            },
            "boot: the guest stopped: the data disk has no file system",
            "wherry logs --source console",
        ),
        (
            {"last_line": "wherry: ssh", "fatal": "wherry: fatal: dockerd ended", "lives_on": True},
            "engine: the guest stopped: dockerd ended",
            "wherry logs --source",
        ),
        (
            {
                "delay_s": 0.2,
                "last_line": "wherry: init",
                "fatal": "Kernel panic - not syncing: No init found.",
            },
            "boot: the guest's kernel panicked: No init found.",
            "wherry logs --source console",
        ),
        (
            {"delay_s": 0.2, "last_line": "wherry: init", "fatal": "[   2.0] reboot: Power down"},
            "boot: the guest powered off",
            "wherry logs --source console",
        ),
    ],
)
def test_a_guest_that_gives_up(
    behaviour: dict[str, object], says: str, next_step: str, host: FakeHost
) -> None:
    host.behave(**behaviour)
    failed(host.run("start"), status=1, says=says, next_step=next_step)
    assert host.status()["state"] == "broken"
    assert says in host.status()["reason"]
    host.at_rest()


OOPS = (
    "Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\r\n"
    "Kernel panic - not syncing: Fatal exception in interrupt"
)
EARLY = {"delay_s": 0.2, "last_line": "wherry: init", "fatal": OOPS}
LATE = {"last_line": "wherry: ssh", "engine": "absent", "fatal": OOPS, "fatal_after_s": 1.0}


@pytest.mark.parametrize("boots", [[EARLY], [LATE], [EARLY, LATE, EARLY, LATE]])
def test_a_kernel_that_is_emulated_wrongly_is_booted_again(
    host: FakeHost, boots: list[dict[str, object]]
) -> None:
    """Wherever in a start it fails; what its engine is asked then, works."""
    host.behave(boots={str(number): each for number, each in enumerate(boots, 1)})
    done = host.run("start", "--accel", "tcg")
    assert done.status == 0, done.stderr
    assert host.status()["state"] == "running"
    assert host.service_log().count("booting again") == len(boots)
    assert host.run("shell", "--", "echo", "well").stdout == "well\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(host.paths.docker_socket))
        client.sendall(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert host.run("stop").status == 0
    host.at_rest()


@pytest.mark.parametrize("boot", [EARLY, LATE])
def test_one_that_always_is_fails(host: FakeHost, boot: dict[str, object]) -> None:
    host.behave(**boot)
    done = host.run("start", "--accel", "tcg")
    assert done.status == 1
    assert "kernel panicked: Fatal exception in interrupt" in done.line
    assert host.service_log().count("booting again") == 2
    host.at_rest()


def test_another_panic_of_an_emulated_kernel_is_its_own(host: FakeHost) -> None:
    host.behave(**{**LATE, "fatal": "Kernel panic - not syncing: Out of memory"})
    assert "kernel panicked: Out of memory" in host.run("start", "--accel", "tcg").line
    assert "booting again" not in host.service_log()
    host.at_rest()


def test_a_failure_is_told_when_the_machine_is_at_rest(host: FakeHost) -> None:
    host.behave(engine="absent", last_line="wherry: ssh", quit_s=1.5)
    host.make()
    with host.serve(engine_s=0.1):
        failed(host.run("start"), status=1, says="engine: nothing within", next_step="console")
        assert host.status()["state"] == "broken"


@pytest.mark.parametrize(
    ("behaviour", "bounds", "says", "next_step"),
    [
        ({"monitor": "absent"}, {"machine_s": 0.5}, "machine: QEMU's monitor did not", "qemu.log"),
        ({"monitor": "silent"}, {"machine_s": 0.5}, "machine: QEMU's monitor did not", "qemu.log"),
        ({"last_line": "wherry: init"}, {"boot_s": 0.5}, "boot: nothing within 0.5 s", "console"),
        (
            {"last_line": "wherry: ssh", "engine": "absent"},
            {"engine_s": 0.5},
            "engine: nothing within",
            "console",
        ),
        ({"engine": "sick"}, {"engine_s": 0.5}, "engine: nothing within", "console"),
    ],
)
def test_each_stage_has_a_bound_and_names_itself(
    behaviour: dict[str, object],
    bounds: dict[str, float],
    says: str,
    next_step: str,
    host: FakeHost,
) -> None:
    host.behave(**behaviour)
    host.make()
    with host.serve(**bounds) as service:
        failed(host.run("start"), status=1, says=says, next_step=next_step)
        service.wait(20)
    host.at_rest()
    assert host.status()["state"] == "broken"


NEXT_STEPS = {
    "image": "repeat the command",
    "accelerator": "wherry start --accel tcg",
    "disk": "repeat the command",
    "machine": "wherry logs",
    "adopt": "wherry stop --force",
    "boot": "wherry logs --source console",
    "tunnel": "wherry logs --source console",
    "engine": "wherry logs --source console",
    "names": "wherry logs",
    "files": "wherry sync status",
    "ports": "wherry logs",
}


def test_each_bound_is_that_of_a_stage() -> None:
    bounds = {field.name.removesuffix("_s") for field in fields(Bounds)}
    assert bounds == {*NEXT_STEPS, "guest_stop"}


@pytest.mark.parametrize("stage", NEXT_STEPS)
def test_a_stage_that_hangs_is_ended_by_its_bound(stage: str, host: FakeHost) -> None:
    """Whatever it is that does not end, also where nothing can end it."""
    host.make()
    qemu = 0
    if stage == "adopt":
        host.good("start")
        status = host.status()
        qemu = status["qemu_pid"]
        kill(status["service_pid"])
    begun = time.monotonic()
    with host.serve(stage, **{f"{stage}_s": 0.2}) as service:
        try:
            done = host.run("start")
            assert service.wait(20) == 1
        finally:
            service.kill()
    assert time.monotonic() - begun < 30
    failed(done, status=1, says="", next_step=NEXT_STEPS[stage])
    assert re.match(f"{stage}: nothing within [0-9.]+ s", done.line)
    status = host.status()
    assert status["state"] == "broken"
    assert status["reason"].startswith(f"{stage}: nothing within ")
    if qemu:
        assert status["qemu_pid"] == qemu
        host.good("stop", "--force")
    host.at_rest()


def test_a_guest_with_another_key_is_not_trusted(host: FakeHost) -> None:
    host.make()
    other = host.directory / "other_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    host.behave(host_key=str(other))
    with host.serve(tunnel_s=3.0) as service:
        failed(host.run("start"), status=1, says="tunnel: ", next_step="start it again")
        service.wait(20)
    assert "key" in host.status()["reason"]
    host.at_rest()


@pytest.mark.parametrize("name", ["user_ed25519", "host_ed25519"])
@pytest.mark.parametrize("contents", [None, b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"])
def test_a_damaged_key(name: str, contents: bytes | None, host: FakeHost) -> None:
    host.make()
    path = host.paths.keys / name
    path.unlink()
    if contents is not None:
        path.write_bytes(contents)
    failed(host.run("start"), status=1, says=f"the key {path} ", next_step="restore the file")
    host.at_rest()


def test_an_accelerator_that_hangs_is_left_after_its_bound(host: FakeHost) -> None:
    if host.layout.platform.accelerator_problem("kvm"):
        pytest.skip("needs a /dev/kvm that can be opened")
    host.behave(trial={"kvm": "hangs"})
    done = host.run("start")
    assert done.status == 0
    assert "warning: running in emulation" in done.stderr
    assert "(kvm: the trial boot did not leave the kernel within 10 s)" in done.stderr
    assert host.status()["accelerator"] == "tcg"
    host.good("stop")
    trials = len(host.calls())
    assert "running in emulation" in host.run("start").stderr
    assert len(host.calls()) == trials + 2  # the version, the machine, and no trial


def test_no_accelerator_boots(host: FakeHost) -> None:
    host.behave(trial={"kvm": "crashes", "tcg": "crashes"})
    done = host.run("start")
    failed(done, status=1, says="accelerator: QEMU 7.2.22 cannot boot", next_step="reinstall QEMU")
    host.at_rest()
    host.behave()
    host.good("start")


def test_a_context_that_cannot_be_written_leaves_the_machine_running(host: FakeHost) -> None:
    (host.directory / "docker").write_text("in the way")
    done = host.run("start")
    failed(
        done, status=1, says="docker context wherry cannot be written", next_step="DOCKER_CONFIG"
    )
    assert host.status()["state"] == "running"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["stop", "absent"], 3),
        (["status", "absent"], 3),
        (["restart", "absent"], 3),
        (["delete", "--yes", "absent"], 3),
        (["shell", "absent"], 3),
        (["ssh-config", "absent"], 3),
        (["env", "absent"], 3),
        (["logs", "absent"], 3),
        (["config", "show", "absent"], 3),
        (["config", "get", "cpus", "--machine", "absent"], 3),
        (["config", "set", "cpus", "1", "--machine", "absent"], 3),
        (["shell"], 4),
        (["ssh-config"], 4),
        (["logs", "--source", "engine"], 4),
        (["start", "a", "b"], 2),
        (["start", "--nonsense"], 2),
        (["nonsense"], 2),
        (["config", "set", "cpus"], 2),
        (["config", "set", "cpuz", "1"], 2),
        (["config", "set", "cpus", "many"], 2),
        (["config", "unset", "cpuz"], 2),
        (["config", "get", "cpuz"], 2),
        (["logs", "--source", "moon"], 2),
        (["image", "pull"], 2),
        (["image", "remove", "absent"], 1),
        (["image", "verify", "absent"], 1),
        (["logs"], 1),
    ],
)
def test_exit_statuses(arguments: list[str], status: int, host: FakeHost) -> None:
    host.make()
    done = host.run(*arguments)
    assert done.status == status, done
    assert ";" in done.line
    host.at_rest()


def test_a_file_that_cannot_be_read_is_named(host: FakeHost) -> None:
    host.make()
    host.paths.service_log.mkdir()
    for command in ("logs", "start"):
        failed(host.run(command), status=1, says=str(host.paths.service_log), next_step="writ")
    wait_until(lambda: not host.processes(), 5, "ended")


@pytest.mark.parametrize("arguments", [[], ["config"], ["image"]])
def test_a_command_alone_shows_its_help(arguments: list[str], host: FakeHost) -> None:
    done = host.run(*arguments)
    assert done.status == 2
    assert done.stderr.startswith("Usage: wherry")


def test_a_reader_that_leaves_is_no_failure_worth_a_word(host: FakeHost) -> None:
    host.make()
    command = host.spawn("config", "show")
    assert command.stdout is not None
    command.stdout.close()
    assert command.stderr is not None
    assert command.stderr.read() == b""
    assert command.wait(20) == 1
    command.stderr.close()


def test_the_fakes_are_where_they_are_looked_for() -> None:
    assert (SUPPORT / "fake_guest.py").exists()
