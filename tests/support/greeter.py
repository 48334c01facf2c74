"""A service on this computer that greets whoever asks."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator

GREETING = "from the host"


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(GREETING.encode())

    def log_message(self, *_: object) -> None:
        pass


class _Server6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def greeter(address: str) -> Iterator[int]:
    """Listen on an address alone; yield the port."""
    kind = _Server6 if ":" in address else http.server.ThreadingHTTPServer
    with kind((address, 0), _Hello) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
