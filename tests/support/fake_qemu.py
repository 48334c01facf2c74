"""A QEMU without a virtual machine: what wherry sees of one, and nothing behind it.

It speaks QMP, locks its data disk as QEMU does, writes the guest's console and accepts
connections to the guest from its start on. The guest is this computer's own sshd with a
stub of the engine, in a mount and PID namespace with a ``/run`` of its own, so that
nothing of the computer's is touched, and all of it ends when this process does.

It runs as a program on PATH with the standard library alone. ``behaviour.json`` beside
the program says what goes wrong, ``calls.jsonl`` keeps every call.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(sys.argv[0]).resolve().parent

F_OFD_SETLK = 37  # fcntl.h
# block/file-posix.c: a byte for each permission that is used, and for each not shared.
LOCKED_BYTES = (100, 101, 103, 201, 203)

USERNET = """\
Hub -1 (net0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
"""


def behaviour() -> dict[str, Any]:
    """Return what should go wrong; empty for nothing."""
    try:
        found: dict[str, Any] = json.loads((HERE / "behaviour.json").read_text())
        return found
    except FileNotFoundError:
        return {}


def unshare() -> tuple[str, ...]:
    """Return the command that runs another in the guest's own namespaces.

    Whoever is not root becomes its master by a user namespace. He stays who he is in it, as
    sshd would change to users that the namespace has not, if it ran as root.
    """
    own = ("--user", "--map-current-user", "--keep-caps") if os.getuid() != 0 else ()
    return ("unshare", *own, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def main(argv: list[str]) -> int:
    """Do what a QEMU with these arguments would."""
    wanted = behaviour()
    with (HERE / "calls.jsonl").open("a") as log:
        log.write(json.dumps({"pid": os.getpid(), "argv": argv}) + "\n")
    if "--version" in argv:
        time.sleep(wanted.get("version_takes_s", 0))
        print(f"QEMU emulator version {wanted.get('version', '7.2.22')} (fake)")
        return 0
    if "-qmp" not in argv:
        return trial(argv, wanted)
    boots = (HERE / "calls.jsonl").read_text().count('"-qmp"')
    return Machine(argv, wanted | wanted.get("boots", {}).get(str(boots), {})).run()


def values(argv: list[str], option: str) -> list[dict[str, str]]:
    """Return an option's values as their parts, by key; the first part's key is empty."""
    found = []
    for position, word in enumerate(argv):
        if word == option:
            text = argv[position + 1].replace(",,", "\0")
            parts = [part.replace("\0", ",") for part in text.split(",")]
            found.append(dict(part.split("=", 1) for part in parts if "=" in part) | {"": parts[0]})
    return found


def trial(argv: list[str], wanted: dict[str, Any]) -> int:
    """Boot the probe's initramfs, or fail to."""
    accelerator = values(argv, "-accel")[0][""]
    how = wanted.get("trial", {}).get(accelerator, "boots")
    if how == "hangs":
        time.sleep(600)
    if how == "crashes":
        print(f"qemu: failed to initialize {accelerator}: Device or resource busy", file=sys.stderr)
        return 1
    print("\r\nwherry: init\r", flush=True)
    return 0


def requests(client: socket.socket) -> Iterator[dict[str, Any]]:
    """Read JSON objects, which nothing has to separate."""
    decoder, buffered = json.JSONDecoder(), ""
    while chunk := client.recv(65536):
        buffered += chunk.decode()
        with contextlib.suppress(json.JSONDecodeError):
            while buffered := buffered.lstrip():
                request, end = decoder.raw_decode(buffered)
                buffered = buffered[end:]
                yield request


class Machine:
    """One virtual machine."""

    def __init__(self, argv: list[str], wanted: dict[str, Any]) -> None:
        self._wanted = wanted
        (qmp,) = values(argv, "-qmp")
        self._qmp_path = qmp[""].removeprefix("unix:")
        self._console = next(
            chardev["path"] for chardev in values(argv, "-chardev") if chardev[""] == "file"
        )
        self._data = next(
            each["filename"]
            for each in values(argv, "-blockdev")
            if each.get("node-name") == "data-file"
        )
        self._firmware = {each["name"]: each["file"] for each in values(argv, "-fw_cfg")}
        self._client: socket.socket | None = None
        self._lock = threading.Lock()
        self._status = "running"
        self._waits = "-no-shutdown" in argv
        self._forwards: dict[str, str] = {}
        if values(argv, "-accel")[0][""] in self._wanted.get("bad_accelerators", {}):
            self._wanted |= self._wanted["bad_accelerators"][values(argv, "-accel")[0][""]]

    def run(self) -> int:
        """Run until something ends it."""
        if said := self._wanted.get("refuses"):
            print(said, file=sys.stderr)
            return 1
        with open(self._console, "wb"):  # noqa: PTH123 - QEMU begins the file anew
            pass
        self._lock_disk()
        if self._wanted.get("monitor") == "absent":
            time.sleep(600)
        signal.signal(signal.SIGTERM, lambda *_: self._end("host-signal"))
        signal.signal(signal.SIGUSR1, lambda *_: self._run_out_of_space())
        ssh = socket.create_server(("127.0.0.1", 0))
        port = ssh.getsockname()[1]
        self._add_forward("tcp", "127.0.0.1", port, 22)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._qmp_path)  # noqa: PTH108
        qmp = socket.socket(socket.AF_UNIX)
        qmp.bind(self._qmp_path)
        qmp.listen(1)
        control = self._boot()
        threading.Thread(target=self._forward, args=(ssh, control), daemon=True).start()
        threading.Thread(target=self._follow, args=(control,), daemon=True).start()
        while True:
            client, _ = qmp.accept()
            if self._wanted.get("monitor") == "silent":
                time.sleep(600)
            with client:
                self._serve(client)

    def _lock_disk(self) -> None:
        disk = os.open(self._data, os.O_RDWR)  # kept open: the lock goes with it
        for byte in LOCKED_BYTES:
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            taken = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            try:
                fcntl.fcntl(disk, F_OFD_SETLK, taken)
                fcntl.fcntl(disk, F_OFD_SETLK, lock)
            except OSError:
                print('qemu: Failed to get "write" lock', file=sys.stderr)
                print("Is another process using the image?", file=sys.stderr)
                sys.exit(1)

    def _boot(self) -> socket.socket:
        """Start the guest; it ends when the other end of its control socket does."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "console": self._console,
            "host_key": self._firmware["opt/wherry/host_key"],
            "authorized_key": self._firmware["opt/wherry/authorized_key"],
            "control": theirs.fileno(),
            **self._wanted,
        }
        guest = Path(__file__).with_name("fake_guest.py")
        subprocess.Popen(
            [
                *unshare(),
                *(sys.executable, "-IS", str(guest), json.dumps(settings)),
            ],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        return ours

    def _forward(self, listener: socket.socket, control: socket.socket) -> None:
        """Hand each connection to the guest; QEMU accepts before anything in it listens."""
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                socket.send_fds(control, [b"connection"], [connection.fileno()])

    def _follow(self, control: socket.socket) -> None:
        while (said := control.recv(100).decode() or "guest-panic") == "no-space":
            self._run_out_of_space()
        self._end(said)

    def _end(self, reason: str) -> None:
        self._send({"event": "SHUTDOWN", "data": {"guest": "guest" in reason, "reason": reason}})
        if "guest" in reason and self._waits:
            self._status = "shutdown"
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._qmp_path)  # noqa: PTH108
        os._exit(0)

    def _run_out_of_space(self) -> None:
        """Fail a write as on a full disk (qapi/block-core.json, BLOCK_IO_ERROR)."""
        self._status = "io-error"
        error = {"device": "", "node-name": "data", "operation": "write", "action": "stop"}
        error |= {"nospace": True, "reason": "No space left on device"}
        # Not in the signal's handler, which may have interrupted whoever sends.
        messages = ({"event": "BLOCK_IO_ERROR", "data": error}, {"event": "STOP"})
        threading.Thread(target=lambda: [self._send(each) for each in messages]).start()

    def _send(self, message: dict[str, Any]) -> None:
        if "event" in message:
            now = time.time()
            message["timestamp"] = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        with self._lock, contextlib.suppress(OSError):
            if self._client is not None:
                self._client.sendall(json.dumps(message).encode() + b"\r\n")

    def _serve(self, client: socket.socket) -> None:
        """Answer one client of the monitor (docs/interop/qmp-spec)."""
        with self._lock:
            self._client = client
        version = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "fake"}
        self._send({"QMP": {"version": version, "capabilities": ["oob"]}})
        for request in requests(client):
            command, arguments = request["execute"], request.get("arguments", {})
            result = self._execute(command, arguments)
            reply: dict[str, Any] = {"return": result}
            if result is None:
                what = f"The command {command} has not been found"
                reply = {"error": {"class": "CommandNotFound", "desc": what}}
            if "id" in request:
                reply["id"] = request["id"]
            self._send(reply)
            if command == "quit" and not behaviour().get("stays"):
                time.sleep(behaviour().get("quit_s", 0))
                self._end("host-qmp-quit")
        with self._lock:
            self._client = None

    def _execute(self, command: str, arguments: dict[str, Any]) -> Any:
        if command in ("qmp_capabilities", "quit"):
            return {}
        if command == "cont":
            self._status = "running"
            self._send({"event": "RESUME"})
            return {}
        if command == "query-status":
            running = self._status == "running"
            return {"status": self._status, "running": running, "singlestep": False}
        if command == "human-monitor-command":
            return self._human(arguments["command-line"])
        return None

    def _add_forward(self, protocol: str, address: str, port: int, guest_port: int) -> None:
        self._forwards[f"{protocol}:{address}:{port}"] = (
            f"  {protocol.upper()}[HOST_FORWARD]   9 {address:>15} {port:5}"
            f"       10.0.2.15 {guest_port:5}     0     0\r\n"
        )

    def _human(self, line: str) -> str:
        command, *words = line.split()
        if line == "info usernet":
            return USERNET + "".join(self._forwards.values())
        if command == "hostfwd_add":
            protocol, address, port = words[1].split("-")[0].split(":")
            self._add_forward(protocol, address, int(port), int(words[1].split(":")[-1]))
            return ""
        if command == "hostfwd_remove":
            known = self._forwards.pop(words[1], None) is not None
            return "host forwarding rule for ... removed\r\n" if known else "not found\r\n"
        return f"unknown command: '{line}'\r\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
