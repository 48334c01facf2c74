"""QEMU's arguments, programs, trial of accelerators and the text of its monitor."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from wherry.core.errors import WherryError
from wherry.vm import image
from wherry.vm.driver import MachineSpec
from wherry.vm.image import Image
from wherry.vm.qemu import probe, programs, qmp
from wherry.vm.qemu.arguments import arguments, processor
from wherry.vm.qemu.driver import QemuDriver
from wherry.vm.qemu.qmp import HostForward, host_forwards

X86_BOARD = "q35,hpet=off,vmport=off,smbus=off,sata=off,i8042=off,usb=off"
ARM_BOARD = "virt"
TCG = "tcg,thread=multi,tb-size=512"


def spec(architecture: str, accelerator: str, directory: str = "/m") -> MachineSpec:
    at = Path(directory)
    return MachineSpec(
        name="dev",
        image=Image(at / "image", "1", architecture, "28.5.2", "quiet", {}),
        cpus=3,
        memory_bytes=(1 << 30) + (1 << 19),
        accelerator=accelerator,
        data_disk=at / "data.qcow2",
        console_log=at / "console.log",
        qmp_socket=at / "qmp.sock",
        firmware_files={"machine.json": at / "machine.json", "host_key": at / "keys/host"},
    )


def test_the_guest_is_told_of_a_new_disk_alone() -> None:
    used, new = (arguments(replace(spec("x86_64", "kvm"), new_disk=each)) for each in (False, True))
    assert "wherry.new_disk" not in " ".join(used)
    assert "quiet wherry.new_disk console=ttyS0" in new


def test_paths_of_windows_are_passed_as_they_are() -> None:
    home = PureWindowsPath(r"C:\Users\A, B\wherry")
    argv = arguments(
        replace(
            spec("x86_64", "whpx"),
            qmp_socket=cast(Path, home / "qmp.sock"),
            data_disk=cast(Path, home / "data.qcow2"),
        )
    )
    monitor = argv[argv.index("-qmp") + 1]
    assert monitor == r"unix:C:\Users\A,, B\wherry\qmp.sock,server=on,wait=off"
    assert any(r"filename=C:\Users\A,, B\wherry\data.qcow2," in word for word in argv)


@pytest.mark.parametrize(
    ("architecture", "accelerator", "board", "accel", "cpu", "serial"),
    [
        ("x86_64", "kvm", X86_BOARD, "kvm", "host", "ttyS0"),
        ("x86_64", "hvf", X86_BOARD, "hvf", "host", "ttyS0"),
        (
            "x86_64",
            "whpx",
            X86_BOARD,
            "whpx",
            "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes",
            "ttyS0",
        ),
        ("x86_64", "tcg", X86_BOARD, TCG, "max,erms=off,la57=off", "ttyS0"),
        ("aarch64", "kvm", ARM_BOARD, "kvm", "host", "ttyAMA0"),
        ("aarch64", "hvf", ARM_BOARD, "hvf", "host", "ttyAMA0"),
        ("aarch64", "tcg", ARM_BOARD, TCG, "cortex-a57", "ttyAMA0"),
    ],
)
def test_the_whole_command_line(
    architecture: str, accelerator: str, board: str, accel: str, cpu: str, serial: str
) -> None:
    randomisation = " norandmaps" if accelerator == "tcg" else ""
    # fmt: off
    assert arguments(spec(architecture, accelerator)) == [
        "-no-user-config",
        "-nodefaults",
        "-display", "none",
        "-vga", "none",
        "-parallel", "none",
        "-machine", board,
        "-accel", accel,
        "-cpu", cpu,
        "-smp", "3",
        "-m", "1024M",
        "-no-reboot",
        "-kernel", "/m/image/kernel",
        "-initrd", "/m/image/initrd",
        "-append", f"quiet{randomisation} console={serial}",
        "-name", "wherry-dev",
        "-no-shutdown",
        "-rtc", "base=utc",
        "-chardev", "file,id=console,path=/m/console.log",
        "-serial", "chardev:console",
        "-qmp", "unix:/m/qmp.sock,server=on,wait=off",
        "-blockdev", "driver=file,node-name=root-file,filename=/m/image/root,read-only=on",
        "-blockdev", "driver=raw,node-name=root,file=root-file,read-only=on",
        "-device", "virtio-blk-pci,drive=root,serial=wherry-root",
        "-blockdev", "driver=file,node-name=data-file,filename=/m/data.qcow2,discard=unmap",
        "-blockdev",
        "driver=qcow2,node-name=data,file=data-file,discard=unmap,detect-zeroes=unmap",
        "-device", "virtio-blk-pci,drive=data,serial=wherry-data",
        "-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22",
        "-device", "virtio-net-pci,netdev=net0,romfile=",
        "-device", "virtio-balloon-pci,free-page-reporting=on",
        "-device", "virtio-rng-pci",
        "-fw_cfg", "name=opt/wherry/host_key,file=/m/keys/host",
        "-fw_cfg", "name=opt/wherry/machine.json,file=/m/machine.json",
    ]
    # fmt: on


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_an_image_with_the_add_on_gets_one_disk_more(architecture: str) -> None:
    without = spec(architecture, "kvm")
    files = {"emulation": (1, "")}
    with_it = replace(without, image=replace(without.image, files=files))
    more = [
        "-blockdev",
        "driver=file,node-name=emulation-file,filename=/m/image/emulation,read-only=on",
        "-blockdev",
        "driver=raw,node-name=emulation,file=emulation-file,read-only=on",
        "-device",
        "virtio-blk-pci,drive=emulation,serial=wherry-emulation",
    ]
    said = arguments(with_it)
    # Behind all other devices, so that none of them changes its place.
    at = said.index("-fw_cfg")
    assert said[at - len(more) : at] == more
    assert said[: at - len(more)] + said[at:] == arguments(without)


def test_commas_in_paths_are_doubled_where_options_are_split() -> None:
    said = arguments(spec("x86_64", "tcg", "/a,b"))
    for option in ("-chardev", "-qmp", "-blockdev", "-fw_cfg"):
        values = [said[n + 1] for n, word in enumerate(said) if word == option]
        assert not any("/a,b" in value for value in values)
    assert "unix:/a,,b/qmp.sock,server=on,wait=off" in said
    # These are whole arguments, which QEMU does not split.
    assert said[said.index("-kernel") + 1] == "/a,b/image/kernel"


def test_whpx_never_asks_for_the_hosts_processor_on_x86() -> None:
    assert processor("whpx", "x86_64") != "host"


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "7.2.22"),
        ("QEMU emulator version 10.0.2 (qemu-10.0.2-1.fc42)", "10.0.2"),
        ("QEMU emulator version 9.2.0 (v9.2.0-12086-g26f8a0ba)", "9.2.0"),
        ("QEMU emulator version 8.2", "8.2"),
        ("QEMU emulator version 9.1.0-rc3", "9.1.0"),
        ("warning: something\nQEMU emulator version 7.2.0", "7.2.0"),
    ],
)
def test_versions_of_qemu(said: str, version: str, programs: Any, host: Any) -> None:
    programs.install("qemu-system-x86_64", f"cat <<'END'\n{said}\nEND")
    programs.install("qemu-img", "")
    programs.directory.joinpath("cat").symlink_to("/bin/cat")
    found = find("x86_64", host)
    assert found.version == version
    assert found.system == programs.directory / "qemu-system-x86_64"
    assert found.img == programs.directory / "qemu-img"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo QEMU emulator version 7.1.9", r"QEMU 7\.1\.9 .* is too old: 7\.2 is needed"),
        ("echo QEMU emulator version 6.10.0", "is too old"),
        ("echo it works", "does not tell its version"),
        ("exit 0", "does not tell its version"),
        ("echo 'libfoo.so: not found' >&2; exit 127", "failed with status 127: libfoo"),
    ],
)
def test_a_qemu_that_cannot_be_used(script: str, said: str, programs: Any, host: Any) -> None:
    programs.install("qemu-system-x86_64", script)
    programs.install("qemu-img", "")
    with pytest.raises(WherryError, match=said) as caught:
        find("x86_64", host)
    assert "apt install qemu-system" in caught.value.hint


def test_no_qemu(programs: Any, host: Any) -> None:
    with pytest.raises(
        WherryError, match=r"qemu-system-x86_64 is not on PATH: .*; install it with"
    ):
        find("x86_64", host)
    programs.install("qemu-system-x86_64", "")
    with pytest.raises(WherryError, match="qemu-img is not on PATH"):
        find("x86_64", host)
    with pytest.raises(WherryError, match="qemu-system-aarch64 is not on PATH"):
        find("aarch64", host)


find = programs.find

BOOTS = "echo; echo 'wherry: init'; exec /bin/sleep 60"
HANGS = "echo Booting; exec /bin/sleep 60"
CRASHES = "echo 'qemu: could not access KVM' >&2; exit 1"


class Trials:
    """A fake QEMU for each accelerator, and the cache of one host."""

    def __init__(self, directory: Path, programs: Any, host: Any, tried: Image) -> None:
        self.host, self.image = host, tried
        self.cache = directory / "accelerators.json"
        self._programs = programs

    def choose(self, *, version: str = "7.2.0", **scripts: str) -> probe.Verdict:
        cases = "".join(f"*' -accel {name}'*) {script};;\n" for name, script in scripts.items())
        system = self._programs.install(
            "qemu-system-x86_64", f'case " $*" in\n{cases}*) exit 9;; esac'
        )
        found = programs.Programs(system, system, version)
        return asyncio.run(probe.choose(found, self.image, self.host, self.cache))

    @property
    def tried(self) -> list[str]:
        """The accelerators of all trials until now."""
        return [
            words[words.index("-accel") + 1].split(",")[0]
            for words in (line.split() for line in self._programs.calls)
        ]


@pytest.fixture
def trials(
    tmp_path: Path, programs: Any, host: Any, make_image: Any, monkeypatch: pytest.MonkeyPatch
) -> Trials:
    monkeypatch.setattr(probe, "_POLL_S", 0.005)
    return Trials(tmp_path, programs, host, image.read(make_image()))


def test_the_fastest_accelerator_that_boots_is_taken_and_kept(trials: Trials) -> None:
    verdict = trials.choose(kvm=BOOTS, tcg=BOOTS)
    assert (verdict.accelerator, verdict.warning) == ("kvm", "")
    assert trials.choose(kvm=CRASHES, tcg=CRASHES).accelerator == "kvm"
    assert trials.tried == ["kvm"]


def test_the_trial_boots_the_probe_and_no_disk(trials: Trials, programs: Any) -> None:
    trials.choose(kvm=BOOTS, tcg=BOOTS)
    (call,) = programs.calls
    assert f"-initrd {trials.image.probe}" in call
    assert "-blockdev" not in call
    assert "-netdev" not in call


def test_an_accelerator_that_hangs_costs_its_bound_once(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_BOUND_HARDWARE_S", 0.1)
    for _ in range(2):
        verdict = trials.choose(kvm=HANGS, tcg=BOOTS)
        assert verdict.accelerator == "tcg"
        assert verdict.warning == (
            "running in emulation, many times slower than with acceleration "
            "(kvm: the trial boot did not leave the kernel within 0.1 s)"
        )
    assert trials.tried == ["kvm", "tcg"]


def test_an_accelerator_that_crashes_is_told_with_its_reason(trials: Trials) -> None:
    verdict = trials.choose(kvm=CRASHES, tcg=BOOTS)
    assert verdict.accelerator == "tcg"
    assert "kvm: the trial boot failed: qemu: could not access KVM" in verdict.warning
    silent = trials.choose(version="8.0.0", kvm="exit 0", tcg=BOOTS)
    assert "QEMU said nothing" in silent.warning


def test_another_qemu_or_processor_is_tried_anew(trials: Trials) -> None:
    trials.choose(kvm=CRASHES, tcg=BOOTS)
    assert trials.choose(version="9.0.0", kvm=BOOTS, tcg=BOOTS).accelerator == "kvm"
    trials.host.cpu_model = lambda: "Another Processor"
    assert trials.choose(version="9.0.0", kvm=BOOTS, tcg=BOOTS).accelerator == "kvm"
    assert trials.tried == ["kvm", "tcg", "kvm", "kvm"]


def test_permissions_are_asked_each_time(trials: Trials) -> None:
    trials.host.problems["kvm"] = "/dev/kvm may not be opened"
    verdict = trials.choose(kvm=BOOTS, tcg=BOOTS)
    assert "kvm: /dev/kvm may not be opened" in verdict.warning
    trials.host.problems.clear()
    assert trials.choose(kvm=BOOTS, tcg=BOOTS).accelerator == "kvm"


def test_a_foreign_architecture_is_emulated_without_a_trial_of_the_rest(trials: Trials) -> None:
    trials.host.machine = "aarch64"
    verdict = trials.choose(kvm=BOOTS, tcg=BOOTS)
    assert verdict.accelerator == "tcg"
    assert "this computer is not x86_64" in verdict.warning
    assert trials.tried == ["tcg"]


def test_when_nothing_boots_the_next_start_tries_again(trials: Trials) -> None:
    with pytest.raises(WherryError, match=r"QEMU 7\.2\.0 cannot boot.*kvm: .*; tcg: .*verify"):
        trials.choose(kvm=CRASHES, tcg=CRASHES)
    assert trials.choose(kvm=BOOTS, tcg=BOOTS).accelerator == "kvm"


def test_no_line_of_a_trial_is_written_over(trials: Trials) -> None:
    """As it is if the console is a file whose position QEMU shares with whoever reads it."""
    ends_at_once = f"""exec {sys.executable} -c "
