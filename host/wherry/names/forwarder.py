"""A DNS server on the host's loopback, for the guest alone.

The guest sends its queries here. A name that we know is answered; all else goes, as it
came, to the resolvers that the host has at that moment, so a change of networks or a VPN
needs no restart. An answer passes as it came, too: whatever types, sizes and flags it has.
"""

from __future__ import annotations

import logging
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import dns.rcode
import dns.rdatatype

from wherry.names.zone import Hosts, alias, answer, completed, failure, is_query, question, rcode
from wherry.platform.resolvers import Address, Resolvers
from wherry.relay.workers import Workers

_TRY_S = 2.0
"""How long one server is waited for at first: others may answer, or it may the second time."""

_TOTAL_S = 8.0
"""Clients ask again after five seconds, and twice, as a rule (resolv.conf(5))."""

_SILENT_S = 30.0
"""How long a server that did not answer is waited for no longer than :data:`_AGAIN_S` at first. It
is not passed over: the next one says of names that only this one has that there are none."""

_AGAIN_S = 0.15
_SILENT_QUERIES = 32
"""How many may wait for such a server at once; the rest of :data:`QUERIES` is for the others."""

_REFUSALS = (dns.rcode.SERVFAIL, dns.rcode.NOTIMP, dns.rcode.REFUSED)
"""Another server may know better: as resolvers in C libraries go on with the next one."""

_COMPLETED = (dns.rdatatype.A, dns.rdatatype.AAAA)
"""What is asked to connect to a name. To complete it is left to us, who know the host's domains of
this moment: those in a container are of when it started."""

_CLIENT_S = 10.0
_LARGEST = 65535
"""Bytes of a message (RFC 1035 §4.2.2)."""
QUERIES = 128
"""At once, and as many connections; more are dropped, and asked again by their clients."""

_STEP_S = 0.25
_CLOSE_S = 12.0
_ATTEMPTS = 20

_logger = logging.getLogger(__name__)

Ask = Callable[[bytes, Address, float], bytes]
"""Asks a server, for at most so many seconds; raises OSError when it does not answer."""


