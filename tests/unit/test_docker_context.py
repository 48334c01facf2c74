"""The docker CLI's contexts: it must take ours for its own, and lose nothing of the user's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from wherry.core.errors import WherryError
from wherry.service import docker_config, docker_context

SOCKET = "unix:///run/user/1000/a place/docker.sock"

needs_docker = pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker CLI")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "docker"


def docker(*arguments: str) -> str:
    """Run the real docker CLI on the test's own configuration."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("DOCKER_")}
    env["DOCKER_CONFIG"] = os.environ["DOCKER_CONFIG"]
    done = subprocess.run(["docker", *arguments], env=env, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@needs_docker
def test_the_docker_cli_takes_our_context_for_its_own(directory: Path) -> None:
    docker_context.create("wherry", SOCKET, "default")
    (found,) = json.loads(docker("context", "inspect", "wherry"))
    assert found["Name"] == "wherry"
    assert found["Endpoints"]["docker"] == {"Host": SOCKET, "SkipTLSVerify": False}
    assert found["Metadata"] == {"Description": "wherry machine default"}
    listed = [json.loads(line) for line in docker("context", "ls", "--format=json").splitlines()]
    (ours,) = [each for each in listed if each["Name"] == "wherry"]
    assert (ours["DockerEndpoint"], ours["Error"]) == (SOCKET, "")
    assert ours["Description"] == "wherry machine default"


@needs_docker
def test_our_files_are_those_that_the_docker_cli_writes(directory: Path) -> None:
    docker(
        "context", "create", "wherry",
        "--description", "wherry machine default", "--docker", f"host={SOCKET}",
    )  # fmt: skip
    (theirs,) = directory.glob("contexts/meta/*/meta.json")
    written = json.loads(theirs.read_text())
    mode = theirs.stat().st_mode
    docker("context", "rm", "wherry")
    docker_context.create("wherry", SOCKET, "default")
    (ours,) = directory.glob("contexts/meta/*/meta.json")
    assert ours == theirs
    assert json.loads(ours.read_text()) == written
    assert ours.stat().st_mode == mode


@needs_docker
def test_the_docker_cli_can_use_and_remove_it(directory: Path) -> None:
    docker_context.create("wherry", SOCKET, "default")
    docker("context", "use", "wherry")
    assert docker_context.current() == "wherry"
    docker("context", "rm", "-f", "wherry")
    assert docker("context", "ls", "--quiet").split() == ["default"]
    docker_context.remove("wherry")


@needs_docker
def test_the_docker_cli_sees_whether_we_use_it(directory: Path) -> None:
    docker_context.create("wherry", SOCKET, "default")
    assert docker("context", "show").strip() == "default"
    docker_context.use("wherry")
    assert docker("context", "show").strip() == "wherry"
    docker_context.remove("wherry")
    assert docker("context", "show").strip() == "default"


CONFIG = {
    "auths": {"https://index.docker.io/v1/": {"auth": "c2VjcmV0"}},
    "credsStore": "desktop",
    "HttpHeaders": {"X-Ü": "ü"},
    "currentContext": "other",
    "future": [1, {"nested": None}],
}


def test_using_keeps_all_else_of_the_configuration(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    docker_context.create("wherry", SOCKET, "default")
    assert json.loads((directory / "config.json").read_text()) == CONFIG
    docker_context.use("wherry")
    found = json.loads((directory / "config.json").read_text())
    assert found == CONFIG | {"currentContext": "wherry"}
    assert list(found) == list(CONFIG)


def test_removing_returns_to_the_default_only_from_ours(directory: Path) -> None:
    directory.mkdir()
    path = directory / "config.json"
    path.write_text(json.dumps(CONFIG))
    docker_context.create("wherry", SOCKET, "default")
    docker_context.remove("wherry")
    assert json.loads(path.read_text()) == CONFIG
    docker_context.create("wherry", SOCKET, "default")
    docker_context.use("wherry")
    docker_context.remove("wherry")
    rest = {key: value for key, value in CONFIG.items() if key != "currentContext"}
    assert json.loads(path.read_text()) == rest
    assert not list(directory.glob("contexts/meta/*"))


def test_a_link_to_the_configuration_stays_one(directory: Path, tmp_path: Path) -> None:
    directory.mkdir()
    target = tmp_path / "dotfiles.json"
    target.write_text(json.dumps(CONFIG))
    target.chmod(0o640)
    (directory / "config.json").symlink_to(target)
    docker_context.use("wherry")
    assert (directory / "config.json").is_symlink()
    assert json.loads(target.read_text())["currentContext"] == "wherry"
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_new_configuration_is_private(directory: Path) -> None:
    docker_context.use("wherry")
    assert (directory / "config.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["", "{", "[]", "\ufffd"])
def test_a_damaged_configuration_is_left_alone(damage: str, directory: Path) -> None:
    directory.mkdir()
    path = directory / "config.json"
    path.write_text(damage)
    docker_context.create("wherry", SOCKET, "default")
    with pytest.raises(WherryError, match=r"config\.json cannot be read: .*mend or remove"):
        docker_context.use("wherry")
    docker_context.remove("wherry")
    assert path.read_text() == damage


def test_a_directory_that_cannot_be_written_is_explained(directory: Path) -> None:
    directory.touch()
    with pytest.raises(WherryError, match=r"wherry cannot be written: .*set DOCKER_CONFIG"):
        docker_context.create("wherry", SOCKET, "default")
    with pytest.raises(WherryError, match=r"config\.json"):
        docker_context.use("wherry")


def test_making_it_again_writes_only_what_changed(directory: Path) -> None:
    docker_context.create("wherry", SOCKET, "default")
    (path,) = directory.glob("contexts/meta/*/meta.json")
    before = path.stat()
    docker_context.create("wherry", SOCKET, "default")
    assert path.stat().st_ino == before.st_ino
    docker_context.create("wherry", "unix:///elsewhere", "default")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["Endpoints"]["docker"]["Host"] == "unix:///elsewhere"


def test_the_users_directory_is_the_clis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert docker_config.directory() == tmp_path / ".docker"
