"""What we rely on inside paramiko: a release that moves it must fail here, and not in use."""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from pathlib import Path

import paramiko.auth_handler
import paramiko.channel
import paramiko.packet
import paramiko.transport
import pytest

import wherry.tunnel
from wherry.tunnel.channels import StreamChannel
from wherry.tunnel.packetizer import FastPacketizer
from wherry.tunnel.transport import TunnelTransport


def test_the_version_is_one_that_was_read() -> None:
    major, minor = map(int, metadata.version("paramiko").split(".")[:2])
    assert (5, 1) <= (major, minor) < (6, 0)


# Methods of ours that paramiko does not know; every other method of ours is an override.
OURS = {
    FastPacketizer: {
        "_acknowledge_now", "_fill", "_open", "_next_packet", "_sealed", "_send_laid",
        "_send_sealed", "_take_data", "_want_rekey_in", "send_data", "send_now", "send_packets",
    },
    StreamChannel: {
        "_abandon", "_acknowledge", "_raise_failure", "_send_all", "_take_window", "_tell_end",
        "_wait_active",
        "_flush", "_post", "close_now", "confirmed", "deliver_to", "drain", "feed", "more_window",
        "recv_into", "refused", "untouched",
        "_await_window", "_park", "_take_room", "_transmit", "send_from", "wait_open",
    },
    TunnelTransport: {
        "_ask", "_begin", "_begin_unix", "_channel_data", "_channel_window", "_drop_spares",
        "_fail_opening", "_keep_watch", "_ready_for_data", "_send_data", "_take_spare", "_turn",
        "authenticated_as_client", "begin_session", "begin_tcp", "begin_unix", "listen_unix",
        "prepare_unix",
        "send_data",
        "send_now", "send_packets",
    },
}  # fmt: skip


@pytest.mark.parametrize("ours", OURS, ids=lambda ours: ours.__name__)
def test_overrides_override(ours: type) -> None:
    base = ours.__mro__[1]
    for name, method in vars(ours).items():
        if not inspect.isfunction(method) or name == "__init__":
            continue
        if name in OURS[ours]:
            assert not hasattr(base, name), f"paramiko has {name} now: ours hides it"
            continue
        theirs = getattr(base, name)
        # Ours must take what paramiko passes: the same number of required arguments.
        required = _required(theirs)
        assert _required(method) <= required or _takes_rest(method), name


def _required(function: object) -> int:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )


def _takes_rest(function: object) -> bool:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)


def test_paramiko_calls_what_we_override() -> None:
    run = inspect.getsource(paramiko.transport.Transport.run)
    for use in (
        "self.packetizer.read_message()",
        "except NeedRekeyException",
        "self._channel_handler_table[ptype](chan, m)",
        "chanid in self.channels_seen",
        "self._expected_packet",
        "self.packetizer.complete_handshake()",
    ):
        assert use in run, use
    activate = inspect.getsource(paramiko.transport.Transport._activate_inbound)
    assert "aead=aead" in activate
    assert "iv_in=iv_in if aead else None" in activate
    activate = inspect.getsource(paramiko.transport.Transport._activate_outbound)
    assert "iv_out=iv_out if aead else None" in activate
    send = inspect.getsource(paramiko.transport.Transport._send_user_message)
    assert "self._send_message(data)" in send
    init = inspect.getsource(paramiko.transport.Transport.__init__)
    assert "settimeout(self._active_check_timeout)" in init
    assert "(packetizer_class or Packetizer)(sock)" in init
    assert "self._parse_channel_open_failure" in init
    unlink = inspect.getsource(paramiko.channel.Channel._set_closed)
    assert "self.in_buffer.close()" in unlink
    assert hasattr(paramiko.auth_handler.AuthHandler, "abort")


def test_no_private_name_of_paramiko_is_mangled() -> None:
    for file in Path(wherry.tunnel.__file__).parent.glob("*.py"):
        assert not re.search(r"_(Packetizer|Channel|Transport)__", file.read_text()), file


def test_the_choice_of_algorithms_exists() -> None:
    known = paramiko.transport.Transport
    assert set(TunnelTransport._preferred_ciphers) <= set(known._cipher_info)
    assert set(TunnelTransport._preferred_macs) <= set(known._mac_info)
    assert set(TunnelTransport._preferred_kex) <= set(known._kex_info)
    assert TunnelTransport._preferred_kex[0] == "curve25519-sha256@libssh.org"
    assert TunnelTransport._preferred_ciphers[0] == "aes128-gcm@openssh.com"
    assert set(TunnelTransport._channel_handler_table) == set(known._channel_handler_table)
