"""Why a port of this computer cannot be bound, in words for the user."""

from __future__ import annotations

import errno
import ipaddress
import socket

import psutil

from wherry.platform.base import Platform
from wherry.ports.desired import Forward

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def open_socket(forward: Forward) -> socket.socket:
    """Return a socket that is bound to the forward's address, and listens if it is TCP's.

    :raises OSError: the system refuses.
    """
    family = socket.AF_INET6 if forward.ipv6 else socket.AF_INET
    made = socket.socket(family, _KINDS[forward.protocol])
    try:
        if forward.ipv6:
            # The IPv4 part is another listener's.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if forward.protocol == "tcp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((forward.address, forward.port))
        if forward.protocol == "tcp":
            made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


_BACKLOG = 512


def try_bind(forward: Forward) -> OSError | None:
    """Return what the system says against binding a port; None when it can be bound."""
    try:
        open_socket(forward).close()
    except OSError as error:
        return error
    return None


def explain(forward: Forward, error: OSError, platform: Platform) -> str:
    """Return the engine's words for the error, with who or what is in the way."""
    what = f"failed to bind host port {forward}"
    if error.errno == errno.EADDRINUSE:
        holder = find_holder(forward)
        by = f" by {holder}" if holder else ""
        return f"{what}: address already in use{by}"
    if error.errno in (errno.EACCES, errno.EPERM) and forward.port < 1024:
        hint = platform.low_port_hint(forward.address, forward.port)
        return f"{what}: permission denied: ports below 1024 are the system's; {hint}"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{what}: cannot assign requested address: "
            f"this computer has no address {forward.address}"
        )
    return f"{what}: {error.strerror or error}"


def find_holder(forward: Forward) -> str:
    """Return the process that holds a port, such as ``python3 (process 42)``.

    Empty when the system does not tell: it may be another user's.
    """
    try:
        connections = psutil.net_connections(kind=forward.protocol)
    except (psutil.Error, OSError):
        return ""
    wanted = ipaddress.ip_address(forward.address)
    found: dict[bool, int] = {}
    for each in connections:
        if not each.laddr or each.laddr.port != forward.port or each.pid is None:
            continue
        if each.status not in (psutil.CONN_LISTEN, psutil.CONN_NONE):
            continue
        held = ipaddress.ip_address(each.laddr.ip.partition("%")[0])
        if _overlap(held, wanted):
            found[held.version == wanted.version] = each.pid
    if not found:
        return ""
    # They come in no order. One of the other family may be bound for that family alone.
    pid = found.get(True) or found[False]
    try:
        return f"{psutil.Process(pid).name()} (process {pid})"
    except psutil.Error:
        return f"process {pid}"


def in_use() -> set[tuple[str, int]]:
    """Return protocol and port of all that is bound here, as far as the system tells.

    Connections count: their own ports cannot be listened on either.
    """
    try:
        return {
            (protocol, each.laddr.port)
            for protocol in _KINDS
            for each in psutil.net_connections(kind=protocol)
            if each.laddr
        }
    except (psutil.Error, OSError):
        return set()


def _overlap(held: _Address, wanted: _Address) -> bool:
    if held.version == wanted.version:
        return held == wanted or held.is_unspecified or wanted.is_unspecified
    # "::" holds IPv4 as well, unless it was bound for IPv6 alone, as ours are.
    return held.version == 6 and held.is_unspecified
