"""Sizes as people write them: ``4GiB``, ``512 MiB``, ``64G``."""

from __future__ import annotations

import re
from decimal import Decimal

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<prefix>[kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes of a size; all prefixes are powers of 1024, as in ``docker run -m``.

    :raises ValueError: the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 4GiB")
    return int(Decimal(match["number"]) * 1024 ** _POWERS[match["prefix"].lower()])


def format_size(size: float) -> str:
    """Return a size with the largest prefix that leaves at least 1, as ``1.5 GiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if size == int(size) else f"{size:.1f} {units[0]}"
