"""What wherry needs to know of, and have from, the operating system.

One implementation per system, chosen once in :mod:`wherry.platform`. No other
module asks which system this is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from wherry.platform.resolvers import Resolvers


class LocalStream(Protocol):
    """A connection between two programs on this machine; a ``socket.socket`` is one.

    Reading and writing may happen in two threads at once.
    """

    def recv(self, size: int, /) -> bytes:
        """Wait for bytes and return up to ``size`` of them; ``b""`` at the end of the stream."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Like :meth:`recv`, into a buffer; 0 at the end of the stream."""

    def send(self, data: memoryview | bytes, /) -> int:
        """Send some of ``data`` and return how many bytes were taken."""

    def sendall(self, data: memoryview | bytes, /) -> None:
        """Send all of ``data``."""

    def shutdown(self, how: int, /) -> None:
        """End one direction (``socket.SHUT_WR``) or both (``socket.SHUT_RDWR``).

        Ending both wakes threads that are blocked in this stream. Where the stream is no
        socket, ending one waits until the other side has read what it was sent.
        """

    def fileno(self) -> int:
        """Return the descriptor to poll, or -1 where the system has none to poll."""

    def close(self) -> None:
        """Release the stream; safe to call twice."""


class UnpolledStream(LocalStream, Protocol):
    """A stream that is no socket: a named pipe.

    Reading raises OSError once the other side has left in both directions, as there is no
    poll(2) that tells of that.
    """

    def recv_ready(self, buffer: memoryview, /) -> int | None:
        """Like :meth:`recv_into`, but never wait; None when there are no bytes.

        That is so at the end of the stream as well, until it was read.
        """

    def await_gone(self) -> None:
        """Wait until the other side has left, in both directions; what it still sends is lost.

        :raises OSError: both directions were ended here.
        """


AcceptedStream = socket.socket | UnpolledStream
"""What a listener gives; a socket is a blocking one."""


class LocalListener(Protocol):
    """An address on this machine at which only its user can connect."""

    def accept(self) -> AcceptedStream:
        """Wait for a connection; several threads may do so at once, and one of them gets it.

        :raises OSError: the listener was closed.
        """

    def close(self) -> None:
        """Stop listening, wake the waiting accept, remove the address; safe to call twice."""


class ChangeSink(Protocol):
    """Who wants to know of changes in a tree; all paths are from the root, whose own is empty.

    The methods are quick, raise nothing, and may be called in any thread, one at a time.
    """

    def dirty(self, directory: str, /) -> None:
        """A directory's own entries may have changed; for a single file the path is empty."""

    def lost(self) -> None:
        """Anything may have changed."""

    def failed(self, reason: str, /) -> None:
        """Nothing will be told any more."""

    def notify(self) -> None:
        """Called in the watcher's thread after any of the others were called in it."""


class TreeWatcher(Protocol):
    """Tells of the changes in a tree, from its construction to :meth:`close`."""

    @property
    def exact(self) -> bool:
        """Whether :meth:`catch_up` proves anything; else the system tells when it likes to."""

    def catch_up(self) -> None:
        """Tell, in this thread, what is known.

        If :attr:`exact`, that is all that system calls changed which returned before this call.
        """

    def close(self) -> None:
        """Stop the thread and release all; safe to call twice."""


