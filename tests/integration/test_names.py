"""The server for the guest's queries of names, between sockets on the loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest
from resolver import Resolver

from wherry.names import forwarder
from wherry.names.forwarder import QUERIES, NameServer
from wherry.names.system import SystemNames
from wherry.platform.posix import Posix
from wherry.platform.resolvers import Resolvers, Servers


@contextmanager
def other_resolver() -> Iterator[Resolver]:
    made = Resolver()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def resolver() -> Iterator[Resolver]:
    with other_resolver() as made:
        yield made


@pytest.fixture
def upstreams(resolver: Resolver) -> list[tuple[str, int]]:
    return [resolver.address]


@pytest.fixture
def hosts() -> dict[str, list[str]]:
    return {"host.docker.internal": ["10.0.2.2"]}


@pytest.fixture
def server(upstreams: list[tuple[str, int]], hosts: dict[str, list[str]]) -> Iterator[NameServer]:
    made = NameServer(
        lambda: hosts, lambda: Resolvers((Servers(tuple(upstreams)),), ("one", "two.example"))
    )
    made.start()
    yield made
    made.close()
    left = [each.name for each in threading.enumerate() if each.name.startswith("names")]
    assert not left


def ask(
    server: NameServer, name: str, kind: str = "A", *, tcp: bool = False
) -> dns.message.Message:
    query = dns.message.make_query(name, kind)
    how = dns.query.tcp if tcp else dns.query.udp
    return how(query, "127.0.0.1", timeout=15, port=server.port)


def texts(message: dns.message.Message) -> set[str]:
    return {item.to_text() for rrset in message.answer for item in rrset}


@pytest.mark.parametrize("tcp", [False, True])
def test_the_host_has_a_name(server: NameServer, resolver: Resolver, tcp: bool) -> None:
    assert texts(ask(server, "host.docker.internal", tcp=tcp)) == {"10.0.2.2"}
    assert resolver.asked == []


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("A", "192.0.2.1"),
        ("AAAA", "2001:db8::1"),
        ("PTR", "www.example."),
        ("SRV", "0 5 443 www.example."),
        ("TXT", '"some text"'),
    ],
)
def test_all_else_is_asked_at_the_host_s_resolver(
    server: NameServer, resolver: Resolver, kind: str, value: str, tcp: bool
) -> None:
    resolver.records["x.example.", kind] = [value]
    assert texts(ask(server, "x.example.", kind, tcp=tcp)) == {value}


def test_an_unknown_name_stays_unknown(server: NameServer) -> None:
    assert ask(server, "nobody.example.").rcode() == dns.rcode.NXDOMAIN


def test_long_answers_are_cut_by_udp_and_whole_by_tcp(
    server: NameServer, resolver: Resolver
) -> None:
    many = [f"192.0.2.{number}" for number in range(1, 101)]
    resolver.records["many.example.", "A"] = many
    assert ask(server, "many.example.").flags & dns.flags.TC
    assert texts(ask(server, "many.example.", tcp=True)) == set(many)


@pytest.mark.parametrize("ours", [False, True])
def test_a_client_gets_as_much_by_udp_as_it_says_that_it_takes(
    server: NameServer, resolver: Resolver, hosts: dict[str, list[str]], ours: bool
) -> None:
    """RFC 6891, 6.2.3: from the host's resolver as from its hosts file."""
    many = [f"192.0.2.{number}" for number in range(1, 101)]
    if ours:
        hosts["many.example"] = many
    else:
        resolver.records["many.example.", "A"] = many
    for payload, whole in ((4096, True), (1232, False), (0, False)):
        query = dns.message.make_query("many.example.", "A", payload=payload, use_edns=payload > 0)
        reply = dns.query.udp(query, "127.0.0.1", timeout=15, port=server.port)
        assert bool(reply.flags & dns.flags.TC) is not whole
        if whole:
            assert texts(reply) == set(many)
        assert len(reply.to_wire(max_size=65535)) <= max(payload, 512)
    assert texts(ask(server, "many.example.", tcp=True)) == set(many)
    assert resolver.asked == ([] if ours else ["many.example."] * 4)


