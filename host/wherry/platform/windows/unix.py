"""Unix sockets, which Windows has since version 1803 and Python's ``socket`` has not there.

Python makes a socket object of any socket of Winsock's, and its loop reads and writes it as
one of TCP. What is missing is only to make one of this family, and to connect it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from pathlib import Path

assert sys.platform == "win32"  # Type checkers look on for Windows alone.

PATH_BYTES = 107
"""Of ``sun_path`` (afunix.h), without the NUL."""

_AF_UNIX = 1
_INVALID_SOCKET = ctypes.c_size_t(-1).value
_WSA_FLAG_OVERLAPPED = 0x01
_WSA_FLAG_NO_HANDLE_INHERIT = 0x80


def address(path: Path) -> bytes:
    """Return a ``sockaddr_un`` (afunix.h).

    :raises OSError: the path is too long.
    """
    name = os.fsencode(path)
    if len(name) > PATH_BYTES:
        raise OSError(f"{path} is too long for a socket: over {PATH_BYTES} bytes")
    return struct.pack("<H108s", _AF_UNIX, name)


def connect(path: Path) -> socket.socket:
    """Connect to the Unix socket of another program.

    :raises OSError: nobody listens there.
    """
    return connect_to(_AF_UNIX, address(path))


def connect_to(family: int, sockaddr: bytes) -> socket.socket:
    """Connect a new stream socket of any family to a C structure's address."""
    winsock = ctypes.WinDLL("ws2_32", use_last_error=True)
    winsock.WSASocketW.restype = ctypes.c_size_t
    winsock.WSASocketW.argtypes = (*[ctypes.c_int] * 3, ctypes.c_void_p, *[ctypes.c_uint] * 2)
    winsock.connect.argtypes = (ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)
    winsock.closesocket.argtypes = (ctypes.c_size_t,)
    flags = _WSA_FLAG_OVERLAPPED | _WSA_FLAG_NO_HANDLE_INHERIT
    handle = winsock.WSASocketW(family, socket.SOCK_STREAM, 0, None, 0, flags)
    if handle == _INVALID_SOCKET:
        raise ctypes.WinError(ctypes.get_last_error())
    try:
        if winsock.connect(handle, sockaddr, len(sockaddr)):
            raise ctypes.WinError(ctypes.get_last_error())
        return socket.socket(family, socket.SOCK_STREAM, 0, handle)
    except BaseException:
        winsock.closesocket(handle)
        raise
