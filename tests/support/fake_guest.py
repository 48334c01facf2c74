"""The first process of the guest that ``fake_qemu`` pretends to run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

RUN = Path("/run")
POWEROFF = "#!/bin/sh\nkill -TERM 1\n"
SSHD_CONFIG = """\
HostKey /run/host_key
AuthorizedKeysFile /run/authorized_key
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PermitUserRC no
AllowStreamLocalForwarding yes
StreamLocalBindUnlink yes
UseDNS no
PrintMotd no
PrintLastLog no
SetEnv PATH=/run/bin:/usr/bin:/bin
"""


def main(settings: dict[str, Any]) -> None:
    """Boot as the settings say, then be the guest until it powers off."""
    control = socket.socket(fileno=settings["control"])
    for place in (RUN, Path("/var/lib")):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", str(place)], check=True)
    Path("/var/lib/docker").mkdir()
    # The user's shell starts with whatever the user keeps there, and as slowly.
    for start_file in (Path.home() / ".bashrc", Path("/etc/bash.bashrc")):
        if start_file.exists():
            subprocess.run(["mount", "--bind", "/dev/null", str(start_file)], check=True)
    if os.getuid() != 0:
        # The service logs in as root, and sshd of an ordinary user as nobody but himself.
        users = Path("/etc/passwd").read_text().splitlines(keepends=True)
        others = "".join(line for line in users if not line.startswith("root:"))
        root = f"root:x:{os.getuid()}:{os.getgid()}::{Path.home()}:/bin/sh\n"
        (RUN / "passwd").write_text(root + others)
        # A root that cannot log in by password is a locked account to it.
        (RUN / "shadow").write_text("root:open:1::::::\n")
        for name in ("passwd", "shadow"):
            subprocess.run(["mount", "--bind", f"/run/{name}", f"/etc/{name}"], check=True)
    for directory in ("sshd", "bin"):
        (RUN / directory).mkdir()
    (RUN / "bin/poweroff").write_text("#!/bin/sh\n" if settings.get("deaf") else POWEROFF)
    (RUN / "bin/poweroff").chmod(0o755)
    for name in ("iptables", "iptables-restore", "ip6tables", "ip6tables-restore"):
        # The agent's rules are for a network that is the guest's own, and this one is not.
        (RUN / "bin" / name).write_text("#!/bin/sh\n")
        (RUN / "bin" / name).chmod(0o755)
    python = f"sleep {settings.get('agent_delay_s', 0)}; exec {Path(sys.executable).resolve()}"
    (RUN / "bin/python3").write_text(f'#!/bin/sh\n{python} "$@"\n')
    (RUN / "bin/python3").chmod(0o755)
    (RUN / "sshd_config").write_text(SSHD_CONFIG)
    for name in ("host_key", "authorized_key"):
        (RUN / name).write_bytes(Path(settings[name]).read_bytes())
        (RUN / name).chmod(0o600)
    signal.signal(signal.SIGTERM, lambda *_: power_off(control))
    # Whatever ends in here has this process for its parent.
    signal.signal(signal.SIGCHLD, reap)

    def say(line: str) -> None:
        with open(settings["console"], "ab") as console:  # noqa: PTH123
            console.write(line.encode() + b"\r\n")

    last = settings.get("last_line", "wherry: engine")
    threading.Thread(target=serve_connections, args=(control,), daemon=True).start()
    for line in ("[    0.1] Linux", "wherry: init", "wherry: ssh", "wherry: engine"):
        if line == "wherry: engine" and settings.get("engine") != "absent":
            threading.Thread(target=serve_engine, args=(settings,), daemon=True).start()
        time.sleep(settings.get("delay_s", 0))
        if line == settings.get("full_at"):
            control.send(b"no-space")
        say(line)
        if line == last:
            break
    if fatal := settings.get("fatal"):
        time.sleep(settings.get("fatal_after_s", 0))
        say(fatal)
        if not settings.get("lives_on"):
            power_off(control)
    while True:
        signal.pause()


def power_off(control: socket.socket) -> None:
    """End as a guest that shut itself down."""
    with contextlib.suppress(OSError):
        control.send(b"guest-shutdown")
    os._exit(0)


def reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def serve_connections(control: socket.socket) -> None:
    """Give each connection an sshd; without QEMU there is no guest."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 100, 1)
        if not message:
            os._exit(1)
        (connection,) = descriptors
        log = os.open("/run/sshd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.posix_spawn(
            "/usr/sbin/sshd",
            ["/usr/sbin/sshd", "-i", "-e", "-f", "/run/sshd_config"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, connection, 0),
                (os.POSIX_SPAWN_DUP2, connection, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
        )
        os.close(connection)
        os.close(log)


def serve_engine(settings: dict[str, Any]) -> None:
    """Answer what the service asks of the engine."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/run/docker.sock")
    listener.listen(100)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, settings), daemon=True).start()


def answer(connection: socket.socket, settings: dict[str, Any]) -> None:
    with connection, contextlib.suppress(OSError):
        request = b""
        while b"\r\n\r\n" not in request:
            if not (more := connection.recv(65536)):
                return
            request += more
        target = request.split()[1].decode()
        status, body = "200 OK", "OK"
        stuck = tuple(settings.get("stuck", ()))
        if settings.get("engine") == "sick":
            status, body = "500 Internal Server Error", '{"message": "sick"}'
        elif target.startswith("/containers/json") and "/containers/json" not in stuck:
            body = "[]"
        elif target.startswith(stuck):
            connection.recv(1)
            return
        elif target.startswith("/volumes"):
            body = "{}"
        elif target.startswith("/events"):
            head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            connection.recv(1)
            return
        connection.sendall(
            f"HTTP/1.1 {status}\r\nServer: Docker/28.5.2 (linux)\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
