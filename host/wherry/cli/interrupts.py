"""What interrupts a command: Ctrl-C, and the system's other ways to ask a program to end."""

from __future__ import annotations

import signal

_ASKED = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def catch() -> None:
    """Have each of them raise KeyboardInterrupt, so that nothing half-made stays.

    What our parent has us ignore is ignored: see nohup(1).
    """
    for number in _ASKED:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def ignore() -> None:
    """Let none of them interrupt what follows, up to the end of the program."""
    for number in (signal.SIGINT, *_ASKED):
        signal.signal(number, signal.SIG_IGN)
