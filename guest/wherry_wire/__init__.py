"""The wire format between the host program and its agent in the guest.

Both ends are of the same release, because the host sends the agent; the format has a
version to make a mistake visible, not to negotiate. :mod:`wherry_wire.frames` cuts the
byte stream into frames, :mod:`wherry_wire.messages` gives control frames their types.

The guest's processor may be emulated, 15 to 30 times slower than the host's, and the agent
imports this on every start: hence no dataclasses (twice as long to import as json), no
typing at run time, and nothing outside the standard library.
"""

PROTOCOL = 1