import contextlib, os
for line in b'wherry: init\\n', b'reboot: Power down\\n':
    os.write(1, line)
    with contextlib.suppress(OSError):
        os.lseek(1, 0, os.SEEK_SET)
" """
    assert trials.choose(tcg=ends_at_once, kvm=CRASHES).accelerator == "tcg"


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"QEMU 7.2.0, x86_64 on A Processor": 5}'])
def test_a_damaged_cache_is_made_anew(damage: str, trials: Trials) -> None:
    trials.cache.write_text(damage)
    assert trials.choose(kvm=CRASHES, tcg=BOOTS).accelerator == "tcg"
    (kept,) = json.loads(trials.cache.read_text()).values()
    assert kept["kvm"]["problem"].startswith("the trial boot failed: ")
    assert kept["tcg"]["problem"] is None


def test_a_failure_is_believed_for_a_day(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    assert trials.choose(kvm=CRASHES, tcg=BOOTS).accelerator == "tcg"
    monkeypatch.setattr("time.time", lambda: now + 23 * 3600)
    assert trials.choose(kvm=BOOTS, tcg=BOOTS).accelerator == "tcg"
    monkeypatch.setattr("time.time", lambda: now + 25 * 3600)
    assert trials.choose(kvm=BOOTS, tcg=BOOTS).accelerator == "kvm"
    assert trials.tried == ["kvm", "tcg", "kvm"]
    # What works goes on being believed, and a clock that was set back proves nothing.
    monkeypatch.setattr("time.time", lambda: now + 1000 * 24 * 3600)
    assert trials.choose(kvm=CRASHES, tcg=CRASHES).accelerator == "kvm"


def test_a_failure_from_the_future_is_not_believed(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.choose(kvm=CRASHES, tcg=BOOTS)
    before = time.time() - 7 * 24 * 3600
    monkeypatch.setattr("time.time", lambda: before)
    assert trials.choose(kvm=BOOTS, tcg=BOOTS).accelerator == "kvm"


def test_a_failure_that_was_kept_without_its_time_is_not_believed(trials: Trials) -> None:
    trials.cache.write_text('{"QEMU 7.2.0, x86_64 on A Processor": {"kvm": "hung", "tcg": null}}')
    assert trials.choose(kvm=BOOTS, tcg=BOOTS).accelerator == "kvm"


TRIAL = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from wherry.platform import current
from wherry.vm.qemu import probe, programs
fake = Path(sys.argv[1])
image = SimpleNamespace(architecture="x86_64", kernel=fake, probe=fake, cmdline="")
found = programs.Programs(fake, fake, "7.2.0")
asyncio.run(probe.trial(found, image, current(), "tcg"))
"""


def test_a_trial_dies_with_whoever_made_it(tmp_path: Path, programs: Any) -> None:
    pid_file = tmp_path / "pid"
    system = programs.install("qemu-system-x86_64", f"echo $$ >{pid_file}\n{HANGS}")
    pid_file.touch()
    with subprocess.Popen([sys.executable, "-c", TRIAL, str(system)]) as maker:
        try:
            eventually(pid_file.read_text)
            qemu = psutil.Process(int(pid_file.read_text()))
            assert qemu.is_running()
        finally:
            maker.kill()
    _, alive = psutil.wait_procs([qemu], timeout=10)
    for each in alive:
        each.kill()
    assert not alive


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


# What QEMU 7.2 answers; -monitor and QMP end lines with CR LF.
USERNET = """\
Hub -1 (net0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]   9       127.0.0.1 18080       10.0.2.15    80     0     0\r
  TCP[ESTABLISHED]   14       127.0.0.1 33501       10.0.2.15    22     0     0\r
  TCP[HOST_FORWARD]   3       127.0.0.1 33501       10.0.2.15    22     0     0\r
  UDP[HOST_FORWARD]   8               *  5353       10.0.2.15    53     0     0\r
  UDP[236 sec]       29       10.0.2.15 41012        10.0.2.3    53     0     0\r
"""


def test_forwards_are_read_from_the_monitor() -> None:
    assert host_forwards(USERNET) == [
        HostForward("tcp", "127.0.0.1", 18080, 80, "10.0.2.15"),
        HostForward("tcp", "127.0.0.1", 33501, 22, "10.0.2.15"),
        HostForward("udp", "0.0.0.0", 5353, 53, "10.0.2.15"),
    ]
    assert host_forwards("") == []
    assert host_forwards("unknown command: 'info usernet'\r\n") == []


@pytest.mark.parametrize(
    ("reasons", "powered_off"),
    [(["guest-shutdown"], True), (["guest-reset"], False), (["host-signal"], False), ([], False)],
)
def test_only_a_guest_that_shuts_down_by_itself_has_powered_off(
    reasons: list[str], powered_off: bool, tmp_path: Path, host: Any
) -> None:
    """What ends otherwise while that is expected has not written all to its disks, perhaps."""

    async def ended() -> Any:
        driver = QemuDriver(tmp_path / "qemu.log", host)
        driver.expect_shutdown()
        for reason in reasons:
            driver._on_event("SHUTDOWN", {"reason": reason})
        return await driver._await_exit(cast("Any", SimpleNamespace(wait=gone)))

    async def gone() -> str:
        return "QEMU ended"

    found = asyncio.run(ended())
    assert (found.expected, found.powered_off) == (True, powered_off)


def test_a_monitor_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits as long as QEMU does not read what is still to be written."""
    monkeypatch.setattr(qmp, "_CLOSE_TIMEOUT_S", 0.05)
    ended = []

    async def disconnect(client: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(client)

    monkeypatch.setattr(qmp.QMPClient, "disconnect", disconnect)
    asyncio.run(asyncio.wait_for(qmp.Monitor("test", lambda name, data: None).close(), 5))
    assert len(ended) == 1
