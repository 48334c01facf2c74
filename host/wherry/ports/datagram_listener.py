"""The socket of a published UDP port on IPv6, which answers from the address that was asked.

A computer has several addresses of IPv6, and would choose another one to answer from; who
asked the first knows nothing of it (RFC 3542 §6.2).
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from wherry.ports.conflicts import open_socket
from wherry.ports.desired import ALL_IPV6, Forward

LARGEST_BYTES = 65535
"""Of a datagram."""

_ADDRESS_BYTES = 16

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