@contextmanager
def silence() -> Iterator[socket.socket]:
    """What takes queries and never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        made.settimeout(5)
        yield made


def test_a_dead_resolver_is_passed_over(
    server: NameServer, resolver: Resolver, upstreams: list[tuple[str, int]]
) -> None:
    resolver.records["x.example.", "A"] = ["192.0.2.1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        upstreams.insert(0, silent.getsockname())
        start = time.monotonic()
        assert texts(ask(server, "x.example.")) == {"192.0.2.1"}
        assert time.monotonic() - start < 4
        # It is not waited for again at each query.
        start = time.monotonic()
        for _ in range(5):
            assert texts(ask(server, "x.example.")) == {"192.0.2.1"}
        assert time.monotonic() - start < 4


def test_a_resolver_that_refuses_is_not_the_last_one_asked(
    server: NameServer, resolver: Resolver, upstreams: list[tuple[str, int]]
) -> None:
    with other_resolver() as other, silence() as silent:
        other.refuses = True
        resolver.records["x.example.", "A"] = ["192.0.2.1"]
        upstreams.insert(0, other.address)
        assert texts(ask(server, "x.example.")) == {"192.0.2.1"}
        upstreams.remove(resolver.address)
        assert ask(server, "x.example.").rcode() == dns.rcode.REFUSED
        # With that in hand, who does not answer is not waited for again.
        upstreams.append(silent.getsockname())
        start = time.monotonic()
        assert ask(server, "x.example.").rcode() == dns.rcode.REFUSED
        assert time.monotonic() - start < 4


@pytest.mark.parametrize("tcp", [False, True])
def test_a_short_name_is_completed_as_on_the_host(
    server: NameServer, resolver: Resolver, tcp: bool
) -> None:
    resolver.records["nas.two.example.", "A"] = ["192.0.2.9"]
    resolver.records["nas.two.example.", "AAAA"] = []
    assert texts(ask(server, "nas.", tcp=tcp)) == {"nas.two.example.", "192.0.2.9"}
    assert resolver.asked == ["nas.one.", "nas.two.example."]
    # It exists without such an address; else musl takes the whole name for unknown.
    reply = ask(server, "nas.", "AAAA", tcp=tcp)
    assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])


def test_a_dead_resolver_makes_a_short_name_no_other_one(
    upstreams: list[tuple[str, int]],
    hosts: dict[str, list[str]],
    resolver: Resolver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many domains it may be in: each is asked at those that answer, in its turn."""
    domains = ("corp.example", "two.example", "three.example", "four.example")
    for domain, address in zip(domains, ("10.1.1.1", "10.2.2.2", "10.3.3.3"), strict=False):
        resolver.records[f"db.{domain}.", "A"] = [address]
    server = NameServer(lambda: hosts, lambda: Resolvers((Servers(tuple(upstreams)),), domains))
    server.start()
    try:
        with silence() as silent:
            upstreams.insert(0, silent.getsockname())
            assert texts(ask(server, "db.")) == {"db.corp.example.", "10.1.1.1"}
            upstreams.remove(resolver.address)
            monkeypatch.setattr(forwarder, "_TOTAL_S", 3.0)
            assert ask(server, "db.").rcode() == dns.rcode.SERVFAIL
            assert resolver.asked == ["db.corp.example."]
        # Nor does one that fails: it may have such a name.
        resolver.refuses = True
        upstreams[:] = [resolver.address]
        with other_resolver() as other:
            upstreams.append(other.address)
            other.records["db.", "A"] = ["10.9.9.9"]
            assert texts(ask(server, "db.")) == {"10.9.9.9"}
    finally:
        server.close()


