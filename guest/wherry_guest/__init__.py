"""The agent: what the host program runs in the guest.

It is sent over the tunnel with every connection and speaks :mod:`wherry_wire` on its standard
input and output. Only the standard library, and little of that: see :mod:`wherry_wire`.
"""
