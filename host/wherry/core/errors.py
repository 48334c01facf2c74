"""Every error that wherry shows to a user.

    WherryError             what failed and why (message), what to do next (hint)
    ├── UsageError          the command line or a value on it is wrong      exit 2
    ├── ConfigError         a configuration file is wrong: file and line    exit 1
    ├── NoSuchMachine       no machine has that name                        exit 3
    ├── NotRunning          the machine exists but does not run             exit 4
    ├── TunnelError         the SSH transport to the guest failed           exit 1
    └── StageError          a stage of `start` failed or ran out of time    exit 1

The tree stays small: code that wants to tell two failures apart does so by what
it was doing, not by a class for each. Errors chain (``raise … from cause``), and
``--debug`` shows the chain.
"""

from __future__ import annotations


class WherryError(Exception):
    """A failure that is explained in one line.

    :param message: what failed and why, without a full stop at the end.
    :param hint: what the user can do next; empty when there is nothing to say.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(WherryError):
    """The command line, or a value on it, is wrong."""

    exit_status = 2


class ConfigError(WherryError):
    """A configuration file cannot be used; the message names file and line."""


class NoSuchMachine(WherryError):
    """No machine has the name that was asked for."""

    exit_status = 3


class NotRunning(WherryError):
    """The machine exists, but what was asked needs it to run."""

    exit_status = 4


class TunnelError(WherryError):
    """The SSH transport to the guest could not be made, or was lost."""


class StageError(WherryError):
    """A stage of starting the machine failed or ran out of time.

    :param stage: the stage's name, as progress shows it.
    """

    def __init__(self, stage: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{stage}: {message}", hint=hint)
        self.stage = stage