def test_where_a_domain_s_resolver_fails_a_short_name_is_not_unknown(
    hosts: dict[str, list[str]], resolver: Resolver
) -> None:
    with other_resolver() as corp:
        corp.refuses = True
        servers = (Servers((resolver.address,)), Servers((corp.address,), "corp.example"))
        server = NameServer(lambda: hosts, lambda: Resolvers(servers, ("corp.example",)))
        server.start()
        try:
            assert ask(server, "db.").rcode() == dns.rcode.SERVFAIL
            resolver.records["db.", "A"] = ["192.0.2.1"]
            assert texts(ask(server, "db.")) == {"192.0.2.1"}
        finally:
            server.close()


def test_what_only_one_resolver_knows_is_asked_there_though_it_was_slow_once(
    server: NameServer, resolver: Resolver, upstreams: list[tuple[str, int]]
) -> None:
    """As the one of a VPN, of whose names the next one says that there are none."""
    resolver.records["git.corp.example.", "A"] = ["10.8.1.1"]
    resolver.ignored = "slow.example."
    with other_resolver() as public:
        upstreams.append(public.address)
        assert ask(server, "slow.example.").rcode() == dns.rcode.NXDOMAIN
        assert texts(ask(server, "git.corp.example.")) == {"10.8.1.1"}
        assert public.asked == ["slow.example."]


def test_a_dead_resolver_does_not_take_the_others_places(
    hosts: dict[str, list[str]], resolver: Resolver
) -> None:
    """As one of a domain of its own, of which many names are asked all the time."""
    resolver.records["x.example.", "A"] = ["192.0.2.1"]
    with silence() as silent, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        servers = (Servers((resolver.address,)), Servers((silent.getsockname(),), "dead.example"))
        server = NameServer(lambda: hosts, lambda: Resolvers(servers))
        server.start()
        try:
            end = time.monotonic() + 4
            number = 0
            while time.monotonic() < end:
                for _ in range(10):
                    number += 1
                    query = dns.message.make_query(f"{number}.dead.example.", "A").to_wire()
                    client.sendto(query, ("127.0.0.1", server.port))
                time.sleep(0.2)
                query_x = dns.message.make_query("x.example.", "A")
                found = dns.query.udp(query_x, "127.0.0.1", timeout=2, port=server.port)
                assert texts(found) == {"192.0.2.1"}
            # Nor does anybody wait for it at the end.
            begun = time.monotonic()
        finally:
            server.close()
        assert time.monotonic() - begun < 3


def test_connections_that_ask_nothing_are_not_in_the_way(
    server: NameServer, resolver: Resolver
) -> None:
    resolver.records["x.example.", "A"] = ["192.0.2.1"]
    with ExitStack() as opened:
        for _ in range(QUERIES + 10):
            idle = socket.create_connection(("127.0.0.1", server.port))
            opened.enter_context(idle)
        assert texts(ask(server, "x.example.")) == {"192.0.2.1"}
        begun = time.monotonic()
        server.close()
        assert time.monotonic() - begun < 2


def test_other_names_are_not_completed(server: NameServer, resolver: Resolver) -> None:
    resolver.records["nas.lan.one.", "A"] = resolver.records["nas.one.", "TXT"] = ["192.0.2.9"]
    assert ask(server, "nas.lan.").rcode() == dns.rcode.NXDOMAIN
    assert ask(server, "nas.", "TXT").rcode() == dns.rcode.NXDOMAIN
    assert resolver.asked == ["nas.lan.", "nas."]
    assert ask(server, "localhost.").rcode() == dns.rcode.NXDOMAIN
    # Nothing completes it: it is asked as it is.
    resolver.records["top.", "A"] = ["192.0.2.8"]
    assert texts(ask(server, "top.")) == {"192.0.2.8"}


