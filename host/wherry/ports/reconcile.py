"""From what is to what should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wherry.ports.desired import Forward, Owner, sibling


@dataclass(frozen=True, order=True)
class Route:
    """How a forward's bytes travel.

    :ivar kind: ``hostfwd``: QEMU carries them; ``relay``: we do, to QEMU's listener for
        IPv4; ``tunnel``: we do, through SSH.
    :ivar guest: the address in the guest; empty is that of its network card.
    """

    kind: str
    guest: str = ""


def route(forward: Forward, wanted: Mapping[Forward, Owner]) -> Route:
    """Choose the fastest way that there is: ``hostfwd`` knows IPv4 alone."""
    if not forward.ipv6:
        return Route("hostfwd", "" if forward.address == "0.0.0.0" else forward.address)
    if sibling(forward, wanted) is not None:
        return Route("relay")
    return Route("tunnel", "::1" if forward.address == "::" else forward.address)


@dataclass(frozen=True)
class Changes:
    """What to do, in this order: a port may move from one address to another."""

    remove: tuple[Forward, ...]
    add: tuple[tuple[Forward, Route], ...]


def reconcile(wanted: Mapping[Forward, Owner], present: Mapping[Forward, Route]) -> Changes:
    """Return what turns ``present`` into ``wanted``, in a stable order.

    IPv4 comes first: a relay leads to it, and goes with it.
    """
    routes = {forward: route(forward, wanted) for forward in wanted}
    stay = {each for each, has in present.items() if routes.get(each) == has}
    relays = {each for each in stay if present[each].kind == "relay"}
    stay -= {each for each in relays if sibling(each, wanted) not in stay}
    return Changes(
        tuple(sorted(present.keys() - stay)),
        tuple(
            (forward, routes[forward])
            for forward in sorted(wanted, key=lambda each: (each.ipv6, each))
            if forward not in stay
        ),
    )
