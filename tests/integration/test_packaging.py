"""The scripts from a clean machine on, with stand-ins for what they install.

`uname` says Linux or Darwin; `apt-get`, `brew`, `sudo`, `docker` and `curl` note what they are
asked for; the release host is a web server on loopback. Of wherry, all of `image` but the
building is real, and fetches for real; the machine is not.
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
from fake_image import FILES, write_image

from wherry.platform import current

ROOT = Path(__file__).parents[2]
TOOLS = (
    *("bash", "sh", "awk", "basename", "cat", "chmod", "cksum", "cp", "dirname", "env", "grep"),
    *("ln", "mkdir", "mktemp", "readlink", "rm"),
)
HERE = current().architecture()
OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}[HERE]

PYTHON = """\
case "$*" in
"-m venv"*)
    for venv; do :; done
    note "python3 $*"
    mkdir -p "$venv/bin"
    ln -sf "$BIN/python3" "$venv/bin/python"
    if [ -e "$BIN/interrupted" ]; then rm "$BIN/interrupted"; exit 130; fi
    ln -sf "$BIN/.pip" "$venv/bin/pip"
    ;;
*) exec PYTHON "$@" ;;
esac
"""
SCRIPTS = {
    "uname": 'case "$1" in -m) echo "$MACHINE" ;; *) echo "$SYSTEM" ;; esac',
    "id": 'case "$1" in -un) echo somebody ;; *) echo 1000 ;; esac',
    "dpkg-query": "for package; do :; done; "
    'grep -qx "$package" "$BIN/packages" && printf installed',
    "apt-get": 'note "apt-get $*"; '
    'case "$*" in *install*) for package; do echo "$package" >>"$BIN/packages"; done ;; esac',
    "sudo": '"$@"',
    "usermod": 'note "usermod $*"',
    "brew": 'note "brew $*"; case "$*" in '
    '"--prefix") echo "$BIN/../brew" ;; '
    '"install qemu") printf "#!/bin/sh\\n" >"$BIN/qemu-img"; chmod +x "$BIN/qemu-img" ;; '
    '"install docker "*) cp "$BIN/.docker" "$BIN/docker" ;; esac',
    "curl": 'note "curl"; echo "Hello from a container"',
    "python3": PYTHON.replace("PYTHON", sys.executable),
    ".pip": 'case "$1" in install) note "pip $*"; cp "$BIN/.wherry" "${0%/pip}/wherry" ;; esac',
    ".wherry": 'case "$*" in '
    '"image build"*) note "wherry $*" ;; '
    f'image*) exec "{sys.executable}" -m wherry "$@" ;; '
    '"status --json") echo \'{"docker_host": "unix:///there.sock"}\' ;; '
    'start) note "wherry $*" ;; '
    "shell*) echo busybox ;; esac",
    ".docker": 'case "$1" in inspect) [ ! -e "$BIN/runs" ] || echo true; exit ;; '
    'run) : >"$BIN/runs" ;; esac; note "docker $DOCKER_HOST $*"',
}
"""What each program does; those with a dot are not on PATH by themselves."""


class Computer:
    """A computer with a checkout, where nothing is installed that the scripts install."""

    def __init__(self, directory: Path, system: str) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.checkout = directory / "checkout"
        shutil.copytree(ROOT / "packaging", self.checkout / "packaging")
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        self.home = directory / "home"
        self.home.mkdir()
        for name in TOOLS:
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)
        for name, text in SCRIPTS.items():
            self.install(name, text)
        (self.bin / "packages").touch()
        self.env = {
            **{key: os.environ[key] for key in ("LANG",) if key in os.environ},
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "WHERRY_HOME": str(directory / "wherry"),
            "SYSTEM": system,
            "MACHINE": {"Darwin": {"aarch64": "arm64"}}.get(system, {}).get(HERE, HERE),
            "BIN": str(self.bin),
        }
        for name in ("brew", "qemu-img", "docker") if system == "Linux" else ("apt-get", "sudo"):
            (self.bin / name).unlink(missing_ok=True)

    def install(self, name: str, text: str) -> None:
        """Make a program, in which ``note`` adds a line to the log."""
        note = f'note() {{ echo "$*" >>"{self.directory}/log"; }}'
        (self.bin / name).write_text(f"#!/bin/sh\n{note}\n{text}\n")
        (self.bin / name).chmod(0o755)

    def image(self, architecture: str = HERE, version: str = "2026.1.1-abc") -> Path:
        """Install an image, newer than those before, with the docker CLI in it."""
        docker = (self.bin / ".docker").read_bytes()
        clients = {"clients/docker": docker}
        for plugin in ("docker-buildx", "docker-compose"):
            clients[f"clients/cli-plugins/{plugin}"] = architecture.encode()
        directory = Path(self.env["WHERRY_HOME"], "images", f"{version}-{architecture}")
        write_image(directory, version, architecture, {**FILES, **clients})
        (directory / "clients/docker").chmod(0o755)
        return directory

    @property
    def log(self) -> list[str]:
        """What was asked for since the last look."""
        path = self.directory / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        return subprocess.run(
            [str(self.bin / "bash"), "-c", script],
            env=self.env,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=50,
        )

    def good(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script that must not fail."""
        done = self.run(script)
        assert done.returncode == 0, done.stderr
        return done

    def try_it(self) -> str:
        """Run ``try.sh`` and return all that it said."""
        done = self.good(f"{self.checkout}/packaging/try.sh")
        return done.stdout + done.stderr

    def prepare(self, *functions: str) -> subprocess.CompletedProcess[str]:
        """Run steps of ``prepare.sh``."""
        source = f"set -euo pipefail; . {self.checkout}/packaging/prepare.sh; "
        return self.run(source + "; ".join(functions))


