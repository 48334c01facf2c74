"""The control API between the command line and a machine's service.

Over the machine's private socket, one connection carries one request: a line of
JSON ``{"method": …, "params": {…}}``. The answer is any number of lines
``{"event": {…}}`` and then one line ``{"result": …}`` or ``{"error": {"message",
"hint", "exit_status"}}``. A client that closes the connection cancels its request.
"""

from __future__ import annotations

MAX_LINE_BYTES = 1 << 20
"""Longest line either side accepts."""