class Platform(Protocol):
    """One operating system."""

    @property
    def name(self) -> str:
        """``linux``, ``macos`` or ``windows``."""

    @property
    def accelerators(self) -> tuple[str, ...]:
        """QEMU's accelerators on this system, the fastest first, ``tcg`` last."""

    @property
    def data_directory(self) -> Path:
        """Where wherry keeps its machines and images when ``WHERRY_HOME`` is not set."""

    @property
    def socket_path_limit(self) -> int | None:
        """Bytes that a socket's path may have, without the final NUL; None for no limit."""

    @property
    def qemu_hint(self) -> str:
        """How to install QEMU here."""

    @property
    def hosts_file(self) -> Path:
        """The file of names that this computer knows by itself."""

    def resolvers(self) -> Resolvers:
        """Return which servers this computer asks for names now; none if it does not tell."""

    def low_port_hint(self, address: str, port: int) -> str:
        """Return what the user can do to publish a port below 1024."""

    def lengthen_queue(self, pid: int, address: str, port: int) -> None:
        """Let more clients wait at a process's listener, on IPv4, than it asked for.

        Does nothing where the system has no way to.

        :raises OSError: the system has one, and refuses it.
        """

    def accelerator_problem(self, accelerator: str) -> str | None:
        """Return why an accelerator cannot be used here at all, or None if it is worth a try."""

    def architecture(self) -> str:
        """Return the processor as the images name it: ``x86_64`` or ``aarch64``."""

    def cpu_model(self) -> str:
        """Return the processor's name; a key for caches, not for people."""

    def memory_bytes(self) -> int:
        """Return the size of the machine's memory."""

    def cpu_count(self) -> int:
        """Return the number of logical processors this program may use."""

    def process_start(self, pid: int) -> float:
        """Return when a process started, in seconds: the same number whenever it is asked.

        It is compared within one boot of the host, and a clock that is set does not move it.

        :raises ProcessLookupError: there is no such process.
        """

    def boot_id(self) -> str:
        """Return the id of this boot of the host: another one after each."""

    @property
    def drives(self) -> bool:
        """Whether paths begin with a drive's letter, which the guest has another form of."""

    def trusted_roots(self) -> list[bytes]:
        """Return the certificates of authorities that this computer trusts, as DER.

        :raises WherryError: the system does not tell.
        """

    def shared_directories(self) -> tuple[str, ...]:
        """Return the directories that containers can mount from unless the user says otherwise."""

    def make_private_directory(self, path: Path) -> None:
        """Make a directory, and its parents, that only the user can enter.

        :raises OSError: it cannot be made, or is another user's.
        """

    def default_docker_socket(self) -> Path | None:
        """Return where Docker clients look by default, None where no link can stand in for it.

        ``$WHERRY_DEFAULT_SOCKET`` names another place, for tests and unusual systems.
        """

    def raise_descriptor_limit(self, wanted: int) -> int:
        """Let this program have up to ``wanted`` open descriptors, or as many as it may.

        :returns: how many it may have now; never fewer than before.
        """

    def give_memory_back(self) -> None:
        """Return memory that is free to the system, and large pieces whenever they are freed.

        For the start of a process, and after large work. Does nothing where that is so anyway, or
        cannot be had.
        """

    def leash(self, argv: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
        """Return a command that runs ``argv``, and kills it when its own standard input ends.

        With a pipe of ours as that input, the program dies with us, whatever kills us. It
        gets no standard input itself. The command ends when the program does.
        """

    def short_directory(self) -> Path:
        """Return the user's private directory for sockets whose own would be too deep."""

    def listen_local(self, path: Path, known_as: str = "") -> LocalListener:
        """Listen where only the user can connect.

        On POSIX systems ``path`` is a Unix socket's, and a stale socket there is
        replaced. On Windows it only tells one pipe from another.

        :param known_as: the name by which others look for it, where it needs one: on
            Windows, which has no paths of sockets.
        :raises OSError: another program listens there, or the place is not writable.
        """

    def docker_host(self, path: Path, known_as: str) -> str:
        """Return a listener's address as ``DOCKER_HOST``: ``unix:///…``, ``npipe:////./pipe/…``."""

    def connect_local(self, path: Path, timeout_s: float) -> LocalStream:
        """Connect to what :meth:`listen_local` made without a name.

        :param timeout_s: for connecting alone.
        :raises OSError: nothing listens there.
        """

    def connect_unix(self, path: Path) -> socket.socket:
        """Connect to a Unix socket that another program made, on Windows too; never waits.

        :raises OSError: nothing listens there.
        """

    def watch_tree(
        self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]
    ) -> TreeWatcher:
        """Watch a directory with all that is below it, or a single file.

        :param skipped: whether changes in a path need not be told; the second argument says
            whether it is a directory.
        :raises OSError: it cannot be watched; the message is for the user.
        """