@pytest.fixture
def debian(tmp_path: Path) -> Computer:
    return Computer(tmp_path, "Linux")


@pytest.fixture
def mac(tmp_path: Path) -> Computer:
    return Computer(tmp_path, "Darwin")


@pytest.fixture
def release(tmp_path: Path) -> Iterator[str]:
    """A release host with one small image."""
    write_image(tmp_path / "release" / HERE, "2026.1.1-abc", HERE)
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


DEMO = [
    "wherry start",
    "docker unix:///there.sock build -t wherry-demo",
    "docker unix:///there.sock rm -f wherry-demo",
    "docker unix:///there.sock run -d --name wherry-demo -p 8080:80 wherry-demo",
    "curl",
]


def steps(log: list[str]) -> list[str]:
    """Drop the directory for temporary files, which has another name each time."""
    return [line.partition(" /")[0] if " build " in line else line for line in log]


def test_on_debian_what_is_missing_comes_once(debian: Computer) -> None:
    debian.image()
    said = debian.try_it()
    assert "Hello from a container" in said
    update, install, venv, pip, *rest = debian.log
    assert update == "apt-get -qq update"
    assert install.startswith("apt-get -qq install --no-install-recommends ")
    assert {"mmdebstrap", "qemu-utils", "openssh-client", "curl"} <= set(install.split())
    assert venv == f"python3 -m venv --clear {debian.checkout}/.venv"
    assert pip.endswith(f"-e {debian.checkout}")
    assert steps(rest) == ["wherry image build", *DEMO]
    # Run again, what runs and answers is left alone; what does not is made again.
    assert "Hello from a container" in debian.try_it()
    assert debian.log == ["wherry image build", "wherry start", "curl", "curl"]
    (debian.bin / "runs").unlink()
    assert "Hello from a container" in debian.try_it()
    assert steps(debian.log) == ["wherry image build", *DEMO]


def test_without_a_docker_cli_the_images_is_used_with_its_plugins(debian: Computer) -> None:
    own = debian.image()
    # Made later on the same day, as the tests do.
    debian.image(OTHER)
    said = debian.try_it()
    plugins = debian.home / ".docker/cli-plugins"
    assert (plugins / "docker-buildx").read_text() == HERE
    assert (plugins / "docker-compose").read_text() == HERE
    assert f"export PATH={own}/clients:{debian.checkout}/.venv/bin:$PATH" in said
    newer = debian.image(version="2026.1.2-abc")
    (plugins / "docker-compose").unlink()
    (plugins / "docker-compose").write_text("the user's own")
    debian.try_it()
    assert (plugins / "docker-buildx").readlink() == newer / "clients/cli-plugins/docker-buildx"
    assert (plugins / "docker-compose").read_text() == "the user's own"


def test_the_docker_cli_of_the_user_is_left_as_it_is(debian: Computer) -> None:
    own = debian.image()
    debian.install("docker", SCRIPTS[".docker"])
    said = debian.try_it()
    assert not (debian.home / ".docker").exists()
    assert str(own) not in said


def test_an_image_without_a_docker_cli(debian: Computer) -> None:
    debian.image(OTHER)
    debian.install("wherry", SCRIPTS[".wherry"])
    debian.prepare("prepare_docker_cli")
    assert debian.log == ["wherry image build --force"]


def test_another_processor_is_refused_before_anything_is_installed(debian: Computer) -> None:
    debian.env["MACHINE"] = "riscv64"
    done = debian.prepare("prepare_system")
    assert done.returncode == 1
    assert done.stderr == "bash: wherry runs on x86_64 and arm64, not on riscv64\n"
    assert debian.log == []


