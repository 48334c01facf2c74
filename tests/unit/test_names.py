"""What is asked of the host's names, and the answers that it has itself; no sockets."""

from __future__ import annotations

import os
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from wherry.names.zone import alias, answer, completed, failure, is_query, parse_hosts, question
from wherry.platform.macos import MacOS
from wherry.platform.resolvers import Resolvers, Servers, resolv_conf, scutil

HOSTS = {"host.docker.internal": ["10.0.2.2"], "nas.lan": ["192.168.1.9", "fd00::9"]}


def query(name: str, kind: str = "A") -> bytes:
    return dns.message.make_query(name, kind).to_wire()


def said(name: str, kind: str = "A") -> list[str] | None:
    wire = answer(query(name, kind), HOSTS, stream=False)
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
        (
            "9.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa",
            "PTR",
            ["nas.lan."],
        ),
        ("x.in-addr.arpa", "PTR", None),
        ("nonsense", "PTR", None),
    ],
)
def test_the_names_we_know(name: str, kind: str, answers: list[str] | None) -> None:
    assert said(name, kind) == answers


def test_an_answer_is_the_query_s() -> None:
    asked = query("nas.lan")
    reply = dns.message.from_wire(answer(asked, HOSTS, stream=False) or b"")
    assert dns.message.from_wire(asked).is_response(reply)


def test_what_follows_a_query_is_no_part_of_it() -> None:
    assert answer(query("nas.lan") + b"junk", HOSTS, stream=False) is not None


def test_an_address_that_is_none_is_left_to_others() -> None:
    assert answer(query("nas.lan", "AAAA"), {"nas.lan": ["fe80::1%eth0"]}, stream=False) is None


@pytest.mark.parametrize("wire", [b"", b"\0" * 5, b"\xff" * 40, b"\0" * 12])
def test_what_is_no_query_is_not_answered(wire: bytes) -> None:
    assert question(wire) is None
    assert not is_query(wire)
    assert answer(wire, HOSTS, stream=False) is None


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
    text = (
        "127.0.0.1 localhost me\n# 1.2.3.4 no\n192.168.1.9\tNAS.lan nas # yes\n::1 localhost me\n"
    )
    text += "fd00::9 nas.lan.\nnonsense x\n\n0.0.0.0 blocked\nfe80::1%lo0 me\nfe80::2 nas\n"
    assert parse_hosts(text, "10.0.2.2") == {
        "me": ["10.0.2.2"],
        "nas.lan": ["192.168.1.9", "fd00::9"],
        "nas": ["192.168.1.9"],
    }


def test_resolv_conf() -> None:
    text = "# x\nnameserver 127.0.0.53\nsearch old\nsearch Lan. corp.example lan\n"
    text += "nameserver fe80::1%eth0\nnameserver x\nnameserver\noptions edns0 ndots:2\n"
    found = resolv_conf(text)
    assert found.servers == (Servers((("127.0.0.53", 53), ("fe80::1%eth0", 53))),)
    assert found.search == ("lan", "corp.example")
    assert found.completions("nas") == ["nas.lan", "nas.corp.example"]
    assert found.completions("nas.sub") == ["nas.sub.lan", "nas.sub.corp.example"]
    assert found.completions("a.b.c") == found.completions("") == []
    assert resolv_conf("domain home\noptions ndots:x\n") == Resolvers((), ("home",))


SCUTIL = """\
DNS configuration

resolver #1
  search domain[0] : corp.example
  search domain[1] : home
  nameserver[0] : fe80::1%en0
  nameserver[1] : 192.168.1.1
  if_index : 12 (en0)
  flags    : Request A records, Request AAAA records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)

resolver #2
  domain   : corp.example
  nameserver[0] : 10.8.0.1
  nameserver[1] : 10.8.0.2
  if_index : 20 (utun4)
  flags    : Supplemental, Request A records
  reach    : 0x00000003 (Reachable,Transient Connection)
  order    : 102800

resolver #3
  domain   : local
  options  : mdns
  timeout  : 5
  flags    : Request A records, Request AAAA records
  reach    : 0x00000000 (Not Reachable)
  order    : 300000

resolver #4
  domain   : lab.corp.example
  nameserver[0] : 127.0.0.1
  port     : 5300
  flags    : Request A records, Request AAAA records
  reach    : 0x00030002 (Reachable,Local Address,Directly Reachable Address)

DNS configuration (for scoped queries)

resolver #1
  search domain[0] : home
  nameserver[0] : 192.168.9.9
  if_index : 12 (en0)
  flags    : Scoped, Request A records, Request AAAA records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)

resolver #2
  domain   : example.com
  nameserver[0] : 192.168.9.9
  if_index : 20 (utun4)
  flags    : Scoped, Request A records
  reach    : 0x00000003 (Reachable,Transient Connection)
"""
"""The format of macOS 13, with a VPN that has a domain and a file in /etc/resolver."""


def test_the_servers_of_macos() -> None:
    found = scutil(SCUTIL)
    assert found.search == ("corp.example", "home")
    vpn = (("10.8.0.1", 53), ("10.8.0.2", 53))
    main = (("fe80::1%en0", 53), ("192.168.1.1", 53))
    assert found.servers_for("git.corp.example") == vpn
    assert found.servers_for("corp.example") == vpn
    assert found.servers_for("notcorp.example") == main
    assert found.servers_for("x.lab.corp.example") == (("127.0.0.1", 5300),)
    assert found.servers_for("example.com") == found.servers_for("printer.local") == main
    assert found.servers_for("") == main


def test_macos_without_a_network() -> None:
    assert scutil("No DNS configuration available\n") == Resolvers()
    assert scutil("DNS configuration\n\nresolver #1\n  domain : home\n") == Resolvers((), ("home",))


def test_macos_is_asked_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scutil"
    program.write_text(f"#!/bin/sh\necho $* >>{tmp_path}/calls\ncat {tmp_path}/said\n")
    program.chmod(0o755)
    (tmp_path / "said").write_text(SCUTIL)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    system = MacOS()
    assert system.resolvers() == system.resolvers() == scutil(SCUTIL)
    assert (tmp_path / "calls").read_text() == "--dns\n"
    (tmp_path / "said").write_text("")
    monkeypatch.setattr(system, "_resolvers_expire", 0.0)
    assert system.resolvers() == Resolvers()


@pytest.mark.parametrize(("stream", "cut"), [(False, True), (True, False)])
def test_a_completed_name_s_answer(stream: bool, cut: bool) -> None:
    """It answers the short name by an alias, in as much room as there is."""
    asked = query("nas")
    whole = completed(asked, "nas.lan")
    assert whole is not None
    reply = dns.message.make_response(dns.message.from_wire(whole))
    addresses = [f"192.0.2.{number}" for number in range(100)]
    reply.answer = [dns.rrset.from_text_list("nas.lan.", 60, "IN", "A", addresses)]
    said = dns.message.from_wire(alias(asked, reply.to_wire(), stream=stream) or b"")
    assert dns.message.from_wire(asked).is_response(said)
    assert bool(said.flags & dns.flags.TC) == cut
    if not cut:
        assert said.answer[0].to_text() == "nas. 5 IN CNAME nas.lan."
        assert {each.to_text() for each in said.answer[1]} == set(addresses)
    assert alias(asked, b"nonsense", stream=stream) is None
    assert completed(asked, "x" * 64 + ".lan") is None
