"""What both ends of the file sync do with a tree of their own: scan it, and change it.

The host program and the agent in the guest import the same code, so only the standard
library, and as in :mod:`wherry_wire` nothing that an emulated processor takes long to import.
What compares the two trees and decides is the host's alone, in ``wherry.sync.core``.

========== ======================================================================
entry      the immutable tree that a scan gives: 42 bytes say all about a file
hashing    the digest, and reading a file that may be written meanwhile
handles    reaching paths without ever following a symbolic link
ignore     which names are not synchronised
records    which digests of an earlier scan may be trusted (git's racy rule)
scan       a directory -> its tree
cache      what a scanner knows, kept over restarts
operation  one change of one path, with what must be there before
blocks     of a big file, only what has changed
stage      contents on their way in, beside the tree; what must not get lost
inplace    rewriting a file that must keep its inode
moves      between stage and tree, losing nothing
apply      operation -> what happened
local      all of it as one endpoint
fanotify   what has changed in trees of the guest, told by its kernel
wire       what goes between the two ends, as bytes
diff       what differs between two trees
========== ======================================================================
"""
