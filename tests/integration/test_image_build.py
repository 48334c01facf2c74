"""Building an image for real: by whom, on a disk that fills, and the same each time."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fake_host import FakeHost, mount_arguments, mounted

from wherry.core.files import sha256
from wherry.platform import current
from wherry.vm.image import BOOT_FILES, Image
from wherry_images.build import NEEDED_BYTES
from wherry_images.lock import LockedPackage

LARGEST_BOOT_BYTES = 150_000_000

PROGRAM = "#!/bin/sh\n"

AS_A_USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
"""What root may do is left behind, and programs see another user; files stay within reach."""

UNPACK = """
import sys
from pathlib import Path
from wherry_images.lock import LockedPackage
from wherry_images.tree import unpack

name, sha256, size, cache, target = sys.argv[1:]
package = LockedPackage(name, "1", "debian", "", int(size), sha256)
unpack([package], Path(cache), "all", Path(target))
"""


@pytest.fixture(scope="module", autouse=True)
def debian() -> None:
    """Skip, and say why, where no image can be built."""
    for program in ("mmdebstrap", "dpkg-deb", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if subprocess.run([*AS_A_USER, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces")


APT = ("etc/apt", "var/lib/apt", "var/cache/apt")
"""What apt leaves, which names the directory it ran in; a build removes it."""


def tree(directory: Path) -> list[tuple[str, str, str]]:
    """Return all paths below a directory with their modes and contents, but for apt's."""
    found = []
    for path in sorted(directory.rglob("*")):
        if str(path.relative_to(directory)).startswith(APT):
            continue
        mode = path.lstat().st_mode
        contents = str(path.readlink()) if path.is_symlink() else ""
        if stat.S_ISREG(mode):
            contents = sha256(path)
        found.append((str(path.relative_to(directory)), stat.filemode(mode), contents))
    return found


@pytest.fixture
def package(tmp_path: Path) -> LockedPackage:
    """A package with all that an ordinary user cannot unpack, in the cache ``tmp_path/cache``."""
    contents = tmp_path / "contents"
    (contents / "DEBIAN").mkdir(parents=True)
    (contents / "DEBIAN/control").write_text(
        "Package: strange\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\n"
        "Description: strange\n"
    )
    (contents / "usr/bin").mkdir(parents=True)
    (contents / "usr/bin/program").write_text(PROGRAM)
    (contents / "usr/bin/program").chmod(0o4775)
    (contents / "usr/bin/link").symlink_to("/etc/passwd")
    (contents / "var/shared").mkdir(parents=True)
    (contents / "var/shared").chmod(0o3777)
    cache = tmp_path / "cache"
    cache.mkdir()
    made = cache / "made.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", contents, made], check=True, capture_output=True
    )
    found = LockedPackage("strange", "1", "debian", "", made.stat().st_size, sha256(made))
    made.rename(cache / found.file_name)
    return found


def test_packages_unpack_the_same_for_every_user(tmp_path: Path, package: LockedPackage) -> None:
    # No directory that others may enter, as a home is.
    place = tmp_path / "private"
    place.mkdir(mode=0o700)
    for prefix, name in (((), "ours"), (AS_A_USER, "theirs")):
        subprocess.run(
            [
                *(*prefix, sys.executable, "-c", UNPACK),
                *(package.name, package.sha256, str(package.size)),
                *(tmp_path / "cache", place / name),
            ],
            check=True,
            timeout=60,
        )
    found = tree(place / "ours")
    assert found == tree(place / "theirs")
    program = hashlib.sha256(PROGRAM.encode()).hexdigest()
    assert ("usr/bin/program", "-rwxr-xr-x", program) in found
    assert ("usr/bin/link", "lrwxrwxrwx", "/etc/passwd") in found
    assert ("var/shared", "drwxr-xr-x", "") in found
    assert {mode[0] for _, mode, _ in found} <= set("-dl")
    # Nothing else is left, such as the copies of the packages.
    assert {path.name for path in place.iterdir()} == {"ours", "theirs"}


def test_what_is_booted_is_small(guest_image: Image) -> None:
    sizes = [(guest_image.directory / name).stat().st_size for name in BOOT_FILES]
    assert sum(sizes) <= LARGEST_BOOT_BYTES


def test_a_disk_that_is_too_small_for_a_build(host: FakeHost) -> None:
    with mounted(host.directory / "small", *mount_arguments("300m")) as place:
        other = FakeHost(home=place / "home")
        try:
            done = other.run("image", "build", "--force")
            assert done.status == 1
            assert f"{other.layout.images} has 0.3 GB of free space; free some" in done.line
            assert {path.name for path in other.layout.images.iterdir()} == {
                ".lock",
                other.image.name,
            }
        finally:
            other.close()


WITHOUT_LOOKING = """
import sys
import wherry.cli, wherry_images.build

wherry_images.build.NEEDED_BYTES = 0
wherry.cli.main(["image", "build", "--force"])
"""


@pytest.mark.endurance
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [16 << 20, 300 << 20, 800 << 20, NEEDED_BYTES])
def test_a_disk_that_fills_while_an_image_is_built(size: int, host: FakeHost) -> None:
    """There is one line, the image before, and nothing half-made; and what is said suffices."""
    with mounted(host.directory / "small", *mount_arguments(str(size))) as place:
        other = FakeHost(home=place / "home")
        try:
            command = subprocess.Popen(
                [sys.executable, "-c", WITHOUT_LOOKING],
                env=other.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            with command:
                done = other.finish(command, 800)
            left = {path.name for path in other.layout.images.iterdir()}
            if size == NEEDED_BYTES:
                assert done.status == 0, done
                assert len(left) == 3
            else:
                assert done.status == 1
                assert "free" in done.line.rpartition(";")[2]
                assert "space" in done.line.rpartition(";")[2]
                assert left == {".lock", other.image.name}
        finally:
            other.close()


@pytest.mark.endurance
@pytest.mark.timeout(1200)
def test_two_builds_are_equal_in_every_byte(tmp_path: Path) -> None:
    """One as root, where root runs the tests, and one as an ordinary user with a narrow umask."""
    for prefix, name in (((), "ours"), (AS_A_USER, "theirs")):
        subprocess.run(
            [
                *(*prefix, sys.executable, "-m", "wherry_images", "build"),
                *("--output", tmp_path / name, "--arch", current().architecture()),
            ],
            check=True,
            umask=0o077 if prefix else 0o022,
            timeout=500,
        )
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("ours", "theirs")]
    assert manifests[0] == manifests[1]
    for name, entry in json.loads(manifests[0])["files"].items():
        assert {sha256(tmp_path / each / name) for each in ("ours", "theirs")} == {entry["sha256"]}
