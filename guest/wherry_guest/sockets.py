"""What containers with ``--network host`` listen on, and ports that nobody may have.

They share the guest's network, so a socket tells its container only through a process that
has it open: proc_pid_fd(5) has the inodes, /proc/net/tcp and its kin what they are.
"""

from __future__ import annotations

import os
import socket
import struct

_CGROUPS = "/sys/fs/cgroup/docker"
_LISTENING = {"tcp": "0A", "udp": "07"}  # TCP_LISTEN, and TCP_CLOSE: not connected
_PREFIX = "socket:["
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


class Held:
    """Ports that are in use here because they are on the host.

    When the engine chooses a port, it takes another one.
    """

    def __init__(self) -> None:
        self._sockets: dict[tuple[str, int], socket.socket] = {}

    def hold(self, ports: set[tuple[str, int]]) -> None:
        """Hold these ports, by protocol, on all addresses; let the others go."""
        for port in self._sockets.keys() - ports:
            self._sockets.pop(port).close()
        for protocol, number in ports - self._sockets.keys():
            # Neither listening nor reusable: whoever binds the port too is refused.
            made = socket.socket(socket.AF_INET6, _KINDS[protocol])
            try:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                made.bind(("::", number))
            except OSError:
                made.close()  # in use here as well, so the engine does not choose it
                continue
            self._sockets[protocol, number] = made


def listeners(containers: list[str]) -> list[tuple[str, str, str, int]]:
    """Return container, protocol, address and port of all that they listen on.

    UDP ports that the system chose are left out: those are of programs that ask, not of
    ones that answer.
    """
    owners: dict[str, str] = {}
    for container in containers:
        for process in processes(f"{_CGROUPS}/{container}"):
            for inode in inodes(process):
                owners[inode] = container
    if not owners:
        return []
    low, high = (int(word) for word in _read("/proc/sys/net/ipv4/ip_local_port_range").split())
    found = []
    for protocol, state in _LISTENING.items():
        for table in (protocol, protocol + "6"):
            for address, port, inode in parse(_read(f"/proc/net/{table}"), state):
                if inode not in owners or (protocol == "udp" and low <= port <= high):
                    continue
                found.append((owners[inode], protocol, address, port))
    return found


def processes(group: str) -> list[str]:
    """Return the processes of a cgroup and those below it; a container may have made some."""
    found = []
    for directory, _, _ in os.walk(group):
        found += _read(f"{directory}/cgroup.procs").split()
    return found


def inodes(process: str) -> list[str]:
    """Return the inodes of the sockets that a process has open; none when it is gone."""
    found = []
    directory = f"/proc/{process}/fd"
    try:
        for name in os.listdir(directory):
            try:
                target = os.readlink(f"{directory}/{name}")
            except OSError:
                continue
            if target.startswith(_PREFIX):
                found.append(target[len(_PREFIX) : -1])
    except OSError:
        pass
    return found


def parse(table: str, state: str) -> list[tuple[str, int, str]]:
    """Return address, port and inode of the sockets in a state (proc_net(5))."""
    found = []
    for line in table.splitlines()[1:]:
        words = line.split()
        if len(words) < 10 or words[3] != state:
            continue
        address, _, port = words[1].partition(":")
        found.append((_address(address), int(port, 16), words[9]))
    return found


def _address(text: str) -> str:
    # Words of 32 bits, each in the processor's own order.
    data = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(data) == 4 else socket.AF_INET6, data)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
