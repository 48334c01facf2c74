"""Which names and kinds of files a host can hold; the guest can hold all.

What the host cannot hold stays the guest's own and is reported, and nothing else happens to it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

# "Naming Files, Paths, and Namespaces" of the Windows documentation. A device's name is
# reserved with any extension, and the superscript digits count as digits.
_DEVICE = re.compile(
    r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9¹²³])\s*(?:\..*)?\Z", re.I
)
_CHARACTERS = frozenset('<>:"\\|?*') | {chr(code) for code in range(32)}


@dataclass(frozen=True)
class Traits:
    """A host's filesystem.

    :ivar case_sensitive: whether ``Foo`` and ``foo`` are two names. A host that is not also
        takes the composed and the decomposed form of a name for one, as APFS and HFS+ do.
    :ivar windows_names: whether Windows' rules for names hold.
    :ivar links: whether symbolic links can be made.
    :ivar executable: whether files have an executable bit.
    """

    case_sensitive: bool = True
    windows_names: bool = False
    links: bool = True
    executable: bool = True

    def name_problem(self, name: str) -> str | None:
        """Return why the host cannot have a name, or None if it can."""
        if not self.windows_names:
            return None
        if _DEVICE.match(name):
            return "its name is a device's on Windows"
        if name[-1] in ". ":
            return "its name ends with a dot or a space, which Windows removes"
        if not _CHARACTERS.isdisjoint(name):
            return "its name has a character that Windows reserves"
        return None

    def fold(self, name: str) -> str:
        """Return what two names have in common that the host takes for one."""
        if self.case_sensitive:
            return name
        if name.isascii():
            return name.lower()
        # Folding can undo a normal form, so it is between two normalisations (UAX 15).
        return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())

    def twins(
        self, guest: Collection[str], host: Collection[str], ancestor: Collection[str]
    ) -> dict[str, str]:
        """Return the guest's names that the host cannot tell from another of the guest's.

        :param guest: all names of one directory in the guest.
        :param host: all names that the host has there. All of these stay: if there are several
            of one kind, this host tells more names apart than others do.
        :param ancestor: names that both had; where the host has none of a kind, one of them stays.
        :returns: each name that cannot be on the host, with one that is there.
        """
        if self.case_sensitive:
            return {}
        groups: defaultdict[str, list[str]] = defaultdict(list)
        for name in guest:
            groups[self.fold(name)].append(name)
        twins = {}
        for names in groups.values():
            if len(names) > 1:
                stays = min(names, key=lambda name: (name not in host, name not in ancestor, name))
                refused = (name for name in names if name != stays and name not in host)
                twins.update(dict.fromkeys(refused, stays))
        return twins
