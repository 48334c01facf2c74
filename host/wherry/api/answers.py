"""Answers that the endpoint gives itself, in the form the engine gives them."""

from __future__ import annotations

import json
from http import HTTPStatus

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Tells a client that waits for it to send its body (RFC 9110 §15.2.1)."""


class Refusal(Exception):
    """A request that is answered here and not by the engine.

    :param status: the answer's status, 400 to 599.
    :param message: what the client shows to its user.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def render(refusal: Refusal, *, close: bool, body: bool = True) -> bytes:
    """Return the answer's bytes: JSON with a ``message`` (Engine API, "Errors").

    :param close: tell the client that the connection ends.
    :param body: False for the answer to a HEAD request (RFC 9110 §9.3.2).
    """
    content = json.dumps({"message": refusal.message}).encode() + b"\n"
    try:
        reason = HTTPStatus(refusal.status).phrase
    except ValueError:
        reason = "Error"
    head = f"HTTP/1.1 {refusal.status} {reason}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n"
    if close:
        head += "Connection: close\r\n"
    return head.encode() + b"\r\n" + (content if body else b"")
