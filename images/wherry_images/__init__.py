"""Builds the guest image: kernel, initrd, compressed root, and the clients for the host."""
