"""Bind mounts: what is on the host is in the container, and the other way round, to the byte.

Everything is real: the docker CLI, the engine, files on this computer's disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import stat
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import docker
import pytest
from mount_trees import LIST, Editor, listed
from sandbox import Sandbox, wait_until
from stub_engine import Client
from sync_trees import read

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stdout.decode()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the host to mount."""
    found = tmp_path / "src"
    found.mkdir()
    return found


@pytest.fixture
def box(machine: Sandbox, source: Path) -> Iterator[str]:
    """A container that runs and has the directory at /src."""
    name = f"box-{source.parent.name.lower()}"[:60]
    machine.docker("run", "-d", "--name", name, "-v", f"{source}:/src", "busybox", "sleep", "9999")
    yield name
    machine.docker("rm", "-f", name)


@pytest.fixture
def python(machine: Sandbox, source: Path) -> Iterator[str]:
    """A container like it with a Python, which is the guest's own."""
    name = f"python-{source.parent.name.lower()}"[:60]
    guest = ["-v", "/usr:/usr:ro", "-v", "/usr/lib:/lib:ro", "-v", "/usr/lib64:/lib64:ro"]
    machine.docker(
        "run", "-d", "--name", name, "-v", f"{source}:/src", *guest, "busybox", "sleep", "9999"
    )
    yield name
    machine.docker("rm", "-f", name)


def run(machine: Sandbox, source: Path, script: str, *options: str) -> str:
    return said(
        machine.docker(
            "run", "--rm", "-v", f"{source}:/src", *options, "busybox", "sh", "-c", script
        )
    )


CHANGE = r"""
i=$1
echo "round $i" >/src/from-$i
mkdir -p /src/made/$i
dd if=/dev/urandom of=/src/made/$i/data bs=777 count=$((i % 40 + 1)) 2>/dev/null
[ -d /src/made/$((i - 2)) ] && rm -r /src/made/$((i - 2))
f=$(find /src -type f | sort | sed -n "$((i % 7 + 1))p")
[ "$f" ] && echo "seen by $i" >>"$f"
:
"""


WRITER = "cd /src/busy; i=0; while :; do i=$((i+1)); echo $i >f$((i % 500)); usleep 2000; done"
"""Writes some 200 files a second."""


@pytest.mark.parametrize(
    ("seed", "rounds", "busy"),
    [
        (1, 10, False),
        pytest.param(4, 200, True, marks=[pytest.mark.endurance, pytest.mark.timeout(3600)]),
    ],
)
def test_neither_side_ever_sees_something_old(
    machine: Sandbox, source: Path, box: str, seed: int, rounds: int, busy: bool
) -> None:
    own = source / "own"
    own.mkdir()
    if busy:
        (source / "busy").mkdir()
        machine.docker("exec", "-d", box, "sh", "-c", WRITER)
    editor = Editor(own, seed)
    view, change = (script.replace("/src", "/src/own") for script in (LIST, CHANGE))
    for number in range(rounds):
        editor.edit()
        expected = listed(own)
        script = f"({view}); echo ==; {change}\n({view})"
        done = machine.docker(
            "run", "--rm", "-v", f"{source}:/src", "busybox", "sh", "-c", script, "sh", str(number)
        )
        here = listed(own)
        before, after = said(done).split("==\n")
        assert sorted(before.splitlines()) == expected, f"old in the container, round {number}"
        assert here == sorted(after.splitlines()), f"old on the host, round {number}"


def test_neither_does_a_command_in_a_running_container(
    machine: Sandbox, source: Path, box: str
) -> None:
    editor = Editor(source, 2)
    for number in range(25):
        editor.edit()
        expected = listed(source)
        script = f"({LIST}); echo ==; {CHANGE}\n({LIST})"
        done = machine.docker("exec", box, "sh", "-c", script, "sh", str(number))
        here = listed(source)
        before, after = said(done).split("==\n")
        assert sorted(before.splitlines()) == expected, f"old in the container, round {number}"
        assert here == sorted(after.splitlines()), f"old on the host, round {number}"


