"""Which servers the operating system asks for names, and how it completes them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Address = tuple[str, int]

_PORT = 53
_SEARCHES = 6
"""Of glibc before 2.26, and a bound on what one query costs."""

_FIELD = re.compile(r"\s+([a-z ]+?)(?:\[\d+\])?\s*: (.*)")
_LAST = 1 << 31


@dataclass(frozen=True)
class Servers:
    """Some servers, in the order in which they are asked.

    :ivar domain: the only one that they are asked about, in small letters; empty for all.
    """

    addresses: tuple[Address, ...]
    domain: str = ""


@dataclass(frozen=True)
class Resolvers:
    """A system's way to resolve names.

    :ivar search: domains that complete a name.
    :ivar dots: names with fewer dots than this are completed.
    """

    servers: tuple[Servers, ...] = ()
    search: tuple[str, ...] = ()
    dots: int = 1

    def servers_for(self, name: str) -> tuple[Address, ...]:
        """Return the servers to ask about a name: those of the longest domain that it is in.

        :param name: in small letters, without a dot at the end.
        """
        fitting = [
            each
            for each in self.servers
            if not each.domain or name == each.domain or name.endswith(f".{each.domain}")
        ]
        return max(fitting, key=lambda each: len(each.domain)).addresses if fitting else ()

    def completions(self, name: str) -> list[str]:
        """Return what a name may be short for, in order."""
        if not name or name.count(".") >= self.dots:
            return []
        return [f"{name}.{domain}" for domain in self.search]


def resolv_conf(text: str) -> Resolvers:
    """Read resolv.conf(5)."""
    addresses: list[Address] = []
    search: tuple[str, ...] = ()
    dots = 1
    for line in text.splitlines():
        keyword, *values = line.split() or [""]
        if keyword == "nameserver" and values and _is_address(values[0]):
            addresses.append((values[0], _PORT))
        elif keyword in ("search", "domain"):
            search = _domains(values)  # the last line counts
        elif keyword == "options":
            for option in values:
                name, _, value = option.partition(":")
                if name == "ndots" and value.isdecimal():
                    dots = min(int(value), 15)
    return Resolvers((Servers(tuple(addresses)),) if addresses else (), search, dots)


def scutil(text: str) -> Resolvers:
    """Read what ``scutil --dns`` of macOS prints.

    The first resolver is the one for all names, others are for their domain. Those that ask by
    multicast have no servers. What comes for the interfaces ("for scoped queries") says the same
    again.
    """
    found: list[tuple[int, Servers]] = []
    search: tuple[str, ...] = ()
    main = text.partition("(for scoped queries)")[0]
    for number, block in enumerate(re.split(r"^resolver #\d+$", main, flags=re.MULTILINE)[1:]):
        fields: dict[str, list[str]] = {}
        for line in block.splitlines():
            if match := _FIELD.fullmatch(line):
                fields.setdefault(match[1], []).append(match[2].strip())
        domains = _domains(fields.get("domain", ()))
        if number == 0:
            search = _domains(fields.get("search domain", ())) or domains
            domains = ()
        port = _number(fields, "port", _PORT)
        names = filter(_is_address, fields.get("nameserver", ()))
        servers = Servers(tuple((each, port) for each in names), domains[0] if domains else "")
        if servers.addresses:
            found.append((_number(fields, "order", _LAST if number else 0), servers))
    found.sort(key=lambda each: each[0])
    return Resolvers(tuple(servers for _, servers in found), search)


def _number(fields: Mapping[str, Sequence[str]], name: str, default: int) -> int:
    text = (fields.get(name) or [""])[0]
    return int(text) if text.isdecimal() else default


def _domains(words: Sequence[str]) -> tuple[str, ...]:
    found = (word.lower().strip(".") for word in words)
    return tuple(dict.fromkeys(domain for domain in found if domain))[:_SEARCHES]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True
