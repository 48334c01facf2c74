"""UDP on IPv6, relayed to QEMU's listener for IPv4.

Each client gets a socket of its own towards QEMU, so that answers find the way back; the
one that was silent for longest makes room for a new one.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import OrderedDict

from wherry.ports.datagram_listener import LARGEST_BYTES, Client, DatagramListener
from wherry.ports.desired import Forward

_CLIENTS = 256
_IDLE_S = 120.0
"""As long as the guest's kernel remembers a UDP stream (``nf_conntrack_udp_timeout_stream``)."""

_BURST = 64
_JOIN_S = 5.0

_logger = logging.getLogger(__name__)


class DatagramRelay:
    """Relays datagrams between the clients of one port and another port of this computer.

    :raises OSError: the port cannot be bound.
    """

    def __init__(self, forward: Forward, address: tuple[str, int]) -> None:
        self._address = address
        self._listener = DatagramListener(forward)
        self._clients: OrderedDict[Client, tuple[socket.socket, float]] = OrderedDict()
        self._wake, self._alarm = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener.socket, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"port-{forward.port}", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it relays."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to relay."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end the thread."""
        self._closing = True
        self._alarm.send(b"x")
        self._thread.join(_JOIN_S)
        for each in (self._listener, self._wake, self._alarm):
            each.close()

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select(_IDLE_S / 4):
                    if key.fileobj is self._listener.socket:
                        self._from_clients()
                    elif key.data is not None:
                        self._to_client(key.fileobj, key.data)  # type: ignore[arg-type]
                self._forget_silent()
        except Exception:
            if not self._closing:
                _logger.exception("a relay of datagrams failed")
        finally:
            for sock, _ in self._clients.values():
                sock.close()
            self._selector.close()

    def _from_clients(self) -> None:
        for _ in range(_BURST):
            try:
                data, client = self._listener.receive()
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier datagram
            try:
                self._towards_guest(client).send(data)
            except OSError:
                pass  # lost, as datagrams may be

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

    def _forget_silent(self) -> None:
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
