"""The data disk, with the real qemu-img."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from wherry.vm import disk

QEMU_IMG = Path(shutil.which("qemu-img") or "qemu-img")
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "data.qcow2"
    disk.create(path, 64 << 20, qemu_img=QEMU_IMG)
    (tmp_path / "data.new").touch()
    return path


def may_format(path: Path) -> bool:
    return disk.may_format(path, path.with_name("data.new"), qemu_img=QEMU_IMG)


def put(path: Path, offset: str) -> None:
    argv = ["qemu-io", "-f", "qcow2", "-c", f"write {offset} 64k", path]
    subprocess.run(argv, check=True, capture_output=True)


@needs_qemu_img
def test_a_new_disk_may_be_formatted_until_it_is(made: Path) -> None:
    """However often that is interrupted."""
    assert may_format(made)
    put(made, "0")
    assert may_format(made)
    made.with_name("data.new").unlink()
    assert not may_format(made)


@needs_qemu_img
def test_what_took_its_place_while_it_was_formatted_stays(made: Path) -> None:
    assert may_format(made)
    other = made.with_name("other")
    disk.create(other, 64 << 20, qemu_img=QEMU_IMG)
    other.replace(made)
    assert not may_format(made)


@needs_qemu_img
@pytest.mark.parametrize("offset", ["0", "2M", "63M"])
def test_what_somebody_put_on_a_new_disk_stays(made: Path, offset: str) -> None:
    put(made, offset)
    assert not may_format(made)
    assert not may_format(made)


@needs_qemu_img
def test_a_disk_that_came_from_elsewhere_is_not_new(tmp_path: Path) -> None:
    path = tmp_path / "data.qcow2"
    disk.create(path, 64 << 20, qemu_img=QEMU_IMG)
    assert not may_format(path)
