"""Published ports: what containers ask for, made reachable on the host.

``desired`` reads what should be from the engine's list of containers, ``reconcile``
compares it with what is, ``forwarder`` makes the difference happen.
"""
