"""UDP on IPv6, relayed to QEMU's listener for IPv4.

Each client gets a socket of its own towards QEMU, so that answers find the way back; the
one that was silent for longest makes room for a new one.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import OrderedDict

from wherry.ports.desired import Forward
from wherry.ports.udp import LARGEST_BYTES, Client, Relay

_CLIENTS = 256
_IDLE_S = 120.0
"""As long as the guest's kernel remembers a UDP stream (``nf_conntrack_udp_timeout_stream``)."""

_BURST = 64


class DatagramRelay(Relay):
    """Relays datagrams between the clients of one port and another port of this computer.

    :raises OSError: the port cannot be bound.
    """

    def __init__(self, forward: Forward, address: tuple[str, int]) -> None:
        super().__init__(forward)
        self._address = address
        self._clients: OrderedDict[Client, tuple[socket.socket, float]] = OrderedDict()

    def _from_client(self, data: bytes, client: Client) -> None:
        try:
            self._towards_guest(client).send(data)
        except OSError:
            pass  # lost, as datagrams may be

    def _readable(self, key: selectors.SelectorKey) -> None:
        self._to_client(key.fileobj, key.data)  # type: ignore[arg-type]

    def _end(self) -> None:
        for sock, _ in self._clients.values():
            sock.close()

    def _towards_guest(self, client: Client) -> socket.socket:
        known = self._clients.pop(client, None)
        if known is None:
            if len(self._clients) >= _CLIENTS:
                self._drop(next(iter(self._clients)))
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                sock.setblocking(False)
                sock.connect(self._address)
                self._selector.register(sock, selectors.EVENT_READ, client)
            except BaseException:
                sock.close()
                raise
        else:
            sock = known[0]
        self._clients[client] = (sock, time.monotonic())
        return sock

    def _to_client(self, sock: socket.socket, client: Client) -> None:
        if self._clients.get(client, (None,))[0] is not sock:
            return  # dropped while this event waited
        for _ in range(_BURST):
            try:
                data = sock.recv(LARGEST_BYTES)
            except BlockingIOError:
                break
            except OSError:
                break
            try:
                self._listener.answer(data, client)
            except OSError:
                pass  # the client is gone, or slow
        self._clients[client] = (sock, time.monotonic())
        self._clients.move_to_end(client)

    def _look_after(self) -> None:
        oldest = time.monotonic() - _IDLE_S
        while self._clients:
            client = next(iter(self._clients))
            if self._clients[client][1] > oldest:
                return
            self._drop(client)

    def _drop(self, client: Client) -> None:
        sock, _ = self._clients.pop(client)
        self._selector.unregister(sock)
        sock.close()
