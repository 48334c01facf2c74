"""Which forwards the running containers ask for."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Forward:
    """One port of the host that leads to the same port of the guest.

    ``address`` is the host's address, as the user published it; ``0.0.0.0`` is all.
    """

    protocol: str
    address: str
    port: int


def desired(containers: Iterable[Mapping[str, Any]]) -> frozenset[Forward]:
    """Return the forwards for the answer of ``GET /containers/json`` (Engine API, Container).

    Of a port published on all addresses the engine lists one entry for IPv4 and one
    for IPv6; both are the same forward, since the host listens on IPv4 for both.
    """
    found = set()
    for container in containers:
        for port in container.get("Ports") or ():
            public, protocol = port.get("PublicPort"), port.get("Type")
            if not public or protocol not in ("tcp", "udp"):
                continue  # exposed, but not published; or sctp, which QEMU cannot carry
            address = ipaddress.ip_address(port.get("IP") or "0.0.0.0")
            if address.version == 6:
                if not address.is_unspecified:
                    continue
                address = ipaddress.ip_address("0.0.0.0")
            found.add(Forward(protocol, str(address), int(public)))
    return frozenset(found)
