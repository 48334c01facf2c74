"""What the guest does at boot that only a boot can show."""

from __future__ import annotations

import subprocess

import pytest
from sandbox import Sandbox

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.vm.image import Image, installed

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


def test_a_disk_with_foreign_contents_is_refused_and_kept(
    sandbox: Sandbox, guest_image: Image
) -> None:
    """A disk that is not ours may be the user's only copy of something."""
    sandbox.wherry("start", "foreign", "--cpus", "2", "--memory", "1GiB", "--disk", "1GiB")
    sandbox.wherry("stop", "foreign")
    data = sandbox.home / "machines" / "foreign" / "data.qcow2"
    raw = sandbox.home / "foreign.raw"
    content = b"not a file system of ours".ljust(1 << 20, b"\x5a")
    raw.write_bytes(content)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, data], check=True)
    subprocess.run(["qemu-img", "resize", "-q", data, "1G"], check=True)

    done = sandbox.wherry("start", "foreign", check=False)

    assert done.returncode == 1
    assert b"data disk" in done.stderr
    assert done.stderr.count(b"\n") == 1
    subprocess.run(["qemu-img", "convert", "-O", "raw", data, raw], check=True)
    assert raw.read_bytes()[: len(content)] == content
    sandbox.wherry("delete", "--yes", "foreign")


@pytest.mark.slow
def test_an_arm64_guest_boots_in_emulation(sandbox: Sandbox) -> None:
    """The other architecture comes from the same recipe and answers as well."""
    platform = current()
    other = "aarch64" if platform.architecture() == "x86_64" else "x86_64"
    images = [each for each in installed(Layout.current(platform)) if each.architecture == other]
    if not images:
        sandbox.wherry("image", "build", "--arch", other, timeout=600)
        images = [
            each for each in installed(Layout.current(platform)) if each.architecture == other
        ]
    sandbox.wherry("start", "other", "--image", images[0].name, "--cpus", "2", "--memory", "2GiB")
    try:
        said = sandbox.docker("info", "--format", "{{.Architecture}}", name="wherry-other").stdout
        assert said.decode().strip() == other
    finally:
        sandbox.wherry("delete", "--yes", "other")