@pytest.mark.parametrize("damage", ["interrupted", "moved"])
def test_an_environment_that_does_not_work_is_made_anew(damage: str, debian: Computer) -> None:
    venv = debian.checkout / ".venv"
    if damage == "interrupted":
        (debian.bin / "interrupted").touch()
        assert debian.prepare("prepare_python ''").returncode == 130
    else:
        assert debian.prepare("prepare_python ''").returncode == 0
        # What an upgrade of Python does to the program, and moving the checkout to its scripts.
        (venv / "bin/pip").unlink()
        (venv / "bin/pip").symlink_to(debian.directory / "absent")
    assert debian.log
    done = debian.prepare("prepare_python ''", "command -v wherry")
    assert (done.returncode, done.stdout) == (0, f"{venv}/bin/wherry\n")
    assert debian.log[0] == f"python3 -m venv --clear {venv}"


@pytest.mark.parametrize(
    ("present", "range_"),
    [("", "100000-165535"), ("other:100000:65536\nlate:231072:65536\n", "296608-362143")],
)
def test_a_user_without_subordinate_users_gets_some_that_are_nobodys(
    present: str, range_: str, debian: Computer
) -> None:
    script = debian.checkout / "packaging/prepare.sh"
    for name in ("subuid", "subgid"):
        (debian.directory / name).write_text(present)
    script.write_text(script.read_text().replace("/etc/", f"{debian.directory}/"))
    assert debian.prepare("prepare_subordinate_users").returncode == 0
    asked = [line for line in debian.log if line.startswith("usermod")]
    assert asked == [
        f"usermod --add-subuids {range_} somebody",
        f"usermod --add-subgids {range_} somebody",
    ]
    for name in ("subuid", "subgid"):
        (debian.directory / name).write_text(f"{present}somebody:1:1\n")
    assert debian.prepare("prepare_subordinate_users").returncode == 0
    assert debian.log == []


@pytest.mark.parametrize("arguments", ["", " tests/unit"])
def test_tests_that_change_the_checkout_fail(arguments: str, debian: Computer) -> None:
    debian.image()
    for name in ("diff", "git"):
        found = shutil.which(name)
        assert found, name
        (debian.bin / name).symlink_to(found)
    rest = PYTHON.removeprefix('case "$*" in').replace("PYTHON", sys.executable)

    def tests_do(what: str) -> None:
        debian.install(
            "python3", f'case "$*" in *downloads.py) ;; "-m pytest"*) note pytest; {what} ;;{rest}'
        )

    test = f"{debian.checkout}/packaging/test.sh{arguments}"
    (debian.checkout / ".gitignore").write_text(".venv\n")
    commit = "git -c user.name=me -c user.email=me@localhost commit -qm all"
    debian.good(f"cd {debian.checkout}; git init -q; git add .; {commit}")
    (debian.checkout / "mine").write_text("uncommitted before")

    tests_do(":")
    debian.good(test)
    runs = debian.log.count("pytest")
    assert runs == (1 if arguments else 2)
    tests_do("exit 5")
    assert debian.run(test).returncode == 5

    tests_do(": >left")
    done = debian.run(test)
    assert done.returncode == 1
    assert "The tests have left changes in the checkout" in done.stderr
    assert done.stderr.splitlines()[-1] == "> ?? left"
    # Without git's directory it is no checkout, and there is nothing to compare with.
    shutil.rmtree(debian.checkout / ".git")
    (debian.checkout / "left").unlink()
    debian.good(test)


def test_on_a_mac_all_comes_from_homebrew_and_the_release_once(mac: Computer, release: str) -> None:
    mac.env["WHERRY_RELEASE_URL"] = release
    # What another computer's tests may have left must not stand for an image of this one.
    mac.image(OTHER, "2027.1.1-abc")
    assert "Hello from a container" in mac.try_it()
    qemu, venv, pip, docker, prefix, *rest = mac.log
    assert qemu == "brew install qemu"
    assert (venv.split()[:3], pip.split()[:2]) == (["python3", "-m", "venv"], ["pip", "install"])
    assert docker == "brew install docker docker-buildx docker-compose"
    assert prefix == "brew --prefix"
    assert steps(rest) == DEMO
    link = (mac.home / ".docker/cli-plugins/docker-buildx").readlink()
    assert str(link).endswith("brew/lib/docker/cli-plugins/docker-buildx")
    images = Path(mac.env["WHERRY_HOME"], "images")
    assert (images / f"2026.1.1-abc-{HERE}").is_dir()
    assert "Fetching" not in mac.try_it()
    assert mac.log == ["wherry start", "curl", "curl"]


def test_without_an_address_the_failure_says_what_to_set(mac: Computer) -> None:
    mac.install("wherry", SCRIPTS[".wherry"])
    done = mac.prepare("prepare_image")
    assert done.returncode == 2
    assert "WHERRY_RELEASE_URL" in done.stderr.splitlines()[-1]


def test_without_homebrew_the_failure_names_it(mac: Computer) -> None:
    (mac.bin / "brew").unlink()
    done = mac.prepare("prepare_system")
    assert done.returncode == 1
    assert "Homebrew" in done.stderr
