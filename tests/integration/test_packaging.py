"""The scripts on a Mac: Homebrew and the released image, with a stand-in for both.

There is no Mac here: `uname` says Darwin, `brew` notes what it is asked for, and the
release host is a web server on loopback. wherry itself is real, and fetches for real.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_image import write_image

from wherry.platform import current

PREPARE = Path(__file__).parents[2] / "packaging" / "prepare.sh"
TOOLS = ("bash", "basename", "cat", "dirname", "id")


@pytest.fixture
def mac(tmp_path: Path) -> dict[str, str]:
    """The environment of a Mac without QEMU."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    scripts = {
        "uname": 'case "$1" in -m) echo arm64 ;; *) echo Darwin ;; esac',
        "brew": f'echo "$*" >>"{tmp_path}/brew.log"; printf "#!/bin/sh\\n" >"{programs}/qemu-img"; '
        f'/bin/chmod +x "{programs}/qemu-img"',
        "python3": f'exec "{sys.executable}" "$@"',
        "wherry": f'exec "{sys.executable}" -m wherry "$@"',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return {
        **{key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ},
        "PATH": str(programs),
        "WHERRY_HOME": str(tmp_path / "home"),
    }


@pytest.fixture
def release(tmp_path: Path) -> Iterator[str]:
    """A release host with one small image."""
    architecture = current().architecture()
    write_image(tmp_path / "release" / architecture, "2026.1.1-abc", architecture)
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=tmp_path / "release"
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def prepare(env: dict[str, str], *functions: str) -> subprocess.CompletedProcess[str]:
    script = "set -euo pipefail; . " + str(PREPARE) + "; " + "; ".join(functions)
    return subprocess.run(
        [str(shutil.which("bash")), "-c", script], env=env, capture_output=True, text=True
    )


def test_qemu_comes_from_homebrew_and_the_image_from_the_release(
    mac: dict[str, str], release: str, tmp_path: Path
) -> None:
    mac["WHERRY_RELEASE_URL"] = release
    for _ in range(2):
        done = prepare(mac, "prepare_system", "prepare_image")
        assert done.returncode == 0, done.stderr
    # The second run found everything: one installation, one image.
    assert (tmp_path / "brew.log").read_text() == "install qemu\n"
    images = list((tmp_path / "home" / "images").glob("[!.]*"))
    assert [path.name for path in images] == [f"2026.1.1-abc-{current().architecture()}"]
    assert "Fetching" not in done.stderr


def test_without_an_address_the_failure_says_what_to_set(mac: dict[str, str]) -> None:
    done = prepare(mac, "prepare_image")
    assert done.returncode == 2
    assert "WHERRY_RELEASE_URL" in done.stderr.splitlines()[-1]


def test_without_homebrew_the_failure_names_it(mac: dict[str, str]) -> None:
    Path(mac["PATH"], "brew").unlink()
    done = prepare(mac, "prepare_system")
    assert done.returncode == 1
    assert "Homebrew" in done.stderr
