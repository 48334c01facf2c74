"""rsync and unison of the guest's Debian, for both ends, without installing anything.

The packages are fetched as the image's are, into a cache of the user, and unpacked with their
libraries. Wrappers run them by the loader that comes with them, so that the host's system may
be any; the guest has the same directory on its data disk. Both ends have the same versions.
Debian's unison comes without ``unison-fsmonitor``, so ``-repeat watch`` cannot be had of it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "images"))

from wherry_images.archive import Apt, fetch, host_mirror

_PROGRAMS = ("rsync", "unison-2.53")
_PACKAGES = ["rsync", "unison-2.53"]
_LOADER = "lib/ld.so"


def bundle(cache: Path, target: Path, place: str, architecture: str = "amd64") -> Path:
    """Make a directory with the programs.

    :param cache: for packages; kept.
    :param target: is made, anew.
    :param place: where the directory will be when the programs are run.
    :raises WherryError: the packages cannot be had.
    """
    with tempfile.TemporaryDirectory() as scratch:
        apt = Apt(
            Path(scratch),
            mirror=host_mirror(),
            architecture=architecture,
            suite="trixie",
            pinned_suite="forky",
            pinned=["none"],
        )
        apt.update()
        packages = apt.resolve(_PACKAGES)
        fetch(packages, cache, mirror=host_mirror(), progress=lambda text: None)
        unpacked = Path(scratch) / "root"
        for package in packages:
            subprocess.run(
                ["dpkg-deb", "-x", str(cache / package.file_name), str(unpacked)], check=True
            )
        shutil.rmtree(target, ignore_errors=True)
        (target / "lib").mkdir(parents=True)
        for library in unpacked.glob("usr/lib/*-linux-gnu/*.so*"):
            shutil.copy(library.resolve(), target / "lib" / library.name)
        (loader,) = (target / "lib").glob("ld-linux-*.so.*")
        loader.rename(target / _LOADER)
        (target / "real").mkdir()
        (target / "bin").mkdir()
        for name in _PROGRAMS:
            shutil.copy(unpacked / "usr" / "bin" / name, target / "real" / name)
            wrapper = target / "bin" / name
            wrapper.write_text(
                f"#!/bin/sh\nPATH={place}/bin:$PATH\n"
                f'exec {place}/{_LOADER} --library-path {place}/lib {place}/real/{name} "$@"\n'
            )
            wrapper.chmod(0o755)
    return target
