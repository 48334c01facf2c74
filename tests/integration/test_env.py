"""``wherry env`` as each shell reads it, and ``wherry start --use`` as the docker CLI does."""

from __future__ import annotations

import json
import re
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
    "pwsh": "wherry env | Invoke-Expression; [Console]::Out.Write($Env:DOCKER_HOST)",
}
"""What `wherry env` itself says that is to be run, and what came of it for a child."""


@pytest.fixture
def strange(host: FakeHost) -> Iterator[FakeHost]:
    """A computer whose paths have what every shell gives a meaning to."""
    made = FakeHost(home=host.directory / 'it\'s \u2019\u2018 "$HOME" `x` \\n (ü) ;&')
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
    """Quotes end a string unless there are two, which are one; all else is literal.

    See about_Quoting_Rules, and for what it takes for one IsSingleQuote in its CharTraits.cs.
    """
    line, use = strange.good("env", SHELL="/usr/bin/pwsh").splitlines()
    quote = "['\u2018\u2019\u201a\u201b]"
    inner = line.removeprefix("$Env:DOCKER_HOST = '").removesuffix("'")
    assert line == f"$Env:DOCKER_HOST = '{inner}'"
    pairs = re.findall(f"{quote}{{2}}", inner)
    assert pairs == ["''", "\u2019\u2019", "\u2018\u2018"]
    assert not re.search(quote, re.sub(f"{quote}{{2}}", "", inner))
    assert re.sub(f"{quote}({quote})", r"\1", inner) == strange.status()["docker_host"]
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
