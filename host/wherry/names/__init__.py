"""Names in containers: the host's, and the host itself.

zone         what a query asks, and the answers we know ourselves (no sockets)
system       the host's own names, as they are at this moment
forwarder    the server on the host's loopback, which the guest asks
"""
