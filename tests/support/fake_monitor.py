"""QEMU's human monitor as far as forwards go, without QEMU: its listeners are real ones."""

from __future__ import annotations

import socket

from wherry.ports.desired import Forward


class Monitor:
    """QEMU's human monitor, as far as forwards go: it binds what it is told to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.sockets: dict[str, socket.socket] = {}

    async def human(self, line: str) -> str:
        self.lines.append(line)
        command, _, rule = line.split(" ")
        host = rule.split("-")[0]
        if command == "hostfwd_remove":
            self.sockets.pop(host).close()
            return f"host forwarding rule for {host} removed\r\n"
        protocol, address, port = host.split(":")
        made = socket.socket(
            socket.AF_INET, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        )
        try:
            made.bind((address, int(port)))
            if protocol == "tcp":
                made.listen()
        except OSError:
            made.close()
            return f"Could not set up host forwarding rule '{rule}'\r\n"
        self.sockets[host] = made
        return ""

    def forwards(self) -> list[Forward]:
        # They may change meanwhile, in the loop's thread.
        split = [host.split(":") for host in list(self.sockets)]
        return [Forward(protocol, address, int(port)) for protocol, address, port in split]

    def close(self) -> None:
        for each in self.sockets.values():
            each.close()
