"""What wherry has of the system: directories, processes, sockets, changes in a tree."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import win32security

from wherry.config.layout import Layout, MachinePaths
from wherry.control.client import call
from wherry.control.server import ControlServer
from wherry.core.errors import NotRunning
from wherry.platform import Platform, current
from wherry.platform.windows import unix
from wherry.platform.windows.security import user_sid
from wherry.service import docker_context, state
from wherry.sync.core.traits import Traits
from wherry.tunnel.keys import make_keys
from wherry.vm.qemu.process import find, identify

from .conftest import UNDER_WINE, WAIT_S

pytestmark = pytest.mark.windows

COMMAND_S = 120
"""For a program in Python, which takes seconds to begin under Wine."""


@pytest.fixture
def here() -> Platform:
    return current()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_this_is_a_system(here: Platform) -> None:
    assert here.accelerators[-1] == "tcg"
    assert here.accelerator_problem("tcg") is None
    assert here.accelerator_problem("kvm") == "Windows does not have it"
    assert here.architecture() in {"x86_64", "aarch64"}
    assert here.cpu_count() >= 1
    assert here.memory_bytes() > 1 << 28
    assert here.cpu_model()
    assert here.hosts_file.exists()
    assert here.drives
    for servers in here.resolvers().servers:
        assert servers.domain == ""
        assert all(ipaddress.ip_address(host) and port == 53 for host, port in servers.addresses)
    assert here.data_directory == Path(os.environ["LOCALAPPDATA"]) / "wherry"
    assert here.raise_descriptor_limit(4096) == 4096
    assert here.default_docker_socket() is None
    assert f"{Path.home().drive}\\" in here.shared_directories()


@pytest.mark.skipif(not UNDER_WINE, reason="a computer with Windows may have it")
def test_whpx_is_told_to_be_off(here: Platform) -> None:
    problem = here.accelerator_problem("whpx")
    assert problem is not None
    assert "Windows Features" in problem


def test_the_boot_has_one_id_for_all_programs(here: Platform) -> None:
    script = "from wherry.platform import current; print(current().boot_id())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert other.stdout.decode().strip() == here.boot_id()


def access(path: Path) -> str:
    found = win32security.GetNamedSecurityInfo(
        str(path), win32security.SE_FILE_OBJECT, win32security.DACL_SECURITY_INFORMATION
    )
    text: str = win32security.ConvertSecurityDescriptorToStringSecurityDescriptor(
        found, 1, win32security.DACL_SECURITY_INFORMATION
    )
    return text


def test_a_directory_is_the_users_alone(here: Platform, tmp_path: Path) -> None:
    made, narrowed = tmp_path / "a" / "made", tmp_path / "narrowed"
    narrowed.mkdir()
    for path in (made, narrowed):
        here.make_private_directory(path)
        here.make_private_directory(path)
        (path / "file").write_text("x")
        assert (path / "file").read_text() == "x"
        if not UNDER_WINE:
            # Wine keeps modes in place of lists.
            assert access(path) == f"D:P(A;OICI;FA;;;{user_sid()})"
    with pytest.raises(OSError):
        here.make_private_directory(narrowed / "file")


def test_a_leashed_program_passes_output_and_status(here: Platform) -> None:
    script = "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(7)"
    argv = here.leash([sys.executable, "-c", script, "a  b", 'c"d'])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leashed:
        assert leashed.wait(WAIT_S) == 7
        assert leashed.stdout is not None
        assert leashed.stdout.read().split() == b"['a  b', 'c\"d']".split()


@pytest.mark.parametrize("how", ["its input ends", "it is killed"])
def test_a_leashed_program_is_killed_when(here: Platform, how: str) -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    argv = here.leash([sys.executable, "-c", script])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leashed:
        assert leashed.stdout is not None
        assert leashed.stdin is not None
        pid = int(leashed.stdout.readline())
        assert find(identify(pid)) is not None
        if how == "its input ends":
            leashed.stdin.close()
        else:
            leashed.kill()
        leashed.wait(WAIT_S)
        eventually(lambda: not psutil.pid_exists(pid))


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    identity = identify(os.getpid())
    assert find(identity) is not None
    assert find(replace(identity, started=identity.started - 1)) is None
    assert find(replace(identity, boot="another")) is None


# Sockets of other programs


def test_the_address_of_a_unix_socket() -> None:
    made = unix.address(Path(r"C:\Users\a\qmp.sock"))
    assert made[:2] == struct.pack("<H", 1)
    assert made[2:].rstrip(b"\0") == rb"C:\Users\a\qmp.sock"
    assert len(made) == 110
    with pytest.raises(OSError, match="too long"):
        unix.address(Path("C:\\" + "x" * 110))


def test_a_socket_made_by_winsock_serves_the_loop() -> None:
    """By the loopback network, as Wine has no Unix sockets: all is the same but the family."""

    async def talk() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.read(100))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        address = struct.pack("<H", socket.AF_INET) + struct.pack(
            ">H4s8x", port, bytes((127, 0, 0, 1))
        )
        made = unix.connect_to(socket.AF_INET, address)
        reader, writer = await asyncio.open_connection(sock=made)
        writer.write(b"hello")
        assert await reader.read() == b"hello"
        writer.close()
        server.close()

    asyncio.run(talk())


def test_a_unix_socket_that_nobody_has(here: Platform, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        here.connect_unix(Path("C:\\none.sock"))


@pytest.mark.skipif(UNDER_WINE, reason="Wine 8 has no Unix sockets")
def test_a_unix_socket(here: Platform) -> None:
    listener = socket.socket(1, socket.SOCK_STREAM)
    path = Path(os.environ["TEMP"]) / f"wherry-{os.getpid()}.sock"
    address = unix.address(path)
    assert not ctypes.WinDLL("ws2_32").bind(listener.fileno(), address, len(address))
    listener.listen()
    try:
        with here.connect_unix(path) as client:
            server, _ = listener.accept()
            client.sendall(b"hello")
            assert server.recv(10) == b"hello"
            server.close()
    finally:
        listener.close()
        path.unlink()


# The control API


def test_control_requests_travel_by_pipe(here: Platform, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with pytest.raises(NotRunning):
        call(here, path, "hello")

    async def serve() -> None:
        async def count(params: dict[str, int], emit: Callable[[dict[str, int]], None]) -> int:
            for number in range(params["to"]):
                emit({"number": number})
            return params["to"]

        server = ControlServer(
            here.listen_local(path), {"count": count}, asyncio.get_running_loop()
        )
        events: list[object] = []
        try:
            for _ in range(5):
                events.clear()
                ask = lambda: call(here, path, "count", {"to": 300}, on_event=events.append)  # noqa: E731
                assert await asyncio.to_thread(ask) == 300
                assert len(events) == 300
        finally:
            await asyncio.to_thread(server.close)

    asyncio.run(serve())
    assert not [each for each in threading.enumerate() if each.name.startswith("control")]
    with pytest.raises(NotRunning):
        call(here, path, "hello")


# The command line


def wherry(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wherry", *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )


def test_the_command_line_without_a_machine() -> None:
    shown = wherry("--help")
    assert shown.returncode == 0
    assert "start" in shown.stdout
    for command in (("status",), ("env",), ("stop",)):
        done = wherry(*command)
        assert done.returncode == 3, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert wherry("list", "--json").stdout.strip() == "[]"


def test_a_machine_that_is_stopped(tmp_path: Path) -> None:
    machine = tmp_path / "home" / "machines" / "default"
    machine.mkdir(parents=True)
    (machine / "config.toml").write_text("cpus = 1\n")
    told = json.loads(wherry("status", "--json").stdout)
    assert told["state"] == "stopped"
    assert told["docker_host"] == "npipe:////./pipe/wherry"
    env = wherry("env")
    assert env.stdout.splitlines()[0] == "$Env:DOCKER_HOST = 'npipe:////./pipe/wherry'"
    assert wherry("config", "set", "memory", "1GiB").returncode == 0
    assert "1 GiB" in wherry("config", "show").stdout
    assert wherry("config", "set", "memory", "nonsense").returncode == 2


def test_a_context_of_dockers(tmp_path: Path) -> None:
    docker_context.create("wherry", "npipe:////./pipe/wherry", "default")
    docker_context.use("wherry")
    script = "import docker; c = docker.ContextAPI.get_current_context(); print(c.name, c.Host)"
    read = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert read.stdout.split() == ["wherry", "npipe:////./pipe/wherry"], read.stderr
    docker_context.remove("wherry")
    assert docker_context.current() == ""


# The service


BEGIN = """
import psutil
from wherry.config.layout import Layout
from wherry.control.client import call
from wherry.core.errors import WherryError
from wherry.platform import current
from wherry.service import launch, state
where = Layout.current(current())
paths = where.machine("default")
launch._APPEAR_TIMEOUT_S = 50  # of which Wine needs more than Windows
assert launch.ensure(where, paths)
service = state.read(paths).service
assert service.pid != psutil.Process().pid
"""
ASK = """
try:
    call(where.platform, paths.control_socket, "wait_running")
