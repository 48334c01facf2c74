"""UDP to an IPv6 address of the guest's, which QEMU has no way for.

A connection carries the datagrams of one published port, each in a frame with the number
that the host gave its client. A client has a socket of its own here, so that answers find
the way back; the one that was silent for longest makes room for a new one.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import time

from wherry_guest import system
from wherry_wire.frames import DATAGRAM, Decoder, Frame, WireError
from wherry_wire.messages import DatagramsListen, DatagramsListening, DatagramsTo, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SOCKET = "/run/wherry/datagrams-%d.sock"
_CLIENTS = 256
_ALL_CLIENTS = 4096
"""Of all ports together."""

_DESCRIPTORS = 4 * _ALL_CLIENTS
"""Leaves enough for all else."""

_IDLE_S = 120.0
"""As long as the kernel remembers a UDP stream (``nf_conntrack_udp_timeout_stream``)."""

_LARGEST_BYTES = 65535
_READ_BYTES = 256 * 1024
_BURST = 64


_sockets: set[socket.socket] = set()
"""Those of all ports' clients."""


class Datagrams:
    """Listens for the connections of ports."""

    def __init__(self) -> None:
        self._path = ""

    def listen(self, request: DatagramsListen) -> DatagramsListening:
        """Begin to listen; later calls return the same socket."""
        if not self._path:
            limit = max(_DESCRIPTORS, *resource.getrlimit(resource.RLIMIT_NOFILE))
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            path = _SOCKET % os.getpid()
            system.listen(path, serve)
            self._path = path
        return DatagramsListening(socket=self._path)


def serve(connection: socket.socket) -> None:
    """Serve one port until the host closes the connection."""
    with connection:
        relay = _Relay(connection)
        try:
            relay.run()
        except (OSError, WireError):
            pass  # the host is gone, or broke the protocol; both end the connection
        finally:
            relay.close()


class _Relay:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = Decoder()
        self._target: tuple[str, int] | None = None
        self._clients: dict[int, tuple[socket.socket, float]] = {}
        """By number, the one that was silent for longest first; with when that began."""
        self._numbers: dict[int, int] = {}
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def run(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll(_IDLE_S * 1000 / 4):
                if descriptor == self._connection.fileno():
                    data = self._connection.recv(_READ_BYTES)
                    if not data:
                        return
                    for frame in self._decoder.feed(data):
                        self._take(frame)
                elif descriptor in self._numbers:
                    self._answer(self._numbers[descriptor])
            self._forget_silent()

    def close(self) -> None:
        for number in list(self._clients):
            self._drop(number)

    def _take(self, frame: Frame) -> None:
        if frame.type == DATAGRAM and self._target is not None:
            try:
                self._socket(frame.id, self._target).send(frame.payload)
            except OSError:
                pass  # lost, as datagrams may be
            return
        message = unpack(frame)
        if not isinstance(message, DatagramsTo):
            raise WireError("where datagrams go has to be said first, and nothing else")
        self._target = (message.address, message.port)

    def _socket(self, number: int, target: Any) -> socket.socket:
        known = self._clients.pop(number, None)
        if known is not None:
            made = known[0]
        else:
            if self._clients and (len(self._clients) >= _CLIENTS or len(_sockets) >= _ALL_CLIENTS):
                self._drop(next(iter(self._clients)))
            if len(_sockets) >= _ALL_CLIENTS:
                raise OSError("other ports have too many clients")
            made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            try:
                made.setblocking(False)
                made.connect(target)
            except BaseException:
                made.close()
                raise
            _sockets.add(made)
            self._poll.register(made, select.POLLIN)
            self._numbers[made.fileno()] = number
        self._clients[number] = (made, time.monotonic())
        return made

    def _answer(self, number: int) -> None:
        made, _ = self._clients.pop(number)
        self._clients[number] = (made, time.monotonic())
        for _ in range(_BURST):
            try:
                data = made.recv(_LARGEST_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier datagram
            self._connection.sendall(Frame(DATAGRAM, number, data).encode())

    def _forget_silent(self) -> None:
        oldest = time.monotonic() - _IDLE_S
        for number, (_, since) in list(self._clients.items()):
            if since > oldest:
                return
            self._drop(number)

    def _drop(self, number: int) -> None:
        made, _ = self._clients.pop(number)
        self._poll.unregister(made)
        del self._numbers[made.fileno()]
        _sockets.discard(made)
        made.close()
