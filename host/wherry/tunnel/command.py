"""A command in the guest, as a channel (RFC 4254 §6.5)."""

from __future__ import annotations

import signal
import time
from typing import Any

from paramiko.common import cMSG_CHANNEL_REQUEST
from paramiko.message import Message

from wherry.core.errors import TunnelError
from wherry.tunnel.channels import StreamChannel
from wherry.tunnel.stream import Sink


class CommandChannel(StreamChannel):
    """A session channel that runs one command (RFC 4254 §6.5).

    As a stream it is the command's standard input and output.
    """

    def start(self, command: str, deadline: float) -> None:
        """Have the guest's shell run ``command``.

        :raises TunnelError: the guest refused, or did not answer in time.
        """
        with self.lock:
            self._wait_active()
        self._event_pending()
        message = Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(self.remote_chanid)
        message.add_string("exec")
        message.add_boolean(True)
        message.add_string(command)
        self._post(message)
        answered = self.event.wait(max(0.0, deadline - time.monotonic()))
        if not answered or not self.event_ready:
            self.close()
            reason = "refused to run" if answered else "did not answer in time to run"
            raise TunnelError(f"the guest {reason}: {command}")

    def recv_stderr(self, size: int) -> bytes:
        """Wait for bytes on the standard error; ``b""`` at its end."""
        data: bytes = self.in_stderr_buffer.read(size)
        if data:
            self._acknowledge(len(data))
        return data

    def collect(self, stdout: Sink, stderr: Sink) -> None:
        """Hand both outputs to sinks that never stall."""
        self.in_stderr_buffer.attach(stderr)
        self.deliver_to(stdout)

    def wait(self, timeout_s: float) -> int:
        """Wait for the command's end and return its exit status, 128 + N for signal N.

        :raises TunnelError: it did not end in time, or the connection was lost.
        """
        if not self.status_event.wait(timeout_s):
            raise TunnelError(f"the command did not end within {timeout_s:g} s")
        if self.exit_status < 0:
            self._raise_failure()
            raise TunnelError("the guest did not tell the command's exit status")
        status: int = self.exit_status
        return status

    def _handle_request(self, m: Any) -> None:
        # paramiko knows "exit-status" alone and would leave a killed command at -1.
        start = m.packet.tell()
        if m.get_text() == "exit-signal":
            m.get_boolean()
            number = getattr(signal, f"SIG{m.get_text()}", 0)
            self.exit_status = 128 + int(number)
            self.status_event.set()
            return
        m.packet.seek(start)
        super()._handle_request(m)
