"""The first question to the engine: is it there?"""

from __future__ import annotations

import re

from wherry.core.errors import TunnelError, WherryError
from wherry.tunnel.stream import Stream

SOCKET = "/run/docker.sock"
"""The engine's socket in the guest."""

_PING = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n"


def ping(stream: Stream) -> str:
    """Ask ``GET /_ping`` (Engine API, System) and return the engine's version.

    :param stream: a new connection to the engine; closed on return.
    :raises WherryError: it answered something else, or nothing.
    """
    try:
        stream.sendall(_PING)
        answer = bytearray()
        while chunk := stream.recv(65536):
            answer += chunk
    except TunnelError as error:
        raise WherryError(f"the engine did not answer: {error.message}") from error
    finally:
        stream.close()
    head = answer.decode("latin-1").partition("\r\n\r\n")[0]
    if not head.startswith("HTTP/1.1 200"):
        said = head.splitlines()[0] if head else "nothing"
        raise WherryError(f"the engine answered {said!r}")
    version = re.search(r"^Server: Docker/(\S+)", head, re.MULTILINE | re.IGNORECASE)
    return version[1] if version else ""
