"""Published ports: what containers ask for, made reachable on the host.

desired      which forwards containers ask for (pure)
reconcile    which way each takes, and what to add and remove (pure)
choices      what the engine may choose itself is narrowed to what is free here
keeper       makes what is equal to what should be; reservations, problems, repair
├── qemu         QEMU's own ``hostfwd``, which carries the bytes in C
├── streams      TCP on IPv6, relayed by us
├── datagrams    UDP on IPv6, relayed by us
└── conflicts    why a port cannot be bound
"""
