"""Named pipes, on the real thing: what Docker's clients and the control API rely on."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import win32con
import win32file
import win32security
from pipe_cases import *  # noqa: F403 - the cases
from pipe_cases import Pair, in_thread, rest, waits

from wherry.platform.windows.kernel import Kernel
from wherry.platform.windows.pipes import PipeListener, PipeStream, connect
from wherry.platform.windows.security import user_sid

from .conftest import UNDER_WINE, WAIT_S

pytestmark = pytest.mark.windows

CLIENTS = 50


def test_many_small_writes_are_one_stream(pair: Pair) -> None:
    server, client = pair

    def send() -> None:
        for number in range(5000):
            client.sendall(b"%5d" % number)
        client.shutdown(socket.SHUT_WR)

    with in_thread(send):
        assert rest(server) == b"".join(b"%5d" % number for number in range(5000))


def test_no_client_of_many_at_once_finds_it_busy(
    kernel: Kernel, name: str, listener: PipeListener
) -> None:
    """Each opens it without the wait of connect(), several times."""
    together = threading.Barrier(CLIENTS)
    access = win32con.GENERIC_READ | win32con.GENERIC_WRITE
    flags = win32file.FILE_FLAG_OVERLAPPED

    def client(number: int) -> int:
        together.wait(WAIT_S)
        pipe = win32file.CreateFile(name, access, 0, None, win32con.OPEN_EXISTING, flags, None)
        stream = PipeStream(kernel, pipe)
        stream.sendall(b"%d" % number)
        stream.shutdown(socket.SHUT_WR)
        answer = int(rest(stream))
        stream.close()
        return answer

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                stream = listener.accept()
                said = rest(stream)
                stream.sendall(said)
                stream.shutdown(socket.SHUT_WR)
                stream.close()

    with in_thread(serve), in_thread(serve):
        with ThreadPoolExecutor(CLIENTS) as pool:
            for _ in range(3):
                assert sorted(pool.map(client, range(CLIENTS))) == list(range(CLIENTS))
        listener.close()


def test_instances_outlive_the_thread_that_made_them(
    kernel: Kernel, name: str, listener: PipeListener
) -> None:
    """What a thread began ends with it, but not what belongs to a completion port."""
    for _ in range(100):
        with in_thread(listener.accept) as accepted:
            client = connect(kernel, name, WAIT_S)
            server = accepted.result(WAIT_S)
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        client.close()
        server.close()


def test_the_pipe_is_the_users_alone(pair: Pair) -> None:
    for end in pair:
        found = win32security.GetSecurityInfo(
            end._pipe, win32security.SE_KERNEL_OBJECT, win32security.DACL_SECURITY_INFORMATION
        )
        text = win32security.ConvertSecurityDescriptorToStringSecurityDescriptor(
            found, 1, win32security.DACL_SECURITY_INFORMATION
        )
        # Windows writes all rights of a pipe out as those of a file (FA).
        assert text in {f"D:P(A;;{rights};;;{user_sid()})" for rights in ("GA", "FA")}


@pytest.mark.skipif(UNDER_WINE, reason="Wine 8 takes no notice of FILE_FLAG_FIRST_PIPE_INSTANCE")
def test_a_name_that_is_taken_is_refused(kernel: Kernel, name: str, listener: PipeListener) -> None:
    with pytest.raises(PermissionError):
        PipeListener(kernel, name)
    other = win32file.CreateFile(
        name, win32con.GENERIC_READ, 0, None, win32con.OPEN_EXISTING, 0, None
    )
    other.Close()


def test_connecting_waits_while_all_are_busy(kernel: Kernel, name: str) -> None:
    listener = PipeListener(kernel, name, pending=1)
    first = connect(kernel, name, WAIT_S)
    with pytest.raises(OSError) as busy:
        connect(kernel, name, 0.2)
    assert busy.value.winerror == 231
    with in_thread(lambda: connect(kernel, name, WAIT_S)) as waiting:
        assert waits(waiting)
        listener.accept().close()
        waiting.result(WAIT_S).close()
    first.close()
    listener.close()


def test_errors_are_os_errors(kernel: Kernel) -> None:
    with pytest.raises(OSError):
        kernel.make_instance("no pipe's name", first=True)
    with pytest.raises(OSError):
        PipeListener(kernel, "no pipe's name")
