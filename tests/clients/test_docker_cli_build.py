"""``docker build`` with the classic builder and with BuildKit.

No Dockerfile has a ``# syntax=`` line: it makes BuildKit pull a frontend, and no public
registry is needed here. The engine's own frontend understands all that is used.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from docker_clients import Clients, wait_for, write_tree

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

CLASSIC = {"DOCKER_BUILDKIT": "0"}


def test_the_classic_builder(clients: Clients, tmp_path: Path) -> None:
    """The whole context is sent, without what ``.dockerignore`` names; steps are cached."""
    write_tree(
        tmp_path,
        {
            "Dockerfile": "FROM busybox\nARG WHO=nobody\nCOPY . /context\n"
            'RUN find /context -type f | sort >/list; echo "for $WHO" >>/list\n'
            'CMD ["cat", "/list"]\n',
            ".dockerignore": "*.log\nsecrets\n!kept.log\n",
            "a.txt": "a",
            "noise.log": "noise",
            "kept.log": "kept",
            "secrets/key": "secret",
        },
    )
    # A context that is larger than what is buffered on the way.
    (tmp_path / "large").write_bytes(os.urandom(4 << 20))
    build = ["build", "-t", "classic:1", "--build-arg", "WHO=me", tmp_path]
    done = clients.docker(*build, env=CLASSIC)
    assert b"Step 1/5 : FROM busybox" in done.stdout
    listed = clients.said("run", "--rm", "classic:1").splitlines()
    assert [Path(line).name for line in listed] == [
        ".dockerignore", "Dockerfile", "a.txt", "kept.log", "large", "for me",
    ]  # fmt: skip
    assert clients.docker(*build, env=CLASSIC).stdout.count(b"Using cache") == 4
    failed = clients.docker(
        "build", "-", input=b"FROM busybox\nRUN exit 5\n", check=False, env=CLASSIC
    )
    assert b"returned a non-zero code: 5" in failed.stderr


def test_buildkit_takes_the_second_build_from_its_cache(clients: Clients, tmp_path: Path) -> None:
    """A step whose input changed runs again, with what it kept in its cache mount."""
    unique = uuid.uuid4().hex
    write_tree(
        tmp_path,
        {
            "Dockerfile": "FROM busybox\nCOPY input /input\n"
            f"RUN --mount=type=cache,id={unique},target=/kept"
            " echo run >>/kept/runs && cat /input >/output"
            " && echo was-run-$(wc -l </kept/runs)-times\n"
            'CMD ["cat", "/output"]\n',
            "input": f"{unique}\n",
        },
    )
    build = ["buildx", "build", "--load", "-t", "cached:1", tmp_path]
    first = clients.docker(*build).stderr
    assert b"was-run-1-times" in first
    second = clients.docker(*build).stderr
    assert second.count(b"CACHED") >= 2
    assert b"was-run-1" not in second
    (tmp_path / "input").write_text(f"{unique}-2\n")
    assert b"was-run-2-times" in clients.docker(*build).stderr
    assert clients.said("run", "--rm", "cached:1") == f"{unique}-2"


@pytest.mark.slow
@pytest.mark.usefixtures("containerd_store")
def test_a_cache_in_a_directory_of_the_user_s(clients: Clients, tmp_path: Path) -> None:
    """What one build writes there another one takes from it, with a builder that has nothing."""
    clients.machine.add_busybox()
    dockerfile = "FROM busybox\nRUN cat /proc/sys/kernel/random/uuid >/once\n"
    write_tree(tmp_path, {"context/Dockerfile": dockerfile})
    cache, once = tmp_path / "cache", []
    for where in (f"--cache-to=type=local,dest={cache}", f"--cache-from=type=local,src={cache}"):
        clients.docker("buildx", "prune", "-af")
        output = tmp_path / f"output-{len(once)}"
        clients.docker(
            "buildx", "build", where, "-o", f"type=local,dest={output}", tmp_path / "context"
        )
        assert (cache / "index.json").exists()
        once.append((output / "once").read_text())
    assert once[0] == once[1]


def test_buildkit_s_stages_heredocs_ignored_files_and_local_output(
    clients: Clients, tmp_path: Path
) -> None:
    """``-o type=local`` writes the last stage's files to a directory of the host."""
    write_tree(
        tmp_path / "context",
        {
            "Dockerfile": """\
FROM busybox AS build
WORKDIR /src
COPY . .
RUN <<END
set -e
find . -type f | sort >/list
mkdir /bin2
ln -s ../list /bin2/link
END
COPY <<"END" /greeting
hello $NOBODY
END

FROM busybox AS unused
RUN exit 1

FROM scratch
COPY --from=build /list /greeting /
COPY --from=build /bin2 /bin2
""",
            ".dockerignore": "ignored\n**/*.tmp\n",
            "main.c": "",
            "ignored": "",
            "deep/er/x.tmp": "",
            "deep/er/x.h": "",
        },
    )
    out = tmp_path / "out"
    clients.docker("buildx", "build", "-o", f"type=local,dest={out}", tmp_path / "context")
    assert (out / "list").read_text().split() == [
        "./.dockerignore", "./Dockerfile", "./deep/er/x.h", "./main.c",
    ]  # fmt: skip
    assert (out / "greeting").read_text() == "hello $NOBODY\n"
    assert (out / "bin2" / "link").readlink() == Path("../list")


