"""What a query asks, and the answers we know ourselves; no sockets."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset

HOST_NAMES = ("host.docker.internal", "gateway.docker.internal")
"""The names that Docker Desktop has for the computer it runs on."""

_LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
"""In a container they are the container's own."""

_TTL_S = 5
"""Short: the host may change at any time."""

_LARGEST_BYTES = 65535
_SMALLEST_BYTES = 512
"""Of a message, by TCP and by UDP (RFC 1035 §4.2)."""

Hosts = Mapping[str, Sequence[str]]
"""Addresses by name, in small letters and without a dot at the end."""


def question(query: bytes) -> tuple[str, dns.rdatatype.RdataType] | None:
    """Return the name and type that a query asks for; None if it is no ordinary question."""
    message = _query(query)
    if message is None:
        return None
    asked = message.question[0]
    if asked.rdclass != dns.rdataclass.IN:
        return None
    return asked.name.to_text(omit_final_dot=True).lower(), asked.rdtype


def is_query(wire: bytes) -> bool:
    """Return whether a resolver has to be asked this; nonsense and answers are not passed on."""
    return _query(wire) is not None


def answer(query: bytes, hosts: Hosts, *, stream: bool) -> bytes | None:
    """Return the answer to a query about a name or address that ``hosts`` has; else None.

    A name without an address of the kind that is asked for has an empty answer, so that
    no client asks elsewhere (RFC 2308 §2.2).

    :param stream: whether it may be longer than one datagram to this client.
    """
    asked = question(query)
    if asked is None:
        return None
    name, kind = asked
    if kind == dns.rdatatype.PTR:
        found = _names_of(name, hosts)
        if not found:
            return None
    elif name in hosts:
        found = [
            each
            for each in hosts[name]
            if kind == (dns.rdatatype.AAAA if ":" in each else dns.rdatatype.A)
        ]
    else:
        return None
    try:
        message = dns.message.from_wire(query, ignore_trailing=True)
        reply = dns.message.make_response(message, recursion_available=True)
        if found:
            owner = message.question[0].name
            records = dns.rrset.from_text_list(owner, _TTL_S, dns.rdataclass.IN, kind, found)
            reply.answer.append(records)
        return _wire(reply, message, stream=stream)
    except (dns.exception.DNSException, ValueError):
        return None


def failure(query: bytes) -> bytes | None:
    """Return "server failure" for a query; None if it cannot be answered at all."""
    try:
        message = dns.message.from_wire(query)
        reply = dns.message.make_response(message, recursion_available=True)
    except (dns.exception.DNSException, ValueError):
        return None
    reply.set_rcode(dns.rcode.SERVFAIL)
    return reply.to_wire()


def completed(query: bytes, name: str) -> bytes | None:
    """Return the query about another name; None if that cannot be one."""
    try:
        message = dns.message.from_wire(query)
        old = message.question[0]
        message.question[0] = dns.rrset.RRset(dns.name.from_text(name), old.rdclass, old.rdtype)
        return message.to_wire()
    except (dns.exception.DNSException, ValueError):
        return None


def alias(query: bytes, reply: bytes, *, stream: bool) -> bytes | None:
    """Return the answer to a query that another name's reply is: its name is that one's alias.

    :param stream: whether it may be longer than one datagram to this client.
    :returns: None if the reply is none.
    """
    try:
        asked = dns.message.from_wire(query)
        found = dns.message.from_wire(reply)
        answer = dns.message.make_response(asked, recursion_available=True)
        if found.answer:
            short, whole = asked.question[0].name, found.question[0].name
            link = dns.rrset.from_text(short, _TTL_S, "IN", "CNAME", whole.to_text())
            answer.answer = [link, *found.answer]
        return _wire(answer, asked, stream=stream)
    except (dns.exception.DNSException, ValueError, IndexError):
        return None


def rcode(reply: bytes) -> int:
    """Return the code of a reply, without the part of it that EDNS adds (RFC 1035 §4.1.1)."""
    return reply[3] & 0xF if len(reply) > 3 else int(dns.rcode.SERVFAIL)


def parse_hosts(text: str, here: str) -> dict[str, list[str]]:
    """Read hosts(5): addresses by name.

    :param here: what stands for the loopback, which is another one in a container.
    """
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            continue
        if parsed.is_unspecified or parsed.is_multicast:
            continue
        if parsed.version == 6 and parsed.is_link_local:
            continue  # of a link that containers are not on
        for name in (each.lower().rstrip(".") for each in names):
            known = found.setdefault(name, []) if name not in _LOCAL_NAMES else []
            shown = here if parsed.is_loopback else str(parsed)
            if shown not in known:
                known.append(shown)
    return found


def _query(wire: bytes) -> dns.message.Message | None:
    try:
        message = dns.message.from_wire(wire, question_only=True)
    except (dns.exception.DNSException, ValueError):
        return None
    # One question is all that a query may have (RFC 9619).
    return message if len(message.question) == 1 and not message.flags & dns.flags.QR else None


def _wire(reply: dns.message.Message, query: dns.message.Message, *, stream: bool) -> bytes:
    """Return a reply's bytes: by UDP no more than the client takes, and marked if cut.

    What that is EDNS tells (RFC 6891 §6.2.3).
    """
    room = _LARGEST_BYTES if stream else max(_SMALLEST_BYTES, query.payload)
    return reply.to_wire(max_size=room, prefer_truncation=True)


def _names_of(reverse: str, hosts: Hosts) -> list[str]:
    try:
        address = dns.reversename.to_address(dns.name.from_text(reverse))
    except (dns.exception.DNSException, ValueError):
        return []
    wanted = str(ipaddress.ip_address(address))
    return next(([f"{name}."] for name, known in hosts.items() if wanted in known), [])
