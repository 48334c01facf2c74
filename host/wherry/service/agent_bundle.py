"""Packing the agent, and the command that starts it in the guest.

The agent is not part of the image: the host sends its own with each session, so the two
are always of one release.
"""

from __future__ import annotations

import hashlib
import io
import shlex
import zipfile
from dataclasses import dataclass
from importlib.resources import files

from wherry.core.errors import WherryError

_PACKAGES = ("wherry_guest", "wherry_sync", "wherry_wire")
_MAIN = """\
import sys
from wherry_guest.agent import main
sys.exit(main())
"""

# The command's standard input is the zipapp's bytes and then, on the same stream, frames.
# So nothing may be read beyond the bytes announced: os.read takes no more than it is asked
# for, whereas busybox's head reads whole blocks. The interpreter that stores the zipapp goes
# on to run it: dd(1), mv(1) and a second start of Python take half as long again. -I and -S
# leave out what the agent does not use: the environment, the user's directories and
# site-packages.
_BOOTSTRAP = (
    """\
import os, sys
path, size = sys.argv[1], int(sys.argv[2])
data = b""
while len(data) < size:
    piece = os.read(0, size - len(data))
    if not piece:
        sys.exit("the agent did not arrive completely")
    data += piece
if not os.path.exists(path):
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with open(f"{path}.{os.getpid()}", "wb") as file:
        file.write(data)
    os.rename(file.name, path)
sys.path.insert(0, path)
"""
    + _MAIN
)


@dataclass(frozen=True)
class AgentBundle:
    """The agent as one file.

    :ivar name: the file's name; it has the hash of its contents.
    :ivar data: a zipapp (PEP 441) for Python 3.11 or later.
    """

    name: str
    data: bytes

    def command(self, *, python: str = "python3", directory: str = "/run/wherry") -> str:
        """Return the shell command that reads :attr:`data` from its standard input and runs it.

        What follows on standard input is the session's.

        :param directory: where to keep the zipapp, in memory as /run is; made if missing.
        """
        path = f"{directory}/{self.name}"
        return shlex.join(["exec", python, "-IS", "-c", _BOOTSTRAP, path, str(len(self.data))])


def build() -> AgentBundle:
    """Pack the installed agent; the same sources give the same bytes on every system.

    :raises WherryError: this installation lacks the sources, as when a freezer of programs
        was not told that they are data.
    """
    sources = {"__main__.py": _MAIN.encode()}
    for package in _PACKAGES:
        try:
            found = [file for file in files(package).iterdir() if file.name.endswith(".py")]
        except (ModuleNotFoundError, OSError):
            found = []
        if not found:
            raise WherryError(
                f"the sources of {package} are not installed", hint="install wherry again"
            )
        sources |= {f"{package}/{file.name}": file.read_bytes() for file in found}
    buffer = io.BytesIO()
    # Stored, not deflated: zlib's output differs between its versions, and the guest would
    # spend more on inflating than on receiving.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, source in sorted(sources.items()):
            entry = zipfile.ZipInfo(name)
            entry.create_system = 3  # Unix, also when packed on Windows.
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, source)
    data = buffer.getvalue()
    return AgentBundle(f"agent-{hashlib.sha256(data).hexdigest()[:16]}.pyz", data)
