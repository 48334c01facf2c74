"""The docker CLI with containers: streams, terminals, files."""

from __future__ import annotations

import io
import os
import signal
import socket
import tarfile
from pathlib import Path

import pytest
from docker_clients import Clients, write_tree
from loopback import free_port
from registries import wait_listening
from terminal import Terminal

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture
def box(clients: Clients) -> str:
    """A container that runs and does nothing."""
    clients.docker("run", "-d", "--name", "box", "--init", "busybox", "sleep", "100000")
    return "box"


def test_run_passes_input_its_end_both_outputs_and_the_status(clients: Clients) -> None:
    """What is printed after the end of the input arrives too."""
    script = "cat; sleep 1; echo out; echo err >&2; exit 42"
    done = clients.docker(
        "run", "-i", "--rm", "busybox", "sh", "-c", script, input=b"a\0b\n", check=False
    )
    assert done.returncode == 42
    assert done.stdout == b"a\0b\nout\n"
    assert done.stderr == b"err\n"


def test_run_in_a_terminal(clients: Clients) -> None:
    """A shell prompts, follows the window's size, is interrupted by Ctrl-C and ends."""
    argv = [clients.program, "run", "-it", "--rm", "-w", "/tmp", "busybox", "sh"]
    with Terminal(argv, clients.env) as terminal:
        terminal.expect("/tmp # ")
        terminal.resize(41, 123)
        # The size follows when the engine has been told it.
        terminal.type("until [ \"$(stty size)\" = '41 123' ]; do sleep 0.1; done; echo re''sized\n")
        terminal.expect("resized")
        terminal.type("sh -c 'echo be''gun; sleep 1000'\n")
        terminal.expect("begun")
        terminal.type("\x03")
        terminal.expect("/tmp # ")
        terminal.type("exit 42\n")
        assert terminal.wait() == 42


def test_leaving_a_terminal_leaves_the_container_running(clients: Clients) -> None:
    """Detach keys end the client alone; attach comes back to the same shell."""
    clients.docker("run", "-dit", "--name", "shell", "busybox", "sh")
    with Terminal([clients.program, "attach", "shell"], clients.env) as terminal:
        terminal.type("x=kept; echo is-$x\n")
        terminal.expect("is-kept")
        terminal.type("\x10\x11")
        terminal.expect("read escape sequence")
        terminal.wait()
    with Terminal([clients.program, "attach", "shell"], clients.env) as terminal:
        terminal.type("echo still-$x\n")
        terminal.expect("still-kept")
        terminal.type("exit 3\n")
        assert terminal.wait() == 3


def test_exec_ends_when_its_input_ends(clients: Clients, box: str) -> None:
    """``echo hi | docker exec -i c cat``."""
    assert clients.docker("exec", "-i", box, "cat", input=b"hi\n").stdout == b"hi\n"
    assert clients.docker("exec", "-i", box, "cat", input=b"").stdout == b""
    assert clients.docker("exec", box, "sh", "-c", "exit 9", check=False).returncode == 9
    # More than all buffers on the way hold, in both directions at once.
    data = os.urandom(6 << 20)
    assert clients.docker("exec", "-i", box, "cat", input=data).stdout == data


