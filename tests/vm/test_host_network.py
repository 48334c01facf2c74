"""A computer whose network goes and comes back: a machine in network namespaces of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox import Sandbox, run, wait_until

from wherry.vm.image import Image

pytestmark = [
    pytest.mark.vm,
    pytest.mark.endurance,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces need root"
    ),
]

ADDRESS, PEER = "10.213.0.1", "10.213.0.2"

FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode().strip())
"""


ECHO_LARGE = """
import hashlib, socket, sys
with socket.create_server((sys.argv[1], 81)) as server:
    while True:
        connection = server.accept()[0]
        digest = hashlib.sha256()
        while data := connection.recv(1 << 16):
            digest.update(data)
        connection.sendall(digest.hexdigest().encode() + b"\\n" + bytes(int(sys.argv[2])))
        connection.close()
"""


class Network:
    """Two computers with a cable between them; the first one is where wherry runs."""

    def __init__(self) -> None:
        self.here, self.peer = f"wherry-here-{os.getpid()}", f"wherry-peer-{os.getpid()}"

    def make(self) -> None:
        for name in (self.here, self.peer):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.here, "link", "add", "lan", "type", "veth", "peer", "lan", "netns", self.peer)
        ip("-n", self.peer, "address", "add", f"{PEER}/24", "dev", "lan")
        ip("-n", self.peer, "link", "set", "lan", "up")
        self.plug_in()

    def plug_in(self) -> None:
        ip("-n", self.here, "address", "add", f"{ADDRESS}/24", "dev", "lan")
        ip("-n", self.here, "link", "set", "lan", "up")

    def unplug(self) -> None:
        """The address goes with the network, as when a laptop leaves one."""
        ip("-n", self.here, "link", "set", "lan", "down")
        ip("-n", self.here, "address", "flush", "dev", "lan")

    def remove(self) -> None:
        for name in (self.here, self.peer):
            subprocess.run(["ip", "netns", "delete", name], check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def within(namespace: str, *argv: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{namespace}", *argv]


class There(Sandbox):
    """A sandbox whose commands, and so its services and QEMUs, are in a namespace."""

    namespace: str

    def wherry(
        self,
        *arguments: str,
        check: bool = True,
        timeout: float = 400,
        input: bytes | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        argv = within(self.namespace, sys.executable, "-m", "wherry", *arguments)
        return run(argv, env=self.env, check=check, timeout=timeout, input=input)


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture
def there(network: Network, guest_image: Image, tmp_path: Path) -> Iterator[There]:
    made = There(tmp_path)
    made.namespace = network.here
    try:
        made.wherry("start", "--cpus", "2", "--memory", "1GiB")
        made.add_busybox()
        yield made
    finally:
        made.stop_all()


def fetch(namespace: str, url: str) -> str:
    """Return what a server answers, or nothing."""
    argv = within(namespace, sys.executable, "-c", FETCH, f"http://{url}/")
    return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout.strip()


def test_the_network_goes_and_comes_back(there: There, network: Network, tmp_path: Path) -> None:
    script = "mkdir /www; echo web >/www/index.html; exec httpd -f -h /www"
    there.docker(
        "run", "-d", "--name", "web", "-p", "127.0.0.1:8001:80", "-p", f"{ADDRESS}:8002:80",
        "-p", "8003:80", "busybox", "sh", "-c", script,
    )  # fmt: skip
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "index.html").write_text("lan")
    serve = [sys.executable, "-m", "http.server", "-b", PEER, "-d", str(tmp_path / "www"), "80"]
    server = subprocess.Popen(within(network.peer, *serve), stderr=subprocess.DEVNULL)

    def asks_out() -> bool:
        ask = ("exec", "web", "wget", "-T", "5", "-qO-", f"http://{PEER}/")
        return there.docker(*ask, check=False, timeout=60).stdout.strip() == b"lan"

    def all_reachable() -> bool:
        # Each at exactly the addresses that were asked for.
        return [
            fetch(namespace, f"{address}:{port}")
            for namespace, address in ((network.here, "127.0.0.1"), (network.peer, ADDRESS))
            for port in (8001, 8002, 8003)
        ] == ["web", "", "web", "", "web", "web"]

    try:
        wait_until(all_reachable, 60, "all is reachable")
        wait_until(asks_out, 60, "containers reach the network")
        network.unplug()
        assert fetch(network.here, "127.0.0.1:8001") == "web"
        assert fetch(network.here, "[::1]:8003") == "web"
        names = there.docker("exec", "web", "nslookup", "host.docker.internal", timeout=20)
        assert b"Address: 10.0.2.2" in names.stdout
        # It fails, if it does, in the time that clients wait.
        there.docker("exec", "web", "nslookup", "nobody.example", check=False, timeout=30)
        assert fetch(network.here, "127.0.0.1:8003") == "web"
        assert not asks_out()
        # The machine is as usable as before, for new containers too.
        there.docker("run", "-d", "--name", "two", "-p", "8004:80", "busybox", "sh", "-c", script)
        wait_until(lambda: fetch(network.here, "127.0.0.1:8004") == "web", 30, "one more")
        network.plug_in()
        wait_until(all_reachable, 30, "all is reachable again")
        wait_until(asks_out, 30, "containers reach the network again")
        assert fetch(network.peer, f"{ADDRESS}:8004") == "web"
        assert fetch(network.here, "[::1]:8004") == "web"
    finally:
        server.kill()
        server.wait(10)


VPN_MTU = 1280
LARGE = 3_000_000


def test_a_way_with_small_packets_stalls_nothing(there: There, network: Network) -> None:
    """As a VPN's: much of what containers send is larger, and nobody set anything."""
    for name in (network.here, network.peer):
        ip("-n", name, "link", "set", "lan", "mtu", str(VPN_MTU))
    serve = [sys.executable, "-c", ECHO_LARGE, PEER, str(LARGE)]
    server = subprocess.Popen(within(network.peer, *serve))
    script = (
        f"cat /sys/class/net/eth0/mtu; head -c {LARGE} /dev/urandom >/sent;"
        f"sha256sum </sent; nc -w 30 {PEER} 81 </sent >/received; head -n 1 /received;"
        "wc -c </received"
    )
    try:
        done = there.docker("run", "--rm", "busybox", "sh", "-c", script, timeout=120)
    finally:
        server.kill()
        server.wait(10)
    mtu, sent, _, digest, received = done.stdout.decode().split()
    assert int(mtu) > VPN_MTU
    assert digest == sent
    assert int(received) == len(digest) + 1 + LARGE
