"""How large the packets are that leave the guest: their number is what sending costs."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sandbox import Sandbox, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

MTU = 15360
LARGE = 12_000
SIZE = 5_000_000

SEND = """
import hashlib, json, os, socket, sys
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = os.urandom(size)
with socket.create_connection((address, port), timeout=60) as connection:
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    segment = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
print(json.dumps([segment, hashlib.sha256(data).hexdigest()]))
"""

SERVE = """
import socket
with socket.create_server(("", 80)) as server:
    while True:
        with server.accept()[0] as connection:
            connection.sendall(bytes(1000000))
            segment = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            connection.sendall(b"%d" % segment)
"""

DATAGRAM = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.sendto(bytes(20000), ("10.0.2.2", int(sys.argv[1])))
"""


@contextmanager
def receiver(address: str) -> Iterator[tuple[int, list[str]]]:
    """A listener on this computer; its port, and the digest of what the first client sent."""
    digests: list[str] = []
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def serve() -> None:
        with listener.accept()[0] as connection:
            digest = hashlib.sha256()
            while data := connection.recv(1 << 16):
                digest.update(data)
            digests.append(digest.hexdigest())

    with socket.create_server((address, 0), family=family) as listener:
        listener.settimeout(120)
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], digests
        thread.join(120)


@contextmanager
def container(machine: Sandbox, *options: str) -> Iterator[tuple[str, ...]]:
    """What runs a Python program in a container's network: the guest has one, busybox has not."""
    machine.docker("run", "-d", "--name", "segments", *options, "busybox", "sleep", "999")
    try:
        process = machine.docker("inspect", "-f", "{{.State.Pid}}", "segments").stdout.decode()
        yield "nsenter", "-t", process.strip(), "-n", "timeout", "120", "python3", "-c"
    finally:
        machine.docker("rm", "-f", "segments")


def guest_number(machine: Sandbox, command: str) -> int:
    return int(machine.wherry("shell", "--", "sh", "-c", command).stdout)


def test_what_a_container_sends_goes_in_large_segments(machine: Sandbox) -> None:
    packets = "cat /sys/class/net/eth0/statistics/tx_packets"
    with container(machine) as inside, receiver("127.0.0.1") as (port, digests):
        before = guest_number(machine, packets)
        to_host = (SEND, "10.0.2.2", str(port), str(SIZE))
        sent = machine.wherry("shell", "--", *inside, *to_host).stdout
        count = guest_number(machine, packets) - before
    segment, digest = json.loads(sent)
    assert digests == [digest]
    assert segment > LARGE
    assert count < SIZE / LARGE + 300, "the rest is acknowledgements and the tunnel's"


def test_nothing_of_ipv6_is_too_large(machine: Sandbox) -> None:
    """QEMU refuses what is larger than Ethernet's: each destination would begin with a loss."""
    refused = "awk '$1 == \"Icmp6InPktTooBigs\" {print $2}' /proc/net/snmp6"
    before = guest_number(machine, refused)
    with receiver("::1") as (port, digests):
        sent = machine.wherry(
            "shell", "--", "python3", "-c", SEND, "fec0::2", str(port), str(SIZE)
        ).stdout
    assert digests == json.loads(sent)[1:]
    assert guest_number(machine, refused) == before


def test_what_a_published_port_answers_goes_in_large_segments(machine: Sandbox) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers: list[bytes] = []

    def answered() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            answers.append(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
        return bool(answers[-1])

    with container(machine, "-p", f"127.0.0.1:{port}:80") as inside:
        start = '"$@" </dev/null >/dev/null 2>&1 &'
        machine.wherry("shell", "--", "sh", "-c", start, "sh", *inside, SERVE)
        wait_until(answered, 60, "the server answers")
    assert int(answers[-1].lstrip(b"\0")) > LARGE


def test_the_tunnel_sends_large_segments(machine: Sandbox) -> None:
    said = machine.wherry("shell", "--", "ss", "-Htin", "sport", "=", ":22").stdout.decode()
    segments = [int(word[4:]) for word in said.split() if word.startswith("mss:")]
    assert segments
    assert min(segments) > LARGE


def test_a_large_datagram_leaves_a_container_whole(machine: Sandbox) -> None:
    with (
        container(machine) as inside,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener,
    ):
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(60)
        port = str(listener.getsockname()[1])
        machine.wherry("shell", "--", *inside, DATAGRAM, port)
        assert listener.recv(65536) == bytes(20000)


def test_networks_have_large_packets_unless_they_say_otherwise(machine: Sandbox) -> None:
    option = "com.docker.network.driver.mtu=1400"
    machine.docker("network", "create", "large")
    machine.docker("network", "create", "-o", option, "small")
    try:
        for network, mtu in (("bridge", MTU), ("large", MTU), ("small", 1400)):
            said = machine.docker(
                "run", "--rm", "--network", network, "busybox", "cat", "/sys/class/net/eth0/mtu"
            ).stdout
            assert int(said) == mtu
    finally:
        machine.docker("network", "rm", "large", "small")