def test_exec_in_a_terminal(clients: Clients, box: str) -> None:
    argv = [clients.program, "exec", "-it", "-e", "NAME=value", "-w", "/bin", box, "sh"]
    with Terminal(argv, clients.env) as terminal:
        terminal.expect("/bin # ")
        terminal.type("tty; echo $NAME\n")
        terminal.expect("/dev/pts/")
        terminal.expect("value")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_files_are_copied_both_ways(clients: Clients, box: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    data = os.urandom(2 << 20)
    (source / "sub" / "data").write_bytes(data)
    (source / "sub" / "tool").write_text("#!/bin/sh\necho ran\n")
    (source / "sub" / "tool").chmod(0o755)

    clients.docker("cp", source, f"{box}:/copy")
    assert clients.said("exec", box, "/copy/sub/tool") == "ran"
    clients.docker("cp", f"{box}:/copy", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "data").read_bytes() == data

    stream = clients.docker("cp", f"{box}:/copy/sub/tool", "-").stdout
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        assert archive.getnames() == ["tool"]
    clients.docker("cp", "-", f"{box}:/bin", input=stream)
    assert clients.said("exec", box, "tool") == "ran"


def test_a_container_s_life(clients: Clients, box: str) -> None:
    """Wait, pause, stop, start, rename, top, inspect and update answer as they do locally."""
    clients.docker("exec", box, "touch", "/made")
    with clients.started("wait", box) as waiting:
        clients.docker("pause", box)
        assert clients.said("inspect", "-f", "{{.State.Status}}", box) == "paused"
        clients.docker("unpause", box)
        assert "sleep 100000" in clients.said("top", box)
        clients.docker("update", "--memory", "64m", "--memory-swap", "64m", box)
        clients.docker("kill", "-s", "TERM", box)
        assert waiting.wait() == 0
        assert waiting.lines == ["143"]
    clients.docker("rename", box, "crate")
    clients.docker("start", "crate")
    assert clients.said("ps", "--format", "{{.Names}}") == "crate"
    clients.docker("stop", "-t", "20", "crate")
    assert "A /made" in clients.said("diff", "crate")


def test_the_mounted_socket_is_the_guest_s_engine(
    clients: Clients, debian: str, tmp_path: Path
) -> None:
    """``-v /var/run/docker.sock:/var/run/docker.sock`` works as on a local engine."""
    (tmp_path / "docker").write_bytes(Path(clients.program).read_bytes())
    (tmp_path / "docker").chmod(0o755)
    write_tree(tmp_path, {"Dockerfile": f"FROM {debian}\nCOPY docker /usr/bin/docker\n"})
    image = clients.said("build", "-q", tmp_path)
    said = clients.said(
        "run", "--rm", "--name", "inner", "-v", "/var/run/docker.sock:/var/run/docker.sock",
        image, "docker", "ps", "--format", "{{.Names}}",
    )  # fmt: skip
    assert said == "inner"
    # A start that wherry sees only as the engine's event.
    port = free_port()
    clients.docker(
        "run", "--rm", "-v", "/var/run/docker.sock:/var/run/docker.sock", image,
        "docker", "run", "-d", "--name", "outer", "-p", f"127.0.0.1:{port}:80",
        "busybox", "httpd", "-f", "-p", "80",
    )  # fmt: skip
    wait_listening(port)
    clients.docker("rm", "-f", "outer")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    clients.docker("rmi", image)


def test_a_container_uses_the_keys_of_the_user_s_agent(
    clients: Clients, debian: str, agent: tuple[str, str]
) -> None:
    """Every user of it does, and the agent is looked up each time."""
    socket_path, fingerprint = agent
    path = "/run/host-services/ssh-auth.sock"
    clients.docker(
        "run", "-d", "--name", "keys", "-u", "1234:1234", "-v", f"{path}:{path}",
        "-e", f"SSH_AUTH_SOCK={path}", debian, "sleep", "1000",
    )  # fmt: skip

    def keys() -> str:
        done = clients.docker("exec", "keys", "ssh-add", "-l", check=False)
        return (done.stdout + done.stderr).decode()

    clients.machine.wherry("config", "set", "ssh.agent", socket_path)
    try:
        assert fingerprint in keys()
        # The socket in the container outlives the service.
        os.kill(clients.machine.status()["service_pid"], signal.SIGKILL)
        clients.machine.wherry("start")
        assert fingerprint in keys()
        clients.machine.wherry("config", "set", "ssh.agent", f"{socket_path}.gone")
        assert "communication with agent failed" in keys()
    finally:
        clients.machine.wherry("config", "unset", "ssh.agent")
