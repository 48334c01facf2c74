"""Relaying local connections into the guest.

    relay.Relay       listener, limit, counters
    ├── pump.Pump     one connection: half-close, backpressure, the end
    └── workers       threads kept for the next job

None of it knows SSH: the guest's side is a :class:`wherry.tunnel.stream.Stream`.
"""
