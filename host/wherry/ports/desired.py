"""Which forwards containers ask for: running ones, ones about to start, host-network ones."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_PROTOCOLS = ("tcp", "udp")
"""SCTP can be published too, and is left out: QEMU cannot carry it."""

EPHEMERAL = (32768, 60999)
"""From which the engine chooses when no port is asked for: the guest's
``ip_local_port_range``, which is the kernel's default (ip(7))."""

ALL_IPV4 = "0.0.0.0"
ALL_IPV6 = "::"


@dataclass(frozen=True, order=True)
class Forward:
    """One port of the host that leads to the same port and address of the guest.

    ``address`` is the host's, as the user published it; ``0.0.0.0`` and ``::`` are all
    addresses of their kind.
    """

    protocol: str
    address: str
    port: int

    @property
    def ipv6(self) -> bool:
        """Whether the address is one of IPv6."""
        return ":" in self.address

    def __str__(self) -> str:
        address = f"[{self.address}]" if self.ipv6 else self.address
        return f"{address}:{self.port}/{self.protocol}"

    def overlaps(self, other: Forward) -> bool:
        """Whether the two cannot both be bound."""
        if (self.protocol, self.port) != (other.protocol, other.port) or self.ipv6 != other.ipv6:
            return False
        wildcard = ALL_IPV6 if self.ipv6 else ALL_IPV4
        return self.address == other.address or wildcard in (self.address, other.address)


@dataclass(frozen=True)
class Owner:
    """For whom a forward exists.

    :ivar port: the container's own port; 0 when it is not known yet.
    :ivar host_network: the container listens in the guest itself, with ``--network host``.
    """

    id: str
    name: str
    port: int
    host_network: bool = False


Wanted = dict[Forward, Owner]


@dataclass(frozen=True)
class Choice:
    """Ports that the engine may choose one from."""

    protocol: str
    first: int
    last: int

    def __contains__(self, port: tuple[str, int]) -> bool:
        """Whether it may choose this one of this protocol."""
        return port[0] == self.protocol and self.first <= port[1] <= self.last


class Plan(NamedTuple):
    """What a container will publish once it starts.

    :ivar fixed: at ports that are known before.
    :ivar chosen: from which ports the engine chooses others.
    """

    fixed: Wanted
    chosen: frozenset[Choice]


def running(containers: Iterable[Mapping[str, Any]]) -> Wanted:
    """Return the forwards for the answer of ``GET /containers/json`` (Engine API, Container)."""
    found: Wanted = {}
    for container in containers:
        names = container.get("Names") or [""]
        for port in container.get("Ports") or ():
            public, protocol = port.get("PublicPort"), port.get("Type")
            if not public or protocol not in _PROTOCOLS:
                continue  # exposed, but not published
            address = ipaddress.ip_address(port.get("IP") or ALL_IPV4)
            forward = Forward(protocol, str(address), int(public))
            found[forward] = Owner(
                container["Id"], names[0].lstrip("/"), int(port.get("PrivatePort") or 0)
            )
    return found


def host_network(containers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names of the containers that are in the guest's own network, by id."""
    return {
        container["Id"]: (container.get("Names") or [""])[0].lstrip("/")
        for container in containers
        if (container.get("HostConfig") or {}).get("NetworkMode") == "host"
    }


def planned(inspected: Mapping[str, Any]) -> Plan:
    """Return what ``GET /containers/{id}/json`` says will be published at the next start.

    An empty ``HostIp`` is all addresses, of IPv4 and IPv6.
    """
    settings = inspected.get("HostConfig") or {}
    mode = str(settings.get("NetworkMode") or "")
    fixed: Wanted = {}
    chosen: set[Choice] = set()
    if settings.get("PublishAllPorts"):
        chosen = {Choice(protocol, *EPHEMERAL) for protocol in _PROTOCOLS}
    if mode in ("host", "none") or mode.startswith("container:"):
        return Plan(fixed, frozenset())
    name = str(inspected.get("Name") or "").lstrip("/")
    for exposed, bindings in (settings.get("PortBindings") or {}).items():
        port, _, protocol = exposed.partition("/")
        if (protocol or "tcp") not in _PROTOCOLS:
            continue
        each_binding: list[Mapping[str, Any]] = list(bindings or [{}])
        for binding in each_binding:
            asked = str(binding.get("HostPort") or "")
            first, _, last = asked.partition("-")
            if first.isdecimal() and last.isdecimal():
                chosen.add(Choice(protocol or "tcp", int(first), int(last)))
                continue
            if not asked.isdecimal() or not int(asked):
                chosen.add(Choice(protocol or "tcp", *EPHEMERAL))
                continue
            for address in _addresses(str(binding.get("HostIp") or "")):
                forward = Forward(protocol or "tcp", address, int(asked))
                fixed[forward] = Owner(inspected["Id"], name, int(port))
    return Plan(fixed, frozenset(chosen))


def _addresses(host_ip: str) -> list[str]:
    """Return what a binding's ``HostIp`` means; nothing for what the engine has to judge."""
    if not host_ip:
        return [ALL_IPV4, ALL_IPV6]
    try:
        return [str(ipaddress.ip_address(host_ip))]
    except ValueError:
        return []


def listening(listeners: Iterable[tuple[str, str, str, int]], names: Mapping[str, str]) -> Wanted:
    """Return the forwards for what host-network containers listen on.

    Only addresses that mean the same on the host: all of them, and the loopback's. One
    that listens on ``::`` takes IPv4 as well, unless it asked for IPv6 alone, which the
    guest's kernel does not tell.

    :param listeners: container's id, protocol, address and port.
    """
    found: Wanted = {}
    for id, protocol, address, port in listeners:
        parsed = ipaddress.ip_address(address)
        if id not in names or not (parsed.is_loopback or parsed.is_unspecified):
            continue
        for each in [ALL_IPV4, ALL_IPV6] if address == ALL_IPV6 else [str(parsed)]:
            found[Forward(protocol, each, port)] = Owner(id, names[id], port, host_network=True)
    return found


def sibling(forward: Forward, wanted: Mapping[Forward, Owner]) -> Forward | None:
    """Return the IPv4 forward that reaches what this IPv6 one should, if there is one."""
    owner = wanted[forward]
    for address in (ALL_IPV4, "127.0.0.1"):
        other = Forward(forward.protocol, address, forward.port)
        if wanted.get(other) == owner:
            return other
    return None
