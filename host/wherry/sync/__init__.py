"""Keeping directories and files of the host equal to their copies in the guest.

``core`` decides and remembers, and knows no threads, sockets or watchers.
:mod:`wherry.sync.endpoint` is what it needs of either end; :mod:`wherry_sync.local` is such an
end, on the host as in the guest.
"""
