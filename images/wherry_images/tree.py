"""Unpacking locked packages into a directory with mmdebstrap.

mmdebstrap only extracts: no maintainer script runs, so a foreign architecture needs no emulation
and nothing in the result depends on the order or the time of the installation. What the scripts
would have done is in `configure`.
"""

from __future__ import annotations

import shutil
import stat
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

    `architecture` is Debian's name. The tree is the same whoever makes it: files belong to the
    caller, and what an ordinary user cannot extract is left out for root as well, which are
    device nodes and the bits for setting user and group. Raises WherryError.
    """
    with tempfile.TemporaryDirectory(prefix=".packages-", dir=target.parent) as scratch:
        repository = Path(scratch)
        for package in packages:
            shutil.copyfile(cache / package.file_name, repository / package.file_name)
        (repository / "Packages").write_text(format_index(packages, architecture))
        run(
            [
                "mmdebstrap",
                "--variant=extract",
                # The only mode that needs neither root nor a range of subordinate users.
                "--mode=chrootless",
                # Newer ones refuse it to root, for what maintainer scripts could do; none runs.
                "--skip=check/chrootless",
                "--format=directory",
                f"--architectures={architecture}",
                f"--include={','.join(package.name for package in packages)}",
                # As root, apt would read the repository as a user who may not enter it.
                '--aptopt=APT::Sandbox::User "root"',
                "--quiet",
                "",
                target,
                f"deb [trusted=yes] copy:{repository} ./",
            ],
            timeout_s=UNPACK_TIMEOUT_S,
            hint="it takes free space, and mmdebstrap: apt-get install mmdebstrap",
        )
    shutil.rmtree(target / "dev", ignore_errors=True)
    for path in target.rglob("*"):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.lstat().st_mode) & 0o755)
