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
from collections.abc import Callable, Sequence
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
"""How long a server that did not answer is asked after the others."""

_REFUSALS = (dns.rcode.SERVFAIL, dns.rcode.NOTIMP, dns.rcode.REFUSED)
"""Another server may know better: as resolvers in C libraries go on with the next one."""

_COMPLETED = (dns.rdatatype.A, dns.rdatatype.AAAA)
"""What is asked to connect to a name. To complete it is left to us, who know the host's domains of
this moment: those in a container are of when it started."""

_CLIENT_S = 10.0
_LARGEST = 65535
"""Bytes of a message (RFC 1035 §4.2.2)."""
QUERIES = 128
"""At once; more are dropped, and asked again by their clients."""

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
        self._lock = threading.Lock()
        self._active = 0
        self._silent: dict[Address, float] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="names", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more; safe to call twice."""
        if self._closing:
            return
        self._closing = True
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
                            if not self._spawn(partial(self._stream, connection)):
                                connection.close()
                    except OSError as error:
                        _logger.info("a query was lost: %s", error)

    def _receive(self, query: bytes, client: Address) -> None:
        """Answer what we know here: queries that wait for a resolver are not in its way."""
        known = answer(query, self._hosts())
        if known is not None:
            self._udp.sendto(known, client)
        else:
            self._spawn(partial(self._datagram, query, client))

    def _spawn(self, job: Callable[[], None]) -> bool:
        with self._lock:
            if self._active >= QUERIES:
                return False
            self._active += 1

        def work() -> None:
            try:
                job()
            except OSError as error:
                _logger.info("a query was not answered: %s", error)
            finally:
                with self._lock:
                    self._active -= 1

        try:
            self._workers.spawn(work)
        except RuntimeError:
            with self._lock:
                self._active -= 1
            return False
        return True

    def _datagram(self, query: bytes, client: Address) -> None:
        reply = self._resolve(query, _ask_udp, stream=False)
        if reply is not None:
            self._udp.sendto(reply, client)

    def _stream(self, connection: socket.socket) -> None:
        """Answer the queries of one connection (RFC 7766), one after the other."""
        with connection:
            connection.settimeout(_CLIENT_S)
            while not self._closing and (query := _receive(connection)):
                known = answer(query, self._hosts())
                reply = known or self._resolve(query, _ask_tcp, stream=True)
                if reply is None:
                    return
                connection.sendall(struct.pack("!H", len(reply)) + reply)

    def _resolve(self, query: bytes, ask: Ask, *, stream: bool) -> bytes | None:
        """Have the host's resolvers answer a query."""
        if not is_query(query):
            return None
        resolvers, left_s = self._resolvers(), _TOTAL_S
        name, kind = question(query) or ("", None)
        if kind in _COMPLETED and name != "localhost":
            found = [(each, completed(query, each)) for each in resolvers.completions(name)]
            longer = [(each, wire) for each, wire in found if wire is not None]
            left_s /= len(longer) + 1
            for whole, wire in longer:
                reply = self._ask(wire, resolvers.servers_for(whole), ask, left_s)
                if reply is not None and rcode(reply) == dns.rcode.NOERROR:
                    return alias(query, reply, stream=stream) or failure(query)
        return self._ask(query, resolvers.servers_for(name), ask, left_s) or failure(query)

    def _ask(
        self, query: bytes, addresses: Sequence[Address], ask: Ask, timeout_s: float
    ) -> bytes | None:
        """Ask one server after the other; those that were silent of late come last.

        Who does not answer is asked once more: a datagram may be lost, and a name may take a
        resolver longer the first time.
        """
        refusal: bytes | None = None
        start = time.monotonic()
        end = start + timeout_s
        asked = sorted(addresses, key=lambda each: self._silent.get(each, 0.0) > start)
        for again in (False, True):
            silent = []
            for number, address in enumerate(asked):
                left_s = end - time.monotonic()
                if left_s <= 0 or self._closing:
                    return refusal
                wait_s = left_s / (len(asked) - number) if again else min(_TRY_S, left_s)
                try:
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
            asked = silent
        return refusal


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


def _ask_udp(query: bytes, address: Address, timeout_s: float) -> bytes:
    with socket.socket(_family(address), socket.SOCK_DGRAM) as upstream:
        # Connected: only the resolver's own answers come, and its refusals are errors.
        upstream.connect(address)
        upstream.send(query)
        end = time.monotonic() + timeout_s
        while True:
            upstream.settimeout(max(0.001, end - time.monotonic()))
            reply = upstream.recv(_LARGEST)
            if reply[:2] == query[:2]:
                return reply


def _ask_tcp(query: bytes, address: Address, timeout_s: float) -> bytes:
    with socket.create_connection(address, timeout=timeout_s) as upstream:
        upstream.sendall(struct.pack("!H", len(query)) + query)
        reply = _receive(upstream)
        if not reply:
            raise OSError("it closed the connection")
        return reply


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
