"""``wherry env`` as each shell reads it, and ``wherry start --use`` as the docker CLI does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fake_host import FakeHost

EVALUATE = {
    "bash": 'eval "$(wherry env)"; printf %s "$DOCKER_HOST"',
    "zsh": 'eval "$(wherry env)"; printf %s "$DOCKER_HOST"',
    "fish": 'wherry env | source; printf %s "$DOCKER_HOST"',
}
"""What `wherry env` itself says that is to be run, and what came of it for a child."""


@pytest.fixture
def strange(host: FakeHost) -> Iterator[FakeHost]:
    """A computer whose paths have what every shell gives a meaning to."""
    made = FakeHost(home=host.directory / 'it\'s "$HOME" `x` \\n (ü) ;&')
    made.make()
    yield made
    made.close()


@pytest.mark.parametrize("shell", list(EVALUATE))
def test_a_real_shell_reads_it(strange: FakeHost, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}")
    (strange.bin / "wherry").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m wherry "$@"\n')
    (strange.bin / "wherry").chmod(0o755)
    done = subprocess.run(
        [program, "-c", EVALUATE[shell]],
        # The shell that runs is guessed from $SHELL, so no option is needed.
        env={**strange.env, "SHELL": program},
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b""
    assert done.stdout.decode() == strange.status()["docker_host"]


def test_powershell_reads_it_by_its_quoting_rules(strange: FakeHost) -> None:
    """In single quotes all is literal, and two of them are one (about_Quoting_Rules)."""
    line, use = strange.good("env", "--shell", "powershell").splitlines()
    assert line.startswith("$Env:DOCKER_HOST = '")
    assert line.endswith("'")
    inner = line.removeprefix("$Env:DOCKER_HOST = '").removesuffix("'")
    assert "'" not in inner.replace("''", "")
    assert inner.replace("''", "'") == strange.status()["docker_host"]
    assert use == "# Run: wherry env | Invoke-Expression"


def test_start_use_and_only_that_changes_the_current_context(host: FakeHost) -> None:
    def current() -> str | None:
        path = host.directory / "docker" / "config.json"
        if not path.exists():
            return None
        found: str | None = json.loads(path.read_text()).get("currentContext")
        return found

    host.good("start")
    assert current() is None
    host.good("start", "--use")
    assert current() == "wherry"
    host.good("start", "other")
    assert current() == "wherry"
    host.good("start", "other", "--use")
    assert current() == "wherry-other"
    host.good("delete", "--yes", "other")
    assert current() is None