def test_while_one_query_waits_others_are_answered(
    server: NameServer, resolver: Resolver, upstreams: list[tuple[str, int]]
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        upstreams[:] = [silent.getsockname()]
        slow = threading.Thread(target=lambda: ask(server, "slow.example."))
        slow.start()
        silent.settimeout(5)
        silent.recv(100)  # it is on its way
        start = time.monotonic()
        assert texts(ask(server, "host.docker.internal")) == {"10.0.2.2"}
        assert time.monotonic() - start < 3
    # Now it refuses, so nobody waits for the end.
    slow.join(15)
    assert not slow.is_alive()


def test_a_resolver_that_takes_long_or_loses_a_query_is_asked_again(
    server: NameServer, upstreams: list[tuple[str, int]]
) -> None:
    """It is the only one, as systemd-resolved is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lossy:
        lossy.bind(("127.0.0.1", 0))
        lossy.settimeout(5)
        upstreams[:] = [lossy.getsockname()]
        replies: list[dns.message.Message] = []
        client = threading.Thread(target=lambda: replies.append(ask(server, "x.example.")))
        client.start()
        lossy.recv(512)  # lost
        wire, back = lossy.recvfrom(512)
        reply = dns.message.make_response(dns.message.from_wire(wire))
        reply.answer.append(dns.rrset.from_text("x.example.", 60, "IN", "A", "192.0.2.1"))
        lossy.sendto(reply.to_wire(), back)
        client.join(10)
    assert texts(replies[0]) == {"192.0.2.1"}


def test_queries_that_wait_are_not_in_the_way_of_what_we_know(
    server: NameServer, upstreams: list[tuple[str, int]]
) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        silent.bind(("127.0.0.1", 0))
        silent.settimeout(5)
        upstreams[:] = [silent.getsockname()]
        for number in range(QUERIES + 20):
            query = dns.message.make_query(f"{number}.example.", "A").to_wire()
            client.sendto(query, ("127.0.0.1", server.port))
        for _ in range(QUERIES):
            silent.recv(512)
        assert texts(ask(server, "host.docker.internal")) == {"10.0.2.2"}
        upstreams.clear()


def test_without_a_resolver_queries_fail_at_once(
    server: NameServer, upstreams: list[tuple[str, int]]
) -> None:
    upstreams.clear()
    start = time.monotonic()
    assert ask(server, "x.example.").rcode() == dns.rcode.SERVFAIL
    assert time.monotonic() - start < 3


def test_nonsense_is_asked_nowhere_and_ends_nothing(
    server: NameServer, upstreams: list[tuple[str, int]]
) -> None:
    response = dns.message.make_response(dns.message.make_query("x.example.", "A")).to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.bind(("127.0.0.1", 0))
        upstreams[:] = [upstream.getsockname()]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for wire in (b"", b"x", b"\xff" * 600, response):
                client.sendto(wire, ("127.0.0.1", server.port))
        upstream.settimeout(0.5)
        with pytest.raises(TimeoutError):
            upstream.recv(100)
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"\0")
        assert texts(ask(server, "host.docker.internal", tcp=True)) == {"10.0.2.2"}


def test_the_system_s_files_are_read_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, file = tmp_path / "hosts", tmp_path / "resolv.conf"
    monkeypatch.setattr(Posix, "resolvers_file", file)
    system, platform = SystemNames(hosts), Posix()
    assert platform.resolvers() == Resolvers()
    assert system.hosts()["host.docker.internal"] == ["10.0.2.2"]
    hosts.write_text("192.168.1.9 nas\n")
    file.write_text("nameserver 192.168.1.1\n")
    assert platform.resolvers().servers_for("x") == (("192.168.1.1", 53),)
    assert system.hosts()["nas"] == ["192.168.1.9"]
    assert system.hosts() is system.hosts(), "it is not read for each query"
    file.write_text("nameserver 10.8.0.1\nnameserver 192.168.1.1\n")
    assert platform.resolvers().servers_for("x") == (("10.8.0.1", 53), ("192.168.1.1", 53))
