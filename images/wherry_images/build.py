"""Building an image: from a lock file to the directory a machine starts from."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import platform
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from wherry.core.errors import WherryError
from wherry_images import configure, emulation, initramfs
from wherry_images.architecture import ARCHITECTURES, Architecture
from wherry_images.archive import Apt, fetch, host_mirror
from wherry_images.libraries import check_libraries
from wherry_images.lock import Lock, LockedPackage, format_lock, read_lock
from wherry_images.manifest import Manifest, describe
from wherry_images.tools import Tools
from wherry_images.tree import unpack

RECIPE = Path(__file__).parent / "recipe"
LOCKS = Path(__file__).parent / "locks"

NEEDED_BYTES = 1_300_000_000
"""What a build takes for a while on the disk of its output, the image included."""

_SPACE = f"free some space: a build takes {NEEDED_BYTES / 1e9:.1f} GB for a while"

CLIENTS = {
    "clients/docker": "usr/bin/docker",
    "clients/cli-plugins/docker-buildx": "usr/libexec/docker/cli-plugins/docker-buildx",
    "clients/cli-plugins/docker-compose": "usr/libexec/docker/cli-plugins/docker-compose",
}


def default_cache() -> Path:
    """Return where fetched packages are kept: $XDG_CACHE_HOME/wherry or ~/.cache/wherry."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wherry" / "packages"


