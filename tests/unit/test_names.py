"""What is asked of the host's names, and the answers that it has itself; no sockets."""

from __future__ import annotations

import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from wherry.names.zone import answer, failure, is_query, parse_hosts, parse_resolvers, question

HOSTS = {"host.docker.internal": ["10.0.2.2"], "nas.lan": ["192.168.1.9", "fd00::9"]}


def query(name: str, kind: str = "A") -> bytes:
    return dns.message.make_query(name, kind).to_wire()


def said(name: str, kind: str = "A") -> list[str] | None:
    wire = answer(query(name, kind), HOSTS)
    if wire is None:
        return None
    message = dns.message.from_wire(wire)
    assert message.rcode() == dns.rcode.NOERROR
    return [item.to_text() for rrset in message.answer for item in rrset]


@pytest.mark.parametrize(
    ("name", "kind", "answers"),
    [
        ("host.docker.internal", "A", ["10.0.2.2"]),
        ("HOST.docker.Internal.", "A", ["10.0.2.2"]),
        ("host.docker.internal", "AAAA", []),
        ("host.docker.internal", "TXT", []),
        ("nas.lan", "A", ["192.168.1.9"]),
        ("nas.lan", "AAAA", ["fd00::9"]),
        ("9.1.168.192.in-addr.arpa", "PTR", ["nas.lan."]),
        ("8.1.168.192.in-addr.arpa", "PTR", None),
        ("example.com", "A", None),
        ("docker.internal", "A", None),
    ],
)
def test_the_names_we_know(name: str, kind: str, answers: list[str] | None) -> None:
    assert said(name, kind) == answers


def test_an_answer_is_the_query_s() -> None:
    asked = query("nas.lan")
    reply = dns.message.from_wire(answer(asked, HOSTS) or b"")
    assert dns.message.from_wire(asked).is_response(reply)


@pytest.mark.parametrize("wire", [b"", b"\0" * 5, b"\xff" * 40, b"\0" * 12])
def test_what_is_no_query_is_not_answered(wire: bytes) -> None:
    assert question(wire) is None
    assert not is_query(wire)
    assert answer(wire, HOSTS) is None


def test_answers_are_not_taken_for_questions() -> None:
    reply = dns.message.make_response(dns.message.from_wire(query("nas.lan"))).to_wire()
    assert question(reply) is None
    assert not is_query(reply)


def test_a_failure_answers_the_query() -> None:
    asked = query("example.com", "SRV")
    reply = dns.message.from_wire(failure(asked) or b"")
    assert dns.message.from_wire(asked).is_response(reply)
    assert reply.rcode() == dns.rcode.SERVFAIL
    assert failure(b"nonsense") is None


def test_the_hosts_file() -> None:
    text = "127.0.0.1 localhost me\n# 1.2.3.4 no\n192.168.1.9\tNAS.lan nas # yes\n::1 localhost\n"
    text += "fd00::9 nas.lan.\nnonsense x\n\n0.0.0.0 blocked\n"
    assert parse_hosts(text) == {
        "nas.lan": ["192.168.1.9", "fd00::9"],
        "nas": ["192.168.1.9"],
    }


def test_the_resolvers() -> None:
    text = "# x\nnameserver 127.0.0.53\nsearch lan\nnameserver fe80::1%eth0\nnameserver x\n"
    assert parse_resolvers(text) == ["127.0.0.53", "fe80::1%eth0"]