except WherryError as error:
    print(error.message)
"""
KILL = """
psutil.Process(service.pid).kill()
"""


@pytest.fixture
def stopped(here: Platform) -> MachinePaths:
    """A machine that has all but a QEMU and an image."""
    layout = Layout.current(here)
    layout.prepare()
    paths = layout.machine("default")
    for directory in (paths.directory, paths.keys):
        here.make_private_directory(directory)
    paths.config.write_text("cpus = 1\n")
    make_keys(paths.keys)
    return paths


def run(*scripts: str) -> str:
    """Run a program as the command line is one, to its end, and return what it printed."""
    argv = [sys.executable, "-c", "".join(scripts)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_a_service_says_over_its_pipe_why_it_cannot_start(stopped: MachinePaths) -> None:
    said = run(BEGIN, ASK).strip()
    assert said
    eventually(lambda: state.read(stopped).service is None)
    left = state.read(stopped)
    assert (left.state, left.reason) == ("broken", said)
    assert wherry("stop").returncode == 0
    assert state.read(stopped).state == "stopped"


@pytest.mark.timeout(300)
def test_a_service_that_was_killed_is_found_dead(here: Platform, stopped: MachinePaths) -> None:
    run(BEGIN, KILL)
    eventually(lambda: state.read(stopped).service is None)
    with pytest.raises(NotRunning):
        call(here, stopped.control_socket, "hello")
    # It outlives who started it, who may have a console.
    run(BEGIN)
    done = wherry("stop", "--force")
    assert done.returncode == 0, done.stderr
    eventually(lambda: state.read(stopped).service is None)


# Changes in a tree


class Told(queue.SimpleQueue[str]):
    """A sink that remembers."""

    def dirty(self, directory: str, /) -> None:
        self.put(directory)

    def lost(self) -> None:
        self.put("lost")

    def failed(self, reason: str, /) -> None:
        self.put("failed")

    def notify(self) -> None:
        pass

    def until(self, wanted: str) -> None:
        while self.get(timeout=WAIT_S) != wanted:
            pass


@contextlib.contextmanager
def watching(here: Platform, root: Path, told: Told) -> Iterator[None]:
    watcher = here.watch_tree(root, told, lambda path, is_directory: path == "skipped")
    try:
        yield
    finally:
        watcher.close()
        watcher.close()


def test_changes_in_a_directory_are_told(here: Platform, tmp_path: Path) -> None:
    told = Told()
    with watching(here, tmp_path, told):
        (tmp_path / "f").write_text("1")
        told.until("")
    with watching(here, tmp_path / "f", told):
        (tmp_path / "f").write_text("2")
        told.until("")


@pytest.mark.skipif(UNDER_WINE, reason="Wine 8 tells nothing of directories that are new")
def test_changes_in_a_tree_are_told(here: Platform, tmp_path: Path) -> None:
    told = Told()
    with watching(here, tmp_path, told):
        (tmp_path / "a" / "b").mkdir(parents=True)
        told.until("")
        (tmp_path / "a" / "b" / "f").write_text("1")
        told.until("a/b")
        (tmp_path / "a" / "b" / "f").replace(tmp_path / "a" / "g")
        told.until("a")
        (tmp_path / "skipped").mkdir()
        told.until("")
        (tmp_path / "skipped" / "f").write_text("1")
        (tmp_path / "a" / "last").write_text("1")
        while (seen := told.get(timeout=WAIT_S)) != "a":
            assert seen != "skipped"


def test_a_buffer_that_ran_over_is_told(here: Platform, tmp_path: Path) -> None:
    """By a sink that holds the reader up while more changes than it has room for.

    Wine 8 tells it by an error, Windows by an answer without bytes.
    """
    hold = threading.Event()

    class Slow(Told):
        def notify(self) -> None:
            self.put("began")
            assert hold.wait(WAIT_S)

    told = Slow()
    with watching(here, tmp_path, told):
        (tmp_path / "first").write_text("1")
        told.until("began")
        for number in range(2000):
            (tmp_path / f"{number:0200}").write_text("1")
        hold.set()
        told.until("lost")
        (tmp_path / "last").write_text("1")
        told.until("")


# Names


def test_what_the_system_takes_for_one_name_is_one_for_us() -> None:
    upcase = ctypes.WinDLL("ntdll").RtlUpcaseUnicodeChar
    upcase.restype, upcase.argtypes = ctypes.c_wchar, (ctypes.c_wchar,)
    traits = Traits(case_sensitive=False)
    letters = defaultdict(set)
    for number in (*range(1, 0xD800), *range(0xE000, 0x10000)):
        letters[upcase(chr(number))].add(traits.fold(chr(number)))
    assert len(letters) < 0xF800 - 1000
    assert not [each for each in letters.values() if len(each) > 1]
