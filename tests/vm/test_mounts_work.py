"""What people do in bind mounts: a server that reloads, git on both sides, npm, a database.

The programs are Debian's and Node's own; nothing is fetched while the tests run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from downloads import work_root
from mount_trees import LIST, listed
from sandbox import Sandbox, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.endurance, pytest.mark.timeout(1800)]

IMAGE = "work:test"
SLOW_S = 900
NPM = (
    "node /opt/node/lib/node_modules/npm/bin/npm-cli.js ci --offline --cache /opt/npm/cache"
    " --no-audit --no-fund"
)
PATH = "PATH=/opt/node/bin:/usr/lib/postgresql/17/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@pytest.fixture(scope="module")
def work(machine: Sandbox) -> str:
    """The image with git, PostgreSQL and Node."""
    if shutil.which("mmdebstrap") is None and sys.platform != "linux":
        pytest.skip("a Debian root can only be made on Debian")
    if machine.docker("image", "inspect", IMAGE, check=False).returncode:
        with work_root().open("rb") as root:
            machine.docker("import", "-", IMAGE, input=root.read(), timeout=SLOW_S)
    return IMAGE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = tmp_path / "app"
    found.mkdir()
    return found


class Box:
    """A container that has a directory of the host at /src."""

    def __init__(self, machine: Sandbox, name: str) -> None:
        self.machine = machine
        self.name = name

    def run(self, script: str, *options: str, check: bool = True) -> str:
        argv = ["exec", "-w", "/src", "-e", PATH, *options, self.name, "bash", "-ec", script]
        return self.machine.docker(*argv, check=check, timeout=SLOW_S).stdout.decode()


@pytest.fixture
def box(machine: Sandbox, work: str, source: Path) -> Iterator[Box]:
    machine.docker("run", "-d", "--name", "work", "-v", f"{source}:/src", work, "sleep", "infinity")
    yield Box(machine, "work")
    machine.docker("rm", "-f", "work")


def same(box: Box, source: Path) -> None:
    """What the container has, the host has."""
    there = box.run(LIST)
    assert sorted(there.splitlines()) == listed(source)


SERVER = """
const fs = require("node:fs"), http = require("node:http");
let word = require("./word.js").word;
fs.watch(".", (event, name) => {
  if (name !== "word.js" || !fs.existsSync("word.js")) return;
  delete require.cache[require.resolve("./word.js")];
  word = require("./word.js").word;
});
http.createServer((_, answer) => answer.end(word)).listen(8080);
"""


def test_a_server_in_the_container_reloads_what_is_saved_on_the_host(
    machine: Sandbox, work: str, source: Path
) -> None:
    """By inotify on a directory, as Vite and webpack watch; both ways of saving of editors."""
    (source / "server.js").write_text(SERVER)
    (source / "word.js").write_text('exports.word = "0";')
    argv = ["/opt/node/bin/node", "server.js"]
    machine.docker(
        "run", "-d", "--name", "server", "-w", "/src", "-v", f"{source}:/src", work, *argv
    )
    ask = 'exec 3<>/dev/tcp/localhost/8080; printf "GET / HTTP/1.0\\r\\n\\r\\n" >&3; tail -n 1 <&3'

    def said() -> str:
        done = machine.docker("exec", "server", "bash", "-c", ask, check=False)
        return done.stdout.decode().strip()

    try:
        wait_until(lambda: said() == "0", 120, "the server answers")
        for number in range(1, 9):
            text = f'exports.word = "{number}";'
            if number % 2:
                (source / "word.js").write_text(text)
            else:
                new = source / ".word.js.swp"
                new.write_text(text)
                new.replace(source / "word.js")
            # The barrier of the exec that asks does not help it: node has the file in memory.
            wait_until(lambda number=number: said() == str(number), 60, f"reload {number}")
    finally:
        print(machine.docker("logs", "server", check=False).stdout.decode()[-2000:])
        machine.docker("rm", "-f", "server")


def git(source: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Host", "-c", "user.email=host@localhost"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=source, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_a_repository_is_worked_on_from_both_sides(box: Box, source: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    own = "-c user.name=Guest -c user.email=guest@localhost -c safe.directory=/src"
    git(source, "init", "-b", "main")
    for number in range(8):
        (source / "shared.txt").write_text(f"host {number}\n")
        (source / f"host-{number}.txt").write_text("h" * number)
        git(source, "add", "-A")
        git(source, "commit", "-qm", f"host {number}")
        box.run(
            f"git {own} log -1 --format=%s | grep -qx 'host {number}';"
            f' test -z "$(git {own} status --porcelain)";'
            f" echo guest {number} >>shared.txt; git {own} checkout -q -b guest-{number};"
            f" git {own} commit -qam 'guest {number}'"
        )
        assert git(source, "log", "-1", "--format=%s").strip() == f"guest {number}"
        assert git(source, "status", "--porcelain") == ""
        git(source, "checkout", "-q", "main")
        git(source, "merge", "-q", f"guest-{number}")
    box.run(f"git {own} gc -q; git {own} fsck --full --strict")
    git(source, "fsck", "--full", "--strict")
    assert len(git(source, "log", "--format=%s").splitlines()) == 16
    same(box, source)


def test_npm_installs_in_the_mount(box: Box, source: Path) -> None:
    box.run("cp /opt/npm/package*.json .")
    assert (source / "package-lock.json").exists()
    box.run(NPM, "-e", "HOME=/tmp")
    modules = source / "node_modules"
    assert (modules / "express" / "package.json").exists()
    assert (modules / ".package-lock.json").exists()
    same(box, source)
    # From a directory that the host has emptied; and what was installed runs.
    shutil.rmtree(modules)
    box.run("test ! -e node_modules")
    box.run(NPM, "-e", "HOME=/tmp")
    assert box.run("node -p \"typeof require('express')\"").strip() == "function"
    same(box, source)


def test_postgresql_keeps_its_data_in_the_mount(machine: Sandbox, work: str, source: Path) -> None:
    start = (
        "mkdir -p /src/data; chown postgres /src/data;"
        " cd /src; if [ ! -e data/PG_VERSION ]; then su postgres -c"
        " '/usr/lib/postgresql/17/bin/initdb -D /src/data --no-locale -E UTF8 -A trust'; fi;"
        " exec su postgres -c 'exec /usr/lib/postgresql/17/bin/postgres -D /src/data -k /tmp'"
    )

    def begin() -> None:
        machine.docker(
            "run", "-d", "--name", "base", "-v", f"{source}:/src", work, "bash", "-c", start
        )
        wait_until(lambda: not query("SELECT 1", check=False).returncode, 300, "it answers")

    def query(text: str, *, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        argv = ["exec", "base", "psql", "-U", "postgres", "-h", "localhost", "-tAc", text]
        return machine.docker(*argv, check=check)

    def bench(*arguments: str) -> str:
        argv = ["exec", "base", "pgbench", "-U", "postgres", "-h", "localhost", *arguments]
        argv.append("postgres")
        return machine.docker(*argv, timeout=SLOW_S).stdout.decode()

    try:
        begin()
        bench("-i", "-q", "-s", "1")
        for number in range(2):
            # Without -n it would empty the history first.
            assert "failed transactions: 0 " in bench("-n", "-c", "4", "-T", "10")
            history = query("SELECT count(*) FROM pgbench_history").stdout
            if number:
                # The power of the container: its data is recovered from its log.
                machine.docker("kill", "base")
            else:
                machine.docker("stop", "-t", "60", "base")
            machine.docker("rm", "base")
            assert (source / "data" / "PG_VERSION").exists()
            assert not (source / "data" / "postmaster.pid").exists() or number
            began = time.monotonic()
            begin()
            print(f"again after {time.monotonic() - began:.1f} s, {history!r} transactions")
            assert query("SELECT count(*) FROM pgbench_history").stdout == history
            sums = query(
                "SELECT (SELECT sum(abalance) FROM pgbench_accounts)"
                " = (SELECT sum(delta) FROM pgbench_history)"
            )
            assert sums.stdout == b"t\n"
        # Its own mode and owner, which the host has nothing of, were kept.
        shown = machine.docker("exec", "base", "stat", "-c", "%U %a", "/src/data")
        assert shown.stdout == b"postgres 700\n"
        machine.docker("stop", "-t", "60", "base")
        assert os.access(source / "data" / "global" / "pg_control", os.R_OK)
    finally:
        print(machine.docker("logs", "base", check=False).stderr.decode()[-3000:])
        machine.docker("rm", "-f", "base")