class NameServer:
    """Answers queries on 127.0.0.1, at a port of its own for UDP and TCP.

    :param hosts: the names we know; called for each query.
    :param resolvers: where all else is asked, and how names are completed; called for each query.
    :raises OSError: there is no port to have.
    """

    def __init__(self, hosts: Callable[[], Hosts], resolvers: Callable[[], Resolvers]) -> None:
        self._hosts = hosts
        self._resolvers = resolvers
        self._udp, self._tcp = _bind()
        self.port: int = self._udp.getsockname()[1]
        self._wake, self._alarm = socket.socketpair()
        self._workers = Workers("names")
        self._queries = threading.BoundedSemaphore(QUERIES)
        self._connections = threading.BoundedSemaphore(QUERIES)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._silent: dict[Address, float] = {}
        self._waiting: Counter[Address] = Counter()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="names", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more; safe to call twice."""
        if self._closing:
            return
        with self._lock:
            self._closing = True
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._alarm.send(b"x")
        self._thread.join(_CLOSE_S)
        if not self._workers.close(_CLOSE_S):
            _logger.warning("a query did not end within %g s", _CLOSE_S)
        for each in (self._udp, self._tcp, self._wake, self._alarm):
            each.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in (self._udp, self._tcp, self._wake):
                selector.register(each, selectors.EVENT_READ)
            while not self._closing:
                for key, _ in selector.select():
                    try:
                        if key.fileobj is self._udp:
                            self._receive(*self._udp.recvfrom(_LARGEST))
                        elif key.fileobj is self._tcp:
                            connection, _ = self._tcp.accept()
                            serve = partial(self._stream, connection)
                            if not self._spawn(serve, self._connections):
                                connection.close()
                    except OSError as error:
                        _logger.info("a query was lost: %s", error)

    def _receive(self, query: bytes, client: Address) -> None:
        """Answer what we know here: queries that wait for a resolver are not in its way."""
        known = answer(query, self._hosts(), stream=False)
        if known is not None:
            self._udp.sendto(known, client)
        else:
            self._spawn(partial(self._datagram, query, client), self._queries)

    def _spawn(self, job: Callable[[], None], slots: threading.BoundedSemaphore) -> bool:
        if not slots.acquire(blocking=False):
            return False

        def work() -> None:
            try:
                job()
            except OSError as error:
                _logger.info("a query was not answered: %s", error)
            finally:
                slots.release()

        try:
            self._workers.spawn(work)
        except RuntimeError:
            slots.release()
            return False
        return True

    def _datagram(self, query: bytes, client: Address) -> None:
        reply = self._resolve(query, self._ask_udp, stream=False)
        if reply is not None:
            self._udp.sendto(reply, client)

    def _stream(self, connection: socket.socket) -> None:
        """Answer the queries of one connection (RFC 7766), one after the other."""
        with self._held(connection):
            connection.settimeout(_CLIENT_S)
            while not self._closing and (query := _receive(connection)):
                known = answer(query, self._hosts(), stream=True)
                reply = known or self._resolve(query, self._ask_tcp, stream=True)
                if reply is None:
                    return
                connection.sendall(struct.pack("!H", len(reply)) + reply)

    def _resolve(self, query: bytes, ask: Ask, *, stream: bool) -> bytes | None:
        """Have the host's resolvers answer a query.

        What a name is short for is asked as C libraries do: where nobody answers, or a server
        fails, it is not known whether there is such a name, so a later one does not count.
        """
        if not is_query(query):
            return None
        resolvers, end = self._resolvers(), time.monotonic() + _TOTAL_S
        name, kind = question(query) or ("", None)
        refused = False
        if kind in _COMPLETED and name != "localhost":
            for whole in resolvers.completions(name):
                wire = completed(query, whole)
                if wire is None:
                    continue
                reply = self._ask(wire, resolvers.servers_for(whole), ask, end)
                if reply is None:
                    return failure(query)
                if rcode(reply) == dns.rcode.NOERROR:
                    return alias(query, reply, stream=stream) or failure(query)
                refused = refused or rcode(reply) in _REFUSALS
        reply = self._ask(query, resolvers.servers_for(name), ask, end)
        if reply is None or (refused and rcode(reply) == dns.rcode.NXDOMAIN):
            return failure(query)
        return reply

    def _ask(
        self, query: bytes, addresses: Sequence[Address], ask: Ask, end: float
    ) -> bytes | None:
        """Ask one server after the other, in the host's order.

        If none says anything, each is asked once more: a datagram may be lost, and a name may
        take a resolver longer the first time.
        """
        refusal: bytes | None = None
        asked = list(addresses)
        for again in (False, True):
            silent = []
            for number, address in enumerate(asked):
                left_s = end - time.monotonic()
                if left_s <= 0 or self._closing:
                    return refusal
                wait_s = left_s / (len(asked) - number)
                if not again:
                    wait_s = min(wait_s, _AGAIN_S if self._is_silent(address) else _TRY_S)
                try:
                    with self._waits_for(address):
                        reply = ask(query, address, wait_s)
                except OSError as error:
                    _logger.info("the resolver %s does not answer: %s", address[0], error)
                    self._silent[address] = time.monotonic() + _SILENT_S
                    silent.append(address)
                    continue
                self._silent.pop(address, None)
                if rcode(reply) not in _REFUSALS:
                    return reply
                refusal = refusal or reply
            if refusal is not None:
                return refusal
            asked = silent
        return None

    def _is_silent(self, address: Address) -> bool:
        return self._silent.get(address, 0.0) > time.monotonic()

    @contextmanager
    def _waits_for(self, address: Address) -> Iterator[None]:
        """Count those who wait for a server.

        :raises OSError: it is silent, and enough do.
        """
        with self._lock:
            if self._is_silent(address) and self._waiting[address] >= _SILENT_QUERIES:
                raise OSError("others wait for it already")
            self._waiting[address] += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting[address] -= 1
                if not self._waiting[address]:
                    del self._waiting[address]

    @contextmanager
    def _held(self, connection: socket.socket) -> Iterator[None]:
        """Close a socket at the end, and shut it down when we close, so that nobody waits."""
        with connection:
            with self._lock:
                if self._closing:
                    raise OSError("it is too late")
                self._open.add(connection)
            try:
                yield
            finally:
                with self._lock:
                    self._open.discard(connection)

    def _ask_udp(self, query: bytes, address: Address, timeout_s: float) -> bytes:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as upstream:
            # Connected: only the resolver's own answers come, and its refusals are errors.
            upstream.connect(address)
            upstream.send(query)
            end = time.monotonic() + timeout_s
            while not self._closing and (left_s := end - time.monotonic()) > 0:
                # In steps, as a shutdown wakes nobody who waits for datagrams.
                upstream.settimeout(min(left_s, _STEP_S))
                with suppress(TimeoutError):
                    reply = upstream.recv(_LARGEST)
                    if reply[:2] == query[:2]:
                        return reply
            raise TimeoutError("it is silent")

    def _ask_tcp(self, query: bytes, address: Address, timeout_s: float) -> bytes:
        upstream = socket.socket(_family(address), socket.SOCK_STREAM)
        with self._held(upstream):
            upstream.settimeout(timeout_s)
            upstream.connect(address)
            upstream.sendall(struct.pack("!H", len(query)) + query)
            reply = _receive(upstream)
            if not reply:
                raise OSError("it closed the connection")
            return reply


def _bind() -> tuple[socket.socket, socket.socket]:
    """Return two sockets with one port."""
    for attempt in range(_ATTEMPTS):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(("127.0.0.1", 0))
            return udp, socket.create_server(udp.getsockname(), backlog=128)
        except OSError:
            udp.close()
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def _receive(stream: socket.socket) -> bytes:
    """Return one message with its length before it; nothing at the end."""
    head = _exactly(stream, 2)
    return _exactly(stream, int(struct.unpack("!H", head)[0])) if head else b""


def _exactly(stream: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        data = stream.recv(count - len(found))
        if not data:
            return b""
        found += data
    return found
