"""A name server of the tests' own, which answers what it is told to."""

from __future__ import annotations

import socket
import threading

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


class Resolver:
    """A name server on the loopback, by UDP and TCP: records by name and type.

    :param host: an address of the loopback.
    :param port: 0 for one that is free.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.asked: list[str] = []
        self.refuses = False
        self.ignored = ""
        while True:
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self._udp.bind((host, port))
                self.address = self._udp.getsockname()
                self._tcp = socket.create_server(self.address)
                break
            except OSError:
                self._udp.close()
                if port:
                    raise
        self._threads = [
            threading.Thread(target=self._serve_udp), threading.Thread(target=self._serve_tcp)
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def _reply(self, wire: bytes, *, whole: bool) -> bytes:
        """Return the answer; nothing for the name that is ignored."""
        query = dns.message.from_wire(wire)
        asked = query.question[0]
        name, kind = asked.name.to_text(), dns.rdatatype.to_text(asked.rdtype)
        if name == self.ignored:
            return b""
        self.asked.append(name)
        reply = dns.message.make_response(query)
        if self.refuses:
            reply.set_rcode(dns.rcode.REFUSED)
            return reply.to_wire()
        found = self.records.get((name, kind))
        if found is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        elif found:
            reply.answer.append(dns.rrset.from_text_list(asked.name, 60, "IN", kind, found))
        answer = reply.to_wire(max_size=65535)
        if not whole and len(answer) > max(512, query.payload):
            reply.answer.clear()
            reply.flags |= dns.flags.TC
            answer = reply.to_wire()
        return answer

    def _serve_udp(self) -> None:
        while True:
            wire, client = self._udp.recvfrom(65535)
            if not wire:
                return
            if reply := self._reply(wire, whole=False):
                self._udp.sendto(reply, client)

    def _serve_tcp(self) -> None:
        while True:
            connection, _ = self._tcp.accept()
            with connection:
                head = connection.recv(2, socket.MSG_WAITALL)
                if not head:
                    return
                wire = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
                answer = self._reply(wire, whole=True)
                connection.sendall(len(answer).to_bytes(2, "big") + answer)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.address)
        socket.create_connection(self.address).close()
        for thread in self._threads:
            thread.join(5)
        self._udp.close()
        self._tcp.close()
