"""What leads from the guest, and its containers, to the host.

Everything in the guest asks QEMU's resolver, which knows no names of ours. In the kernel
its address is exchanged for the host's server, for the guest's own programs and for
containers alike, whatever they were started with. Without the host's server QEMU's
answers again.

QEMU shows the host's loopback at an address of its own, which can be closed.
"""

from __future__ import annotations

import os

RESOLVER = "10.0.2.3"
HOST = "10.0.2.2"
HOST_6 = "fec0::2"
ALL = "255.255.255.255"
ALL_6 = "ff02::1"
"""Everybody on the network, which is the host alone: libslirp has datagrams to these addresses
lead to its loopback too."""

_CHAIN = "WHERRY"


def lead_names(port: int) -> None:
    """Have the host's port answer queries of names from now on.

    :raises OSError: the rules could not be made.
    """
    _restore("iptables", "nat", _lead(port))
    for chain in ("PREROUTING", "OUTPUT"):
        _jump("iptables", "nat", chain)


def lead_names_back(port: int) -> None:
    """Have QEMU's resolver answer again, if a port of the host answers queries of names now.

    Another one does if another agent has come meanwhile. When it fails there is nobody to tell.
    """
    try:
        if _run(["iptables", "-w", "-t", "nat", "-C", *_lead(port)[0].split()[1:]]) == 0:
            _restore("iptables", "nat", [])
    except OSError:
        pass


def allow_host(open: bool) -> None:
    """Let containers connect to services on the host's loopback, or no longer.

    Answers to the host pass, and so do queries of names.

    :raises OSError: the rules could not be made.
    """
    for program, rules in (("iptables", _close(HOST, ALL)), ("ip6tables", _close(HOST_6, ALL_6))):
        if open and _run([program, "-w", "-S", _CHAIN]) != 0:
            continue  # it never was closed
        _restore(program, "filter", [] if open else rules)
        # The engine puts its rules before all others whenever it starts, but goes through
        # this chain of the user's first; it has none when it makes no rules.
        user_s = _run([program, "-w", "-S", "DOCKER-USER"]) == 0
        for chain in ("DOCKER-USER" if user_s else "FORWARD", "OUTPUT"):
            _jump(program, "filter", chain)


def _lead(port: int) -> list[str]:
    return [
        f"-A {_CHAIN} -d {RESOLVER} -p {protocol} --dport 53 -j DNAT --to-destination {HOST}:{port}"
        for protocol in ("udp", "tcp")
    ]


def _close(host: str, everybody: str) -> list[str]:
    # By the address that was asked for: a query of names has another one.
    conntrack = f"-m conntrack --ctstate NEW --ctorigdst {host}"
    return [
        f"-A {_CHAIN} -d {host} {conntrack} -j REJECT",
        f"-A {_CHAIN} -d {everybody} -p udp -j DROP",
    ]


def _restore(program: str, table: str, rules: list[str]) -> None:
    """Replace the rules of our chain in one step; make it if there is none."""
    text = "\n".join([f"*{table}", f":{_CHAIN} - [0:0]", *rules, "COMMIT", ""])
    _check([f"{program}-restore", "-w", "--noflush"], text.encode())


def _jump(program: str, table: str, chain: str) -> None:
    """Have a chain of the kernel's go through ours first, once.

    An engine that starts puts its own rules first.
    """
    _run([program, "-w", "-t", table, "-D", chain, "-j", _CHAIN])
    _check([program, "-w", "-t", table, "-I", chain, "-j", _CHAIN])


def _check(argv: list[str], input: bytes = b"") -> None:
    status = _run(argv, input)
    if status != 0:
        raise OSError(f"{argv[0]} failed with status {status}")


def _run(argv: list[str], input: bytes = b"") -> int:
    """Run a program without its words; ours are the host's protocol."""
    # As small as this, the text fits into the pipe before anybody reads it.
    reader, writer = os.pipe()
    try:
        os.write(writer, input)
        os.close(writer)
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            process = os.posix_spawnp(
                argv[0],
                argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, reader, 0),
                    (os.POSIX_SPAWN_DUP2, nothing, 1),
                    (os.POSIX_SPAWN_DUP2, nothing, 2),
                ],
            )
        finally:
            os.close(nothing)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    finally:
        os.close(reader)