def test_neither_while_another_container_keeps_writing(
    machine: Sandbox, source: Path, box: str
) -> None:
    (source / "busy").mkdir()
    (source / "own").mkdir()
    machine.docker("exec", "-d", box, "sh", "-c", WRITER)
    editor = Editor(source / "own", 3)
    for number in range(10):
        editor.edit()
        expected = listed(source / "own")
        script = LIST.replace("/src", "/src/own")
        command = f"({script}); echo ==; echo {number} >/src/own/from-container; ({script})"
        done = machine.docker("exec", box, "sh", "-c", command)
        before, after = said(done).split("==\n")
        assert sorted(before.splitlines()) == expected
        assert listed(source / "own") == sorted(after.splitlines())


def test_the_copy_is_at_the_path_of_the_host(machine: Sandbox, source: Path, box: str) -> None:
    """So an IDE finds in the inspection what it asked for."""
    (mount,) = json.loads(machine.docker("inspect", box).stdout)[0]["Mounts"]
    assert (mount["Source"], mount["Destination"]) == (str(source), "/src")


def test_a_single_file_stays_attached_through_atomic_saves(
    machine: Sandbox, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text("one")
    name = "single"
    machine.docker(
        "run", "-d", "--name", name, "-v", f"{config}:/etc/config", "busybox", "sleep", "9999"
    )
    try:
        for text in ("two", "a much longer third one", "4"):
            new = tmp_path / "config.tmp"
            new.write_text(text)
            new.replace(config)
            assert said(machine.docker("exec", name, "cat", "/etc/config")) == text
        machine.docker("exec", name, "sh", "-c", "echo from the container >/etc/config")
        assert config.read_text() == "from the container\n"
    finally:
        machine.docker("rm", "-f", name)


def test_a_file_of_a_mounted_directory_stays_attached_too(
    machine: Sandbox, source: Path, box: str
) -> None:
    config = source / "config"
    config.write_text("one")
    machine.docker(
        "run", "-d", "--name", "both", "-v", f"{config}:/etc/config", "busybox", "sleep", "9999"
    )
    try:
        new = source / "new"
        new.write_text("two")
        new.replace(config)
        assert said(machine.docker("exec", "both", "cat", "/etc/config")) == "two"
        assert said(machine.docker("exec", box, "cat", "/src/config")) == "two"
    finally:
        machine.docker("rm", "-f", "both")


def test_a_missing_source(machine: Sandbox, tmp_path: Path) -> None:
    missing = tmp_path / "a" / "b"
    done = machine.docker(
        "run", "--rm", "--mount", f"type=bind,source={missing},target=/src", "busybox", "true",
        check=False,
    )  # fmt: skip
    assert done.returncode == 125
    assert b"bind source path does not exist" in done.stderr
    assert not missing.exists()
    assert run(machine, missing, "echo made >/src/f") == ""
    assert (missing / "f").read_text() == "made\n"


def test_a_path_that_is_not_shared_is_refused_by_the_name_of_the_setting(machine: Sandbox) -> None:
    done = machine.docker("run", "--rm", "-v", "/nowhere/at/all:/x", "busybox", check=False)
    assert done.returncode == 125
    assert b"wherry config set sync.shared" in done.stderr
    assert b"/nowhere/at/all" in done.stderr
    # What the guest has itself can be mounted as with any engine.
    done = machine.docker("run", "--rm", "-v", "/etc/docker:/x:ro", "busybox", "true")
    assert done.returncode == 0


def test_what_is_written_to_a_read_only_mount_stays_in_the_guest(
    machine: Sandbox, source: Path
) -> None:
    (source / "f").write_text("host")
    assert run(machine, source, "cat /src/f", "--read-only") == "host"
    other = source.parent / "ro"
    other.mkdir()
    (other / "f").write_text("host")
    script = f"echo guest >{other}/g; cat {other}/f"
    machine.docker("run", "-d", "--name", "ro", "-v", f"{other}:/src:ro", "busybox", "sleep", "999")
    try:
        assert said(machine.wherry("shell", "--", "sh", "-c", script)) == "host"
        (other / "f").write_text("again")
        assert said(machine.docker("exec", "ro", "cat", "/src/f", "/src/g")) == "againguest\n"
        assert sorted(path.name for path in other.iterdir()) == ["f"]
        # Nor does it come when a container may write, unless that writes it.
        assert run(machine, other, "cat /src/g; echo mine >/src/h") == "guest\n"
        assert read(other) == {"f": "again", "h": "mine\n"}
        assert run(machine, other, "read g </src/g; echo $g >/src/g") == ""
        assert read(other) == {"f": "again", "g": "guest\n", "h": "mine\n"}
    finally:
        machine.docker("rm", "-f", "ro")


WATCHER = r"""
import ctypes, os, struct, sys
library = ctypes.CDLL(None)
watch = library.inotify_init()
library.inotify_add_watch(watch, sys.argv[1].encode(), 0xFFF & ~0x33 | 0x2)
print("watching", flush=True)
while True:
    data = os.read(watch, 65536)
    while data:
        _, mask, _, length = struct.unpack_from("iIII", data)
        print(hex(mask), data[16:16 + length].rstrip(b"\0").decode(), flush=True)
        data = data[16 + length:]
"""


class Watcher:
    """A program in a container that watches a path by inotify(7).

    :ivar heard: when, and the line with the event's mask and name.
    """

    def __init__(self, machine: Sandbox, container: str, path: str) -> None:
        argv = ["docker", "--context", "wherry", "exec", container, "python3", "-c", WATCHER, path]
        self._process = subprocess.Popen(argv, env=machine.env, stdout=subprocess.PIPE)
        self.heard: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.wait("watching", timeout_s=60)
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.heard.append((time.monotonic(), line.decode()))

    def wait(self, text: str, times: int = 1, timeout_s: float = 10) -> float:
        """Return when it was heard so often."""
        wait_until(lambda: len(self._matching(text)) >= times, timeout_s, f"{text} is heard")
        return self._matching(text)[times - 1]

    def _matching(self, text: str) -> list[float]:
        return [at for at, line in list(self.heard) if text in line]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


def test_a_watcher_in_the_container_hears_of_each_save(
    machine: Sandbox, source: Path, python: str
) -> None:
    delays: dict[str, list[float]] = {}
    with closing(Watcher(machine, python, "/src")) as watcher:

        def act(name: str, action: Callable[[], object], heard: str) -> None:
            saved = time.monotonic()
            action()
            delays.setdefault(name, []).append(watcher.wait(f"{heard}\n") - saved)

        for number in range(10):
            path, renamed = source / f"new-{number}", source / f"renamed-{number}"
            act("create", partial(path.write_text, "x"), f"new-{number}")
            # Written in place and closed (IN_CLOSE_WRITE), as it was on the host.
            act("modify", partial(path.write_text, "longer"), f"0x8 new-{number}")
            act("rename", partial(path.rename, renamed), f"0x80 renamed-{number}")
            # What we remove is moved away first, so it is MOVED_FROM (inotify(7)) that is heard.
            act("delete", renamed.unlink, f"0x40 renamed-{number}")
    # The way of the words out of the container is in these as well.
    for action, found in delays.items():
        assert max(found) <= 1, (action, found)
        assert statistics.median(found) <= 0.15, (action, found)


def test_a_watcher_of_one_file_hears_of_each_save_in_place(
    machine: Sandbox, source: Path, python: str
) -> None:
    """As `node --watch` watches: of another file in its place it would hear nothing."""
    (source / "f").write_text("0")
    with closing(Watcher(machine, python, "/src/f")) as watcher:
        delays = []
        for number in range(1, 6):
            saved = time.monotonic()
            (source / "f").write_text(f"saved {number} times")
            delays.append(watcher.wait("0x8 ", number) - saved)
        assert said(machine.docker("exec", python, "cat", "/src/f")) == "saved 5 times"
        events = {line.split()[0] for _, line in watcher.heard[1:]}
    # Written, its times set, closed; not moved, replaced or removed.
    assert events <= {"0x2", "0x4", "0x8"}, events
    assert max(delays) <= 1, delays


DATABASE = r"""
import os, sqlite3, sys
base = sqlite3.connect("/src/base.db")
base.execute("PRAGMA journal_mode = WAL")
base.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER, d BLOB)")
for number in range(200):
    with base:
        base.execute("INSERT INTO t VALUES (?, ?)", (number, os.urandom(500)))
    if number % 20 == 0:
        base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
print(base.execute("PRAGMA integrity_check").fetchone()[0])
base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
base.close()
"""


def test_a_database_works_on_a_bind_mount(machine: Sandbox, source: Path, python: str) -> None:
    """In both directions: what one side has written the other one opens and goes on with."""
    for number in range(1, 3):
        done = machine.docker("exec", python, "python3", "-c", DATABASE)
        assert said(done) == "ok\n"
        with closing(sqlite3.connect(source / "base.db")) as base:
            assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert base.execute("SELECT count(*) FROM t").fetchone() == (number * 201 - 1,)
            base.execute("INSERT INTO t VALUES (1, 2)")
            base.commit()
            base.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def test_modes_links_and_odd_names(machine: Sandbox, source: Path, box: str) -> None:
    (source / "tool").write_text("#!/bin/sh\necho ran\n")
    (source / "tool").chmod(0o755)
    (source / "relative").symlink_to("tool")
    (source / "absolute").symlink_to("/etc/passwd")
    (source / "new\nline").write_text("n")
    (source / "ümlaut").write_text("u")
    (source / "empty").mkdir()
    assert said(machine.docker("exec", box, "/src/tool")) == "ran\n"
    assert said(machine.docker("exec", box, "sh", "-c", LIST)) is not None
    machine.docker(
        "exec", box, "sh", "-c",
        "cd /src; chmod -x tool; ln -s tool made; printf x >run; chmod +x run; mkfifo pipe;"
        " chown 70:70 ümlaut; chmod 600 ümlaut",
    )  # fmt: skip
    assert not (source / "tool").stat().st_mode & 0o111
    assert (source / "run").stat().st_mode & 0o111
    assert not (source / "run").stat().st_mode & stat.S_ISUID
    assert (source / "made").readlink() == Path("tool")
    assert not (source / "pipe").exists()
    # Owner and other bits are the container's own, and outlive an edit on the host.
    (source / "ümlaut").write_text("edited")
    shown = said(machine.docker("exec", box, "stat", "-c", "%u %a", "/src/ümlaut"))
    assert shown == "70 600\n"
    assert run(machine, source, 'cat "/src/new\nline"; readlink /src/absolute') == "n/etc/passwd\n"


def test_any_user_of_a_container_reads_and_writes_what_came_from_the_host(
    machine: Sandbox, source: Path
) -> None:
    (source / "d").mkdir(mode=0o700)
    (source / "f").write_text("host\n")
    (source / "f").chmod(0o600)
    script = "cat /src/f; echo more >>/src/f; echo new | tee /src/new >/src/d/new; rm /src/f"
    assert run(machine, source, script, "--user", "4711:4711") == "host\n"
    assert sorted(path.name for path in source.rglob("*")) == ["d", "new", "new"]
    # What a container makes is its own, and the user's here.
    assert (source / "new").stat().st_uid == os.getuid()


@contextmanager
def unheard(machine: Sandbox) -> Iterator[Callable[[str], object]]:
    """Let the service stand still, so that neither side hears of the other's changes.

    Yields what runs a command in the guest all the same.
    """
    config = machine.home / "ssh_config"
    config.write_bytes(machine.wherry("ssh-config").stdout)
    argv = ["ssh", "-F", str(config), "wherry-default"]
    service = machine.status()["service_pid"]
    os.kill(service, signal.SIGSTOP)
    try:
        yield lambda command: subprocess.run([*argv, command], check=True, timeout=60)
    finally:
        os.kill(service, signal.SIGCONT)


def test_both_sides_changed_a_file(machine: Sandbox, source: Path, box: str) -> None:
    (source / "f").write_text("base")
    machine.docker("exec", box, "cat", "/src/f")
    with unheard(machine) as in_guest:
        (source / "f").write_text("from the host")
        in_guest(f"echo guest >{source}/f")
    assert said(machine.docker("exec", box, "cat", "/src/f")) == "from the host"
    assert (source / "f").read_text() == "from the host"
    found = json.loads(machine.wherry("sync", "conflicts", "--json").stdout)
    (mine,) = [each for each in found if each["path"] == str(source / "f")]
    machine.wherry("sync", "resolve", mine["id"], "--restore")
    assert said(machine.docker("exec", box, "cat", "/src/f")) == "guest\n"
    found = json.loads(machine.wherry("sync", "conflicts", "--json").stdout)
    assert mine["id"] not in [each["id"] for each in found]


def test_what_did_not_reach_the_host_fails_who_asked_for_it(
    machine: Sandbox, source: Path, box: str
) -> None:
    """Where each client looks: by the path's name, and with the status of a failure."""
    (source / "d").mkdir()
    script = "mkdir -p /src/d; echo made >/src/d/f; echo ran"
    if subprocess.run(["chattr", "+i", source / "d"], check=False).returncode:
        pytest.skip("needs a filesystem with immutable directories")
    try:
        done = machine.docker("run", "--rm", "-v", f"{source}:/src", "busybox", "sh", "-c", script,
            check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (125, b"ran\n")
        assert str(source / "d" / "f").encode() in done.stderr
        for command in (("exec", box, "sh", "-c", script), ("stop", "-t", "0", box)):
            done = machine.docker(*command, check=False)
            assert done.returncode == 1, command
            assert str(source / "d" / "f").encode() in done.stderr, command
            assert b"not permitted" in done.stderr, command
    finally:
        subprocess.run(["chattr", "-i", source / "d"], check=True)
    machine.docker("start", box)
    assert (source / "d" / "f").read_text() == "made\n"
    # A file that both sides change while a command runs is named as well.
    (source / "f").write_text("base")
    argv = ["docker", "--context", "wherry", "exec", box, "sh", "-c"]
    command = subprocess.Popen(
        [*argv, "echo begun; until [ -e /src/go ]; do sleep 0.1; done; echo guest >/src/f"],
        env=machine.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert command.stdout is not None
    assert command.stdout.readline() == b"begun\n"
    with unheard(machine) as in_guest:
        in_guest(f"cd {source}; touch go; until grep -q guest f; do sleep 0.1; done")
        (source / "f").write_text("host")
    _, stderr = command.communicate(timeout=60)
    assert command.returncode == 1
    assert str(source / "f").encode() in stderr
    assert b"changed on both sides" in stderr
    assert (source / "f").read_text() == "host"


def test_copies_volumes_and_endings_wait_as_well(
    machine: Sandbox, source: Path, box: str, tmp_path: Path
) -> None:
    (tmp_path / "given").write_text("given")
    machine.docker("cp", str(tmp_path / "given"), f"{box}:/src/given")
    assert (source / "given").read_text() == "given"
    (source / "taken").write_text("taken")
    machine.docker("cp", f"{box}:/src/taken", str(tmp_path / "taken"))
    assert (tmp_path / "taken").read_text() == "taken"
    machine.docker(
        "volume", "create", "-o", "type=none", "-o", "o=bind", "-o", f"device={source}", "bound"
    )
    try:
        script = "cat /v/given; echo v >/v/by-volume"
        done = machine.docker("run", "--rm", "-v", "bound:/v", "busybox", "sh", "-c", script)
        assert said(done) == "given"
        assert (source / "by-volume").read_text() == "v\n"
    finally:
        machine.docker("volume", "rm", "bound")
    script = (
        'trap "sleep 1; echo late >/src/late; exit" TERM; echo >/src/heeds;'
        " while :; do sleep 0.1; done"
    )
    machine.docker(
        "run", "-d", "--name", "late", "-v", f"{source}:/src", "busybox", "sh", "-c", script
    )
    try:
        wait_until((source / "heeds").exists, 60, "it would heed the signal")
        machine.docker("stop", "-t", "30", "late")
        assert (source / "late").read_text() == "late\n"
    finally:
        machine.docker("rm", "-f", "late")


WRITTEN = (
    "mkdir -p /tmp; dd if=/dev/urandom of=/tmp/{0} bs=1M count=8 2>/dev/null;"
    " md5sum /tmp/{0} >/src/{0}.sum; cp /tmp/{0} /src/{0}"
)
"""What it does last takes longer to bring to the host than the word that it has ended."""


def is_whole(source: Path, name: str) -> bool:
    """Whether all that was written by that is on the host."""
    try:
        said = (source / f"{name}.sum").read_text().split()[0]
        return hashlib.md5((source / name).read_bytes(), usedforsecurity=False).hexdigest() == said
    except (FileNotFoundError, IndexError):
        return False


def test_events_of_an_end_come_after_the_files(machine: Sandbox, source: Path, box: str) -> None:
    # What happens until it listens is told as well.
    since = said(machine.docker("info", "--format", "{{.SystemTime}}")).strip()
    argv = ["docker", "--context", "wherry", "events", "--since", since]
    argv += ["--format", "{{.Action}} {{.ID}}"]
    with subprocess.Popen(argv, env=machine.env, stdout=subprocess.PIPE) as events:
        assert events.stdout is not None
        try:
            machine.docker("exec", box, "true")
            while not events.stdout.readline().startswith(b"exec_die"):
                pass
            machine.docker("exec", "-d", box, "sh", "-c", WRITTEN.format("command"))
            while not events.stdout.readline().startswith(b"exec_die"):
                pass
            assert is_whole(source, "command")
            script = WRITTEN.format("container")
            done = machine.docker(
                "run", "-d", "--rm", "-v", f"{source}:/src", "busybox", "sh", "-c", script
            )
            while events.stdout.readline() != b"die " + done.stdout:
                pass
            assert is_whole(source, "container")
        finally:
            events.kill()


def test_so_does_an_end_that_is_asked_for_again_and_again(
    machine: Sandbox, source: Path, box: str
) -> None:
    client = docker.APIClient(f"unix://{machine.home}/machines/default/docker.sock")
    try:
        id = client.exec_create(box, ["sh", "-c", WRITTEN.format("command")])["Id"]
        client.exec_start(id, detach=True)
        ends = time.monotonic() + 60
        while client.exec_inspect(id)["Running"]:
            assert time.monotonic() < ends
        assert is_whole(source, "command")
        script = WRITTEN.format("container")
        done = machine.docker("run", "-d", "-v", f"{source}:/src", "busybox", "sh", "-c", script)
        id = said(done).strip()
        ends = time.monotonic() + 60
        while client.inspect_container(id)["State"]["Running"]:
            assert time.monotonic() < ends
        assert is_whole(source, "container")
        client.remove_container(id)
    finally:
        client.close()


@contextmanager
def execution(
    machine: Sandbox, box: str, script: str, *, tty: bool
) -> Iterator[tuple[str, str, Client]]:
    """Run something in a container: its id, the kind of its stream, and the stream."""
    path = machine.home / "machines/default/docker.sock"
    with closing(docker.APIClient(f"unix://{path}")) as client, Client(path, 60) as stream:
        id = client.exec_create(box, ["sh", "-c", script], stdin=tty, tty=tty)["Id"]
        headers = ("Content-Type: application/json", "Connection: Upgrade", "Upgrade: tcp")
        body = json.dumps({"Tty": tty}).encode()
        stream.request("POST", f"/exec/{id}/start", *headers, body=body)
        status, found, _ = stream.answer()
        assert status == 101
        yield id, found["content-type"], stream


def test_a_command_that_closes_its_outputs_has_not_ended(
    machine: Sandbox, source: Path, box: str
) -> None:
    """So the end of its stream is its own, which the kind of the stream says."""
    script = "exec </dev/null >&- 2>&-; sleep 2; " + WRITTEN.format("command")
    with execution(machine, box, script, tty=False) as (_, kind, stream):
        assert kind == "application/vnd.docker.multiplexed-stream"
        stream.rest()
        assert is_whole(source, "command")


def test_a_command_whose_terminal_was_left_ends_later(
    machine: Sandbox, source: Path, box: str
) -> None:
    """And nobody asks for it meanwhile."""
    script = "until [ -e /src/go ]; do sleep 0.1; done; " + WRITTEN.format("command")
    with execution(machine, box, script, tty=True) as (id, _, terminal):
        terminal.send(b"\x10\x11")  # as ctrl-p ctrl-q
        terminal.rest()
    assert not (source / "command.sum").exists()
    (source / "go").touch()
    url = f"unix://{machine.home}/machines/default/docker.sock"
    with closing(docker.APIClient(url)) as client:
        ends = time.monotonic() + 60
        while any("dd if=" in each for line in client.top(box)["Processes"] for each in line):
            assert time.monotonic() < ends
        # The process is gone before the engine knows of it.
        while client.exec_inspect(id)["Running"]:
            assert time.monotonic() < ends
        assert is_whole(source, "command")


def test_what_wherry_keeps_is_nobody_s_to_mount(machine: Sandbox) -> None:
    home = machine.env["WHERRY_HOME"]
    done = machine.docker("run", "--rm", "-v", f"{home}:/x", "busybox", "true", check=False)
    assert done.returncode == 125
    assert f"{home} cannot be mounted: ".encode() in done.stderr


def test_the_command_line(machine: Sandbox, source: Path) -> None:
    def roots() -> dict[str, str]:
        found = json.loads(machine.wherry("sync", "list", "--json").stdout)
        return {each["path"]: each["state"] for each in found}

    (source / "f").write_text("f")
    machine.wherry("sync", "add", str(source), "--ignore", "*.log", "--ignore", "/tmp")
    assert roots()[str(source)] == "watching"
    (source / "f").write_text("again")
    (source / "a.log").write_text("here alone")
    machine.wherry("sync", "flush", str(source))
    assert said(machine.wherry("shell", "--", "cat", f"{source}/f")) == "again"
    assert said(machine.wherry("shell", "--", "ls", str(source))) == "f\n"
    assert str(source) in said(machine.wherry("sync", "status"))
    machine.wherry("sync", "remove", str(source))
    assert str(source) not in roots()
    for arguments, status, text in (
        (("flush", "/nowhere"), 1, b"/nowhere is not synchronised; see: wherry sync list"),
        (("add", "/nowhere"), 2, b"/nowhere does not exist"),
        (("add", f"{source}/f", "--ignore", "x"), 2, b"/f is a file, of which nothing can be"),
        (("add", str(source), "--ignore", "!"), 1, b"the root's ignore setting, line 1: "),
        (("resolve", "9.9", "--discard"), 1, b"there is no conflict 9.9"),
    ):
        done = machine.wherry("sync", *arguments, check=False)
        assert (done.returncode, done.stderr.count(b"\n")) == (status, 1)
        assert text in done.stderr


def test_a_directory_and_one_in_it_share_their_files(
    machine: Sandbox, source: Path, box: str
) -> None:
    inner, outer = source, source.parent
    (inner / "f").write_text("1")
    assert run(machine, outer, "cat /src/src/f; echo 2 >/src/src/g") == "1"
    assert said(machine.docker("exec", box, "cat", "/src/g")) == "2\n"
    assert (inner / "g").read_text() == "2\n"
    (inner / "f").write_text("3")
    assert said(machine.docker("exec", box, "cat", "/src/f")) == "3"


def test_ignored_files_are_each_sides_own(machine: Sandbox, source: Path) -> None:
    (source / ".wherryignore").write_text("node_modules\n")
    (source / "node_modules").mkdir()
    (source / "node_modules" / "mine").write_text("host")
    (source / "f").write_text("f")
    shown = run(machine, source, "ls /src; mkdir /src/node_modules; echo >/src/node_modules/its")
    assert shown == "f\n"
    assert [path.name for path in (source / "node_modules").iterdir()] == ["mine"]
    assert run(machine, source, "ls /src /src/node_modules") == (
        "/src:\nf\nnode_modules\n\n/src/node_modules:\nits\n"
    )


def test_the_service_is_killed_at_any_moment(machine: Sandbox, source: Path, box: str) -> None:
    editor = Editor(source, 5)
    for number in range(4):
        editor.edit()
        writer = threading.Thread(target=editor.edit)
        script = "for i in $(seq 40); do echo $i >/src/k$i; done"
        machine.docker("exec", "-d", box, "sh", "-c", script)
        writer.start()
        time.sleep(0.05 * number)
        service = machine.status()["service_pid"]
        if service:
            os.kill(service, signal.SIGKILL)
        writer.join()
        machine.wherry("start")
        there = sorted(said(machine.docker("exec", box, "sh", "-c", LIST)).splitlines())
        assert there == listed(source), f"round {number}"


def test_what_the_guest_loses_with_its_power_is_not_taken_for_edits(
    machine: Sandbox, source: Path, box: str
) -> None:
    for number in range(50):
        (source / f"f{number}").write_text(f"host {number}")
    (source / "tool").write_text("x")
    socket = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"
    machine.docker("exec", box, "true")
    machine.wherry("shell", "--", "python3", "-c", socket, f"{source}/socket")
    special = "cd /src; stat -c '%n %F %u:%g %a %t' null pipe socket tool f1"
    script = (
        "cd /src; mknod null c 1 3; mkfifo pipe; chown 70:71 null pipe socket tool f1;"
        " chmod 640 null pipe f1; chmod 600 socket; chmod 710 tool; sync; echo edited >/src/f0"
    )
    machine.docker("exec", box, "sh", "-c", script)
    # All of that is the guest's own: it is there after what comes from the host, and in the end.
    for name in ("f1", "tool"):
        (source / name).write_text("edited here as well")
    mine = said(machine.docker("exec", box, "sh", "-c", f"{special}; cat f1 >null"))
    assert mine == (
        "null character special file 70:71 640 1\npipe fifo 70:71 640 0\n"
        "socket socket 70:71 600 0\ntool regular file 70:71 710 0\nf1 regular file 70:71 640 0\n"
    )
    machine.docker("exec", box, "sync")
    assert not {"null", "pipe", "socket"} & {path.name for path in source.iterdir()}
    expected = listed(source)
    assert (source / "f0").read_text() == "edited\n"
    (source / "late").write_text("written just before")
    machine.docker("exec", box, "true")
    expected = listed(source)
    os.kill(machine.status()["qemu_pid"], signal.SIGKILL)
    wait_until(lambda: machine.status()["state"] == "broken", 30, "the loss is noticed")
    machine.wherry("start")
    machine.docker("start", box)
    there = sorted(said(machine.docker("exec", box, "sh", "-c", LIST)).splitlines())
    assert there == expected
    assert listed(source) == expected
    assert said(machine.docker("exec", box, "sh", "-c", special)) == mine


def test_an_emptied_directory_on_the_host_halts_and_names_itself(
    machine: Sandbox, source: Path, box: str
) -> None:
    for name in "abc":
        (source / name).write_text(name)
    machine.docker("exec", box, "true")
    moved = source.parent / "moved"
    source.rename(moved)
    source.mkdir()

    def halted() -> bool:
        (mine,) = [
            each
            for each in json.loads(machine.wherry("sync", "list", "--json").stdout)
            if each["path"] == str(source)
        ]
        return bool(mine["state"] == "halted")

    wait_until(halted, 20, "the root is halted")
    done = machine.docker("exec", box, "ls", "/src", check=False)
    assert done.returncode != 0
    assert str(source).encode() in done.stderr + done.stdout
    assert b"halted" in done.stderr + done.stdout
    source.rmdir()
    moved.rename(source)
    assert said(machine.docker("exec", box, "ls", "/src")) == "a\nb\nc\n"
