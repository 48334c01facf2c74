"""The SSH transport to the guest.

    tunnel.Tunnel             the connection that is there, or comes back
    └── connection.Connection one authenticated transport: exec, run, open_unix
        └── transport         paramiko's Transport with a narrow choice of algorithms
            ├── packetizer    the packet layer, made fast for AES-GCM
            ├── channels      streamlocal and session channels as streams
            └── windows       how much the guest may send ahead
    keys                      the machine's user key and host key
    stream.Stream             what a channel is to code that does not know SSH

paramiko costs 150 ms to import, so this module imports nothing: import what you
need from the modules. ``keys`` and ``stream`` do not import paramiko.
"""
