"""What the guest does at boot that only a boot can show, on machines of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sandbox import Sandbox, wait_until

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.vm.image import Image
from wherry_images.build import version_to_build

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory, on a small disk of its own where that can be had."""
    made = tmp_path_factory.mktemp("small")
    if os.getuid() != 0:
        yield made
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100m", "none", made], check=True)
    yield made
    subprocess.run(["umount", "--lazy", made], check=True)


@pytest.fixture(scope="module")
def small(place: Path, guest_image: Image) -> Iterator[Sandbox]:
    """A machine of its own, whose disk the tests maltreat one after another; it runs."""
    sandbox = Sandbox(place)
    sandbox.wherry("start", "--cpus", "2", "--memory", "1GiB", "--disk", "1GiB")
    sandbox.wherry("shell", "--", "sh", "-c", "echo precious >/data/kept; sync")
    yield sandbox
    sandbox.stop_all()


def data_disk(sandbox: Sandbox) -> Path:
    return sandbox.home / "machines" / "default" / "data.qcow2"


@contextlib.contextmanager
def raw_disk(sandbox: Sandbox, directory: Path) -> Iterator[Path]:
    """Let the data disk of a stopped machine be changed as a raw one."""
    raw, data = directory / "data.raw", data_disk(sandbox)
    subprocess.run(["qemu-img", "convert", "-O", "raw", data, raw], check=True)
    yield raw
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, data], check=True)


def file_system(sandbox: Sandbox) -> int:
    """Return the bytes that the data disk's file system has."""
    said = sandbox.wherry("shell", "--", "stat", "-f", "-c", "%b %S", "/data").stdout
    blocks, size = map(int, said.split())
    return blocks * size


def edit(raw: Path, *commands: str) -> None:
    """Change a file system behind its back."""
    for command in commands:
        subprocess.run(["debugfs", "-w", "-R", command, raw], check=True, capture_output=True)