def test_buildkit_asks_the_client_for_secrets(clients: Clients, tmp_path: Path) -> None:
    """A secret is there while the step runs, and is in no layer."""
    write_tree(
        tmp_path,
        {
            "Dockerfile": "FROM busybox\n"
            "RUN --mount=type=secret,id=file wc -c </run/secrets/file >/sizes\n"
            "RUN --mount=type=secret,id=variable,env=TOKEN echo ${#TOKEN} >>/sizes\n",
        },
    )
    (tmp_path / "token").write_text("x" * 1234)
    clients.docker(
        "buildx", "build", "--load", "-t", "secret:1",
        "--secret", f"id=file,src={tmp_path / 'token'}",
        "--secret", "id=variable,env=HOST_TOKEN", tmp_path,
        env={"HOST_TOKEN": "y" * 77},
    )  # fmt: skip
    said = clients.said(
        "run", "--rm", "secret:1", "sh", "-c", "cat /sizes; ls -A /run/secrets 2>&1 | wc -c"
    )
    assert said.split()[:2] == ["1234", "77"]
    assert "xxxx" not in said


def test_buildkit_uses_the_keys_of_the_user_s_agent(
    clients: Clients, debian: str, tmp_path: Path, agent: tuple[str, str]
) -> None:
    """``--ssh`` carries a step's requests to the ssh-agent on the host."""
    socket, fingerprint = agent
    write_tree(
        tmp_path / "context",
        {"Dockerfile": f"FROM {debian}\nRUN --mount=type=ssh ssh-add -l\n"},
    )
    done = clients.docker(
        "build", "--ssh", "default", "--no-cache", tmp_path / "context",
        env={"SSH_AUTH_SOCK": socket},
    )  # fmt: skip
    assert fingerprint.encode() in done.stderr


@pytest.mark.parametrize("builder", ["classic", "buildkit"])
def test_ctrl_c_ends_the_build_in_the_engine(
    clients: Clients, tmp_path: Path, builder: str
) -> None:
    """The step that runs is killed, not left to its end."""
    name = {"classic": "98761", "buildkit": "98762"}[builder]
    write_tree(
        tmp_path, {"Dockerfile": f"FROM busybox\nRUN echo begun-$((40 + 2)); sleep {name}\n"}
    )
    env = {"DOCKER_BUILDKIT": {"classic": "0", "buildkit": "1"}[builder]}
    before = clients.engine_connections()
    with clients.started("build", "--no-cache", tmp_path, env=env) as building:
        building.expect("begun-42")
        assert f"sleep {name}" in clients.guest("pgrep", "-ax", "sleep")
        assert building.interrupt() != 0
    wait_for(
        lambda: f"sleep {name}" not in clients.guest("pgrep", "-ax", "sleep", check=False),
        "the step is killed",
    )
    wait_for(lambda: clients.engine_connections() <= before, "the connections are closed")
