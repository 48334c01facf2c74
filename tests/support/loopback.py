"""What tests have on this computer's loopback: ports, a server of datagrams, one address more."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

_GIVEN_TO_NOBODY = range(24_000, 32_768)
"""Ports that the system does not choose for who asks for any: Linux begins after them. Those
before are left to tests that need many in a row."""

_chosen: set[int] = set()


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return a port that is free on all addresses, and another one each time.

    It stays free: no connection of anybody's begins at it by chance.
    """
    for _ in _GIVEN_TO_NOBODY:
        port = secrets.choice(_GIVEN_TO_NOBODY)
        with socket.socket(socket.AF_INET6, kind) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                probe.bind(("::", port))
            except OSError:
                continue
        if port not in _chosen:
            _chosen.add(port)
            return port
    pytest.fail("this computer has no port that is free")


@contextlib.contextmanager
def answering(address: str) -> Iterator[int]:
    """Run a server of UDP; yield its port. It adds something: nothing comes back by itself."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((address, 0))
        server.settimeout(0.05)
        over = threading.Event()

        def run() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    data, client = server.recvfrom(65536)
                    server.sendto(data + b"!", client)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def one_more_ipv6() -> Iterator[str]:
    """Give this computer an address that is not ::1; another one for each process."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root gives this computer an address")
    address = f"fd77:6865:7272::{os.getpid() & 0xFFFF:x}"
    change = ("ip", "-6", "address")
    subprocess.run([*change, "replace", f"{address}/128", "dev", "lo"], check=True)
    try:
        yield address
    finally:
        subprocess.run([*change, "delete", f"{address}/128", "dev", "lo"], check=True)