def is_whole(raw: Path) -> bool:
    return subprocess.run(["e2fsck", "-fn", raw], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_an_arm64_guest_boots_in_emulation(small: Sandbox, tmp_path: Path) -> None:
    """The other architecture comes from the same recipe, answers, and runs this one's programs."""
    platform = current()
    other = "aarch64" if platform.architecture() == "x86_64" else "x86_64"
    # The recipe's own: one that is there already may be of an earlier recipe.
    sandbox = Sandbox(tmp_path)
    said = sandbox.wherry("image", "build", "--arch", other, timeout=900).stdout.decode()
    image = said.removeprefix("Image ").partition(" ")[0].rstrip(":")
    assert image == f"{version_to_build(other)}-{other}"
    sandbox.wherry("start", "other", "--image", image, "--cpus", "2", "--memory", "2GiB")
    try:
        said = sandbox.docker("info", "--format", "{{.Architecture}}", name="wherry-other").stdout
        assert said.decode().strip() == other
        native = small.wherry("shell", "--", "cat", "/usr/bin/busybox").stdout
        (tmp_path / "busybox").write_bytes(native)
        (tmp_path / "busybox").chmod(0o755)
        (tmp_path / "Dockerfile").write_text(
            "FROM scratch\nCOPY busybox /bin/busybox\n"
            'RUN ["/bin/busybox", "sh", "-c", "/bin/busybox uname -m >/machine"]\n'
            'CMD ["/bin/busybox", "sh", "-c", "/bin/busybox cat /machine; /bin/busybox uname -m"]\n'
        )
        foreign = f"--platform=linux/{'amd64' if other == 'aarch64' else 'arm64'}"
        context = ("build", "-q", foreign, "-t", "foreign", str(tmp_path))
        sandbox.docker(*context, name="wherry-other")
        said = sandbox.docker("run", "--rm", foreign, "foreign", name="wherry-other").stdout
        assert said.decode().split() == [platform.architecture()] * 2
    finally:
        sandbox.stop_all()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small disk")
def test_a_guest_waits_for_space_on_the_computers_disk(small: Sandbox, place: Path) -> None:
    """It loses nothing: what it wrote meanwhile is there afterwards."""
    qemu = small.status()["qemu_pid"]
    filler = place / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(place)
        os.posix_fallocate(file.fileno(), 0, (free.f_bavail - 2048) * free.f_frsize)
    write = "yes 0123456789 | head -c 64M >/data/big; sync; touch /data/written"
    small.wherry("shell", "--", "sh", "-c", f"nohup sh -c '{write}' >/dev/null 2>&1 &")
    wait_until(lambda: "disk is full" in small.status()["reason"], 120, "status tells it")
    status = small.status()
    assert (status["state"], status["qemu_pid"]) == ("running", qemu)
    assert b"disk is full" in small.wherry("stop", check=False).stderr
    filler.unlink()
    wait_until(lambda: small.status()["reason"] == "", 60, "the guest goes on")
    check = (
        "while [ ! -e /data/written ]; do sleep 0.2; done; sha256sum </data/big; rm /data/big; "
        "dmesg | grep -ci 'i/o error'"
    )
    said = small.wherry("shell", "--", "timeout", "100", "sh", "-c", check, check=False).stdout
    big = (b"0123456789\n" * (64 << 20))[: 64 << 20]
    assert said.decode().split() == [hashlib.sha256(big).hexdigest(), "-", "0"]
    # What it frees, the computer gets back.
    taken = data_disk(small).stat().st_blocks * 512
    small.wherry("shell", "--", "sh", "-c", "sync; fstrim /data")
    wait_until(
        lambda: data_disk(small).stat().st_blocks * 512 < taken - (32 << 20), 30, "it is smaller"
    )
    assert small.status()["qemu_pid"] == qemu


def test_a_damaged_disk_is_mended_and_kept_by_another_image(
    small: Sandbox, guest_image: Image, tmp_path: Path
) -> None:
    before = file_system(small)
    small.wherry("stop")
    with raw_disk(small, tmp_path) as raw:
        # As after a crash of the computer: counts that are wrong.
        edit(raw, "sif /kept blocks 100", "sif /kept links_count 3", "ssv state 2")
        assert not is_whole(raw)
    images = small.home / "images"
    images.unlink()
    copy = images / guest_image.name.replace(guest_image.version, "2030.01.01")
    shutil.copytree(guest_image.directory, copy, ignore=shutil.ignore_patterns("clients"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["version"] = "2030.01.01"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    small.wherry("config", "set", "disk", "1060MiB")

    small.wherry("start")

    assert small.status()["image"]["version"] == "2030.01.01"
    # The file system grows with the disk, after the start if need be.
    wait_until(lambda: file_system(small) > before + (30 << 20), 30, "it has grown")
    assert small.wherry("shell", "--", "cat", "/data/kept").stdout == b"precious\n"
    small.wherry("stop")
    with raw_disk(small, tmp_path) as raw:
        assert is_whole(raw)


def test_a_disk_that_only_a_person_can_mend_is_left_alone(small: Sandbox, tmp_path: Path) -> None:
    with raw_disk(small, tmp_path) as raw:
        edit(raw, "clri /docker", "ssv state 2")
    done = small.wherry("start", check=False)
    assert done.returncode == 1
    assert b"the check of the data disk failed: " in done.stderr
    assert done.stderr.count(b"\n") == 1
    with raw_disk(small, tmp_path) as raw:
        assert b"precious" in subprocess.check_output(["debugfs", "-R", "cat /kept", raw])


@pytest.mark.parametrize("offset", [0, 2 << 20])
def test_a_disk_with_foreign_contents_is_refused_and_kept(
    small: Sandbox, tmp_path: Path, offset: int
) -> None:
    """A disk that is not ours may be the user's only copy of something."""
    content = b"not a file system of ours".ljust(1 << 20, b"\x5a")
    with raw_disk(small, tmp_path) as raw, raw.open("r+b") as file:
        file.truncate(0)
        file.truncate(1 << 30)
        file.seek(offset)
        file.write(content)

    done = small.wherry("start", check=False)

    assert done.returncode == 1
    assert b"data disk" in done.stderr
    assert done.stderr.count(b"\n") == 1
    with raw_disk(small, tmp_path) as raw, raw.open("rb") as file:
        file.seek(offset)
        assert file.read(len(content)) == content


def test_a_first_format_that_is_interrupted_is_done_again(
    guest_image: Image, tmp_path: Path
) -> None:
    """On the same file alone: what came in its place meanwhile may be somebody's."""
    sandbox = Sandbox(tmp_path)
    paths = Layout(sandbox.home, current()).machine("default")
    data, mark, aside = paths.data_disk, paths.new_disk, paths.directory / "aside"
    try:
        kill_while_it_formats(sandbox, data)
        assert not is_ext4(data, tmp_path)
        begun = mark.read_bytes()
        assert begun

        data.rename(aside)
        shutil.copy(aside, data)
        done = sandbox.wherry("start", check=False)
        assert done.returncode == 1
        assert b"boot: the guest stopped: the data disk " in done.stderr
        assert b"it is left as it is" in done.stderr
        subprocess.run(["qemu-img", "compare", aside, data], check=True)

        aside.rename(data)
        mark.write_bytes(begun)
        with subprocess.Popen(START, env=sandbox.env, stderr=subprocess.DEVNULL):
            wait_until(lambda: not mark.exists(), 120, "the disk is the guest's")
            sandbox.wherry("stop", "--force")
        assert is_ext4(data, tmp_path)
    finally:
        sandbox.stop_all()


START = [sys.executable, "-m", "wherry", "start"]
_STEP_S = 0.005


def kill_while_it_formats(sandbox: Sandbox, data: Path) -> None:
    """Start a machine for the first time, and kill QEMU once something is on its data disk."""
    command = [*START, "--cpus", "2", "--memory", "1GiB"]
    with subprocess.Popen(command, env=sandbox.env, stderr=subprocess.PIPE) as start:
        try:
            wait_until(
                lambda: data.exists() and sandbox.status()["qemu_pid"], 120, "QEMU has started"
            )
            qemu = psutil.Process(sandbox.status()["qemu_pid"])
            empty = data.stat().st_blocks
            end = time.monotonic() + 120
            while data.stat().st_blocks == empty:
                assert time.monotonic() < end
                assert start.poll() is None
            # To look takes its time, in which all could be done.
            qemu.suspend()
            # Then step by step, since what is there is to be no file system yet.
            while not has_data(data):
                assert time.monotonic() < end
                qemu.resume()
                time.sleep(_STEP_S)
                qemu.suspend()
            qemu.kill()
            assert start.stderr is not None
            assert b"boot: " in start.stderr.read()
            assert start.wait(60) == 1
        finally:
            start.kill()


def has_data(disk: Path) -> bool:
    """Return whether something is on a disk that QEMU perhaps has open."""
    command = ["qemu-img", "map", "-U", "--output=json", disk]
    extents = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return any(each["data"] for each in extents)


def is_ext4(disk: Path, directory: Path) -> bool:
    """Return whether there is a whole file system on a disk; its journal may be full."""
    raw = directory / "data.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
    found = subprocess.run(["dumpe2fs", "-h", raw], capture_output=True)
    checked = subprocess.run(["e2fsck", "-p", raw], capture_output=True)
    raw.unlink()
    # 1 is "errors corrected" (e2fsck(8)).
    return found.returncode == 0 and checked.returncode <= 1