def build(
    output: Path,
    architecture: str,
    *,
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Build the image for `architecture` (QEMU's name) into the directory `output`.

    What was in `output` is replaced only when everything worked. Raises WherryError.
    """
    try:
        return _build(output, architecture, cache or default_cache(), progress)
    except OSError as error:
        # Of two files that an error names, the one that was written is the second.
        where = error.filename2 or error.filename or output
        raise WherryError(f"{where} cannot be written: {error.strerror}", hint=_SPACE) from error
    except WherryError as error:
        if os.strerror(errno.ENOSPC) in error.message:
            raise WherryError(error.message, hint=_SPACE) from error
        raise


def _build(
    output: Path, architecture: str, cache: Path, progress: Callable[[str], None]
) -> Manifest:
    target = architecture_named(architecture)
    host = architecture_named(platform.machine())
    mirror = host_mirror()
    guest_lock = read_lock(lock_path("guest", target))
    tools_lock = read_lock(lock_path("tools", host))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Said at once, as mmdebstrap does not tell that a disk was full.
    free = shutil.disk_usage(output.parent).free
    if free < NEEDED_BYTES:
        message = f"{output.parent} has {free / 1e9:.1f} GB of free space"
        raise WherryError(message, hint=_SPACE)
    fetch([*guest_lock.packages, *tools_lock.packages], cache, mirror=mirror, progress=progress)
    with (
        tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as scratch,
        _umask(0o022),
    ):
        work = Path(scratch)
        progress("unpacking packages")
        unpack(tools_lock.packages, cache, host.debian, work / "tools")
        unpack(guest_lock.packages, cache, target.debian, work / "root")
        image = work / "image"
        image.mkdir()
        tools = Tools(work / "tools", host)
        emulator = work / "emulator"
        emulation.take(work / "root", emulator, target)
        _compress(emulator, image / "emulation", tools, guest_lock.epoch)
        certificates = _make_image(work / "root", image, tools, guest_lock.epoch, progress)
        manifest = Manifest(
            version=image_version(guest_lock, RECIPE),
            architecture=target.name,
            epoch=guest_lock.epoch,
            cmdline=(RECIPE / "cmdline").read_text().strip(),
            engine_version=engine_version(guest_lock),
            files=describe(image),
            packages={package.name: package.version for package in guest_lock.packages},
            certificates=certificates,
        )
        (image / "manifest.json").write_text(manifest.to_json())
        if output.exists():
            output.rename(work / "replaced")
        image.rename(output)
    return manifest


def update_lock(architecture: str, *, progress: Callable[[str], None] = lambda line: None) -> None:
    """Choose the archive's newest packages and write the lock files. Raises WherryError."""
    target = architecture_named(architecture)
    host = architecture_named(platform.machine())
    recipe = tomllib.loads((RECIPE / "packages.toml").read_text())
    LOCKS.mkdir(exist_ok=True)
    epoch = int(time.time())
    for role, chosen in (("guest", target), ("tools", host)):
        progress(f"resolving {role} packages for {chosen.name}")
        names = list(recipe[role]["install"])
        if "kernel" in recipe[role]:
            names.append(f"{recipe[role]['kernel']}-{chosen.debian}")
        packages = _resolve(recipe, names, chosen)
        kept = [package for package in packages if package.name not in recipe[role]["without"]]
        lock_path(role, chosen).write_text(format_lock(epoch, kept))


def architecture_named(name: str) -> Architecture:
    """Return the architecture with QEMU's `name`. Raises WherryError for one we do not build."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = " and ".join(ARCHITECTURES)
        raise WherryError(f"images are built for and on {known}, not {name}") from None


def lock_path(role: str, architecture: Architecture) -> Path:
    """Return the lock file of the "guest" or the "tools" for one architecture."""
    return LOCKS / f"{role}-{architecture.name}.toml"


def engine_version(lock: Lock) -> str:
    """Return the version dockerd reports: docker.io's without Debian's additions."""
    return lock.version_of("docker.io").partition("+")[0].partition("-")[0]


def version_to_build(architecture: str) -> str:
    """Return the version that a build for `architecture` has now. Raises WherryError."""
    return image_version(read_lock(lock_path("guest", architecture_named(architecture))), RECIPE)


def image_version(lock: Lock, recipe: Path) -> str:
    """Return the day of the lock and a digest of all that decides the image's contents."""
    digest = hashlib.sha256()
    for package in lock.packages:
        digest.update(package.sha256.encode())
    code = Path(__file__).parent.glob("*.py")
    for file in sorted([*code, *(path for path in recipe.rglob("*") if path.is_file())]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    day = time.strftime("%Y.%m.%d", time.gmtime(lock.epoch))
    return f"{day}-{digest.hexdigest()[:8]}"


def packed_kernel(kernel: bytes) -> bytes:
    """Return the kernel as it is shipped.

    Debian's arm64 kernel is not compressed. QEMU unpacks gzip for that architecture by itself;
    the x86 kernel unpacks itself and is passed on.
    """
    # Offset 56 of an arm64 Image: Documentation/arch/arm64/booting.rst of the kernel.
    if kernel[56:60] != b"ARM\x64":
        return kernel
    return gzip.compress(kernel, mtime=0)


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Give new files the same modes whatever the caller's own mask is (umask(2))."""
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


def _resolve(
    recipe: dict[str, object], names: Sequence[str], architecture: Architecture
) -> list[LockedPackage]:
    with tempfile.TemporaryDirectory(prefix="wherry-apt-") as directory:
        apt = Apt(
            Path(directory),
            mirror=host_mirror(),
            architecture=architecture.debian,
            suite=str(recipe["suite"]),
            pinned_suite=str(recipe["pinned_suite"]),
            pinned=[str(name) for name in recipe["pinned"]],  # type: ignore[attr-defined]
        )
        apt.update()
        return apt.resolve(names)


def _make_image(
    root: Path, image: Path, tools: Tools, epoch: int, progress: Callable[[str], None]
) -> list[str]:
    """Fill the directory `image`; return the digests of the root's certificates."""
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    (image / "kernel").write_bytes(packed_kernel(kernel.read_bytes()))
    for name, source in CLIENTS.items():
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, image / name)

    progress("configuring the root")
    configure.remove_unneeded(root, [line for (line,) in configure.read_list(RECIPE / "remove")])
    patterns = [line for (line,) in configure.read_list(RECIPE / "modules")]
    modules, dependencies = configure.add_modules(root, patterns, tools)
    check_libraries(root)
    configure.add_accounts(root)
    certificates = configure.add_certificates(root)
    configure.add_files(root, RECIPE)
    configure.open_temporary_directories(root)
    configure.add_bytecode(root, tools)

    busybox = (root / "usr/bin/busybox").read_bytes()
    init = (RECIPE / "initrd/init").read_bytes()
    (image / "initrd").write_bytes(initramfs.initrd(init, busybox, modules, dependencies))
    probe = (RECIPE / "probe/init").read_bytes()
    (image / "probe").write_bytes(initramfs.probe(probe, busybox))

    progress("compressing the root")
    _compress(root, image / "root", tools, epoch)
    return certificates


def _compress(tree: Path, disk: Path, tools: Tools, epoch: int) -> None:
    tools.run(
        "usr/bin/mkfs.erofs",
        "-zlz4hc,12:zstd,6",
        "-C65536",
        f"--compress-hints={RECIPE / 'compression'}",
        "--all-root",
        "-x-1",
        f"-T{epoch}",
        # A fixed volume id: the default is random.
        "-U00000000-0000-0000-0000-000000000001",
        disk,
        tree,
    )
