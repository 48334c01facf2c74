"""Unpacking locked packages into a directory with mmdebstrap.

mmdebstrap only extracts: no maintainer script runs, so a foreign architecture needs no emulation
and nothing in the result depends on the order or the time of the installation. What the scripts
would have done is in `configure`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wherry.core.processes import run
from wherry_images.lock import LockedPackage

UNPACK_TIMEOUT_S = 600


def format_index(packages: Sequence[LockedPackage], architecture: str) -> str:
    """Return a Packages index (deb-control(5)) of a repository that holds just `packages`.

    It leaves the dependencies out: they were resolved when the lock was written.
    """
    return "\n".join(
        f"Package: {package.name}\n"
        f"Version: {package.version}\n"
        f"Architecture: {architecture}\n"
        f"Filename: ./{package.file_name}\n"
        f"Size: {package.size}\n"
        f"SHA256: {package.sha256}\n"
        for package in sorted(packages)
    )


def unpack(packages: Sequence[LockedPackage], cache: Path, architecture: str, target: Path) -> None:
    """Extract `packages` from `cache` into the new directory `target`.

    `architecture` is Debian's name. Files belong to the caller afterwards whatever the packages
    say, so that no root is needed. Raises WherryError.
    """
    # In the system's directory for temporary files, as mmdebstrap without root becomes a user who
    # may not enter the caller's home.
    with tempfile.TemporaryDirectory(prefix="wherry-packages-") as scratch:
        repository = Path(scratch)
        repository.chmod(0o755)
        for package in packages:
            shutil.copyfile(cache / package.file_name, repository / package.file_name)
        (repository / "Packages").write_text(format_index(packages, architecture))
        archive = repository / "tree.tar"
        run(
            [
                "mmdebstrap",
                "--variant=extract",
                "--mode=auto",
                "--format=tar",
                f"--architectures={architecture}",
                f"--include={','.join(package.name for package in packages)}",
                "--quiet",
                "",
                archive,
                f"deb [trusted=yes] copy:{repository} ./",
            ],
            timeout_s=UNPACK_TIMEOUT_S,
            hint="on Debian: apt-get install mmdebstrap, and uidmap when you are not root",
        )
        target.mkdir()
        run(
            [
                "tar",
                "-x",
                "-p",
                "--no-same-owner",
                "--exclude=./dev/*",
                "-C",
                target,
                "-f",
                archive,
            ],
            timeout_s=UNPACK_TIMEOUT_S,
        )
