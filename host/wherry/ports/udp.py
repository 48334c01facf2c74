"""What relays of a published UDP port have in common: its socket, and the thread that receives.

The socket answers from the address that was asked. A computer has several addresses of IPv6,
and would choose another one to answer from; who asked the first knows nothing of it (RFC 3542
§6.2).
"""

from __future__ import annotations

import ipaddress
import logging
import selectors
import socket
import threading
from typing import Any

from wherry.ports.conflicts import open_socket
from wherry.ports.desired import ALL_IPV6, Forward

LARGEST_BYTES = 65535
"""Of a datagram."""

_ADDRESS_BYTES = 16
_BURST = 64
_LOOK_AFTER_S = 30.0
_JOIN_S = 5.0

_logger = logging.getLogger(__name__)

Client = tuple[Any, bytes]
"""The address of one that asks, and what it asked: a ``struct in6_pktinfo``, or nothing."""


class DatagramListener:
    """Receives and answers; never waits.

    :raises OSError: the port cannot be bound.
    """

    def __init__(self, forward: Forward) -> None:
        self.socket = open_socket(forward)
        self.socket.setblocking(False)
        # On Windows Python cannot receive what it tells.
        self._tells = forward.address == ALL_IPV6 and hasattr(self.socket, "recvmsg")
        if self._tells:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)

    def receive(self) -> tuple[bytes, Client]:
        """Return a datagram and whom it is from.

        :raises BlockingIOError: there is none.
        :raises OSError: an earlier answer did not arrive (ICMP).
        """
        if not self._tells:
            data, address = self.socket.recvfrom(LARGEST_BYTES)
            return data, (address, b"")
        space = socket.CMSG_SPACE(_ADDRESS_BYTES + 4)
        data, told, _, address = self.socket.recvmsg(LARGEST_BYTES, space)
        found = [info for level, kind, info in told if (level, kind) == _PKTINFO]
        return data, (address, _answering(found[0]) if found else b"")

    def answer(self, data: bytes, client: Client) -> None:
        """Send a datagram to one that asked.

        :raises OSError: it is gone, or slow.
        """
        address, info = client
        if info:
            self.socket.sendmsg([data], [(*_PKTINFO, info)], 0, address)
        else:
            self.socket.sendto(data, address)

    def close(self) -> None:
        """Let the port go."""
        self.socket.close()


_PKTINFO = (socket.IPPROTO_IPV6, getattr(socket, "IPV6_PKTINFO", -1))


def _answering(info: bytes) -> bytes:
    """Return what to send with an answer; nothing where the system has to choose."""
    asked = ipaddress.IPv6Address(info[:_ADDRESS_BYTES])
    if asked.is_multicast:
        return b""
    # Only link-local addresses need the interface; answers from others may take any route.
    return info if asked.is_link_local else info[:_ADDRESS_BYTES] + bytes(4)


class Relay:
    """Owns a port's socket and the thread that receives from it.

    :raises OSError: the port cannot be bound.
    """

    def __init__(self, forward: Forward) -> None:
        self._listener = DatagramListener(forward)
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

    def _from_client(self, data: bytes, client: Client) -> None:
        """Pass a client's datagram on; in the thread."""
        raise NotImplementedError

    def _readable(self, key: selectors.SelectorKey) -> None:
        """Take what another socket has, that was registered with data; in the thread."""

    def _look_after(self) -> None:
        """Do what is due now and then; in the thread."""

    def _end(self) -> None:
        """Release what is the thread's; at its end."""

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select(_LOOK_AFTER_S):
                    if key.fileobj is self._listener.socket:
                        self._receive()
                    elif key.data is not None:
                        self._readable(key)
                self._look_after()
        except Exception:
            if not self._closing:
                _logger.exception("a relay of datagrams failed")
        finally:
            self._end()
            self._selector.close()

    def _receive(self) -> None:
        for _ in range(_BURST):
            if self._closing:
                return
            try:
                data, client = self._listener.receive()
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier datagram
            self._from_client(data, client)
