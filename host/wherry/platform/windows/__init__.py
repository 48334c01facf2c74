"""Windows. Its modules need Windows to be imported, but for :mod:`.pipes`."""
