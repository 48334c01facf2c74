"""How many clients may wait at a listener, also at another program's.

QEMU gives each of its listeners a queue of one (``slirp_hostfwd``), so that of many clients at
the same instant most try again after a second or more. On Linux a socket of another process of
ours can be had (pidfd_getfd(2)), and its queue made longer: listen(2) may be repeated.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket

import psutil

_PIDFD_GETFD = 438
"""The system call's number, the same on all architectures; the C library has no name for it."""

_QUEUE = 1024


def lengthen(pid: int, address: str, port: int) -> None:
    """Have a process's listener for TCP on IPv4 keep more clients waiting.

    :raises OSError: the system does not let us; before Linux 5.6, or where a process may not
        look into one that it has not started (``kernel.yama.ptrace_scope``).
    """
    try:
        found = psutil.Process(pid).net_connections("tcp4")
    except psutil.Error as error:
        raise ProcessLookupError(f"process {pid} cannot be looked into") from error
    process = os.pidfd_open(pid)
    try:
        for each in found:
            if each.status == psutil.CONN_LISTEN and each.laddr == (address, port):
                with contextlib.closing(_taken(process, each.fd)) as listener:
                    listener.listen(_QUEUE)
    finally:
        os.close(process)


def _taken(process: int, number: int) -> socket.socket:
    """Return another process's socket."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_PIDFD_GETFD, process, number, 0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return socket.socket(fileno=descriptor)
