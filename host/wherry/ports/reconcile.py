"""From what is to what should be."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from wherry.ports.desired import Forward


@dataclass(frozen=True)
class Changes:
    """What to do, in this order: a port may move from one address to another."""

    remove: tuple[Forward, ...]
    add: tuple[Forward, ...]


def reconcile(wanted: Set[Forward], present: Set[Forward]) -> Changes:
    """Return what turns ``present`` into ``wanted``, in a stable order."""
    return Changes(tuple(sorted(present - wanted)), tuple(sorted(wanted - present)))
