"""What host-network containers listen on, as the guest's kernel tells it."""

from __future__ import annotations

import os
import socket
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the agent is for Linux", allow_module_level=True)

from wherry_guest import sockets

TABLE = """\
  sl  local_address rem_address   st tx rx tr tm uid timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 240 1 0
   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 241 1 0
   2: 0F02000A:0016 0202000A:BA0E 01 00000000:00000000 02:000AF846 00000000     0        0 244 2 0
"""
TABLE_6 = """\
  sl  local_address remote_address st tx_queue rx_queue
   0: 00000000000000000000000001000000:1F92 0:0000 0A 0:0 00:0 0 0 0 1898 1
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the kernel writes in its own byte order")
def test_the_kernel_s_tables_are_understood() -> None:
    assert sockets.parse(TABLE, "0A") == [("0.0.0.0", 22, "240"), ("127.0.0.1", 8080, "241")]
    assert sockets.parse(TABLE_6, "0A") == [("::1", 8082, "1898")]
    assert sockets.parse("", "0A") == []
    # UDP has its own state for what is bound and not connected.
    datagrams = TABLE.replace(" 0A ", " 07 ")
    assert [port for _, port, _ in sockets.parse(datagrams, "07")] == [22, 8080]


def test_a_process_s_sockets_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode = str(os.fstat(server.fileno()).st_ino)
        assert inode in sockets.inodes(str(os.getpid()))
    assert inode not in sockets.inodes(str(os.getpid()))
    assert sockets.inodes("0") == []


def test_without_processes_there_are_no_listeners() -> None:
    assert sockets.listeners(["0" * 64]) == []


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_that_is_held_can_be_bound_on_no_address(protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def refused(address: str) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, kind) as engine:
            if protocol == "tcp":
                engine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                engine.bind((address, port))
            except OSError:
                return True
        return False

    addresses = ["0.0.0.0", "127.0.0.1", "::", "::1"]
    held = sockets.Held()
    held.hold({(protocol, port)})
    assert all(map(refused, addresses))
    held.hold({(protocol, port)})
    held.hold(set())
    assert not any(map(refused, addresses))


def test_a_port_that_something_has_needs_no_holding() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sockets.Held().hold({("tcp", taken.getsockname()[1])})
