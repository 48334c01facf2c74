"""shell and ssh-config: the guest through the user's own OpenSSH client."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from wherry.cli.common import layout, name_argument
from wherry.cli.status import status_of
from wherry.config.layout import DEFAULT_NAME, Layout
from wherry.core.errors import NotRunning, WherryError
from wherry.core.processes import spawn


def ssh_block(where: Layout, name: str) -> str:
    """Return an OpenSSH configuration block for a running machine (ssh_config(5)).

    :raises NotRunning: the machine does not run.
    """
    from wherry.core.files import write_atomic
    from wherry.service import machine
    from wherry.tunnel.keys import load_keys

    paths = machine.require(where, name)
    address = status_of(where, paths).get("ssh")
    if not address:
        raise NotRunning(f"machine {name} is not running", hint=f"start it: wherry start {name}")
    keys = load_keys(paths.keys)
    # Known by an alias, since the port is another one at each start.
    known_hosts = paths.keys / "known_hosts"
    write_atomic(known_hosts, f"wherry-{name} {keys.host.public}\n".encode())
    return "\n".join(
        (
            f"Host wherry-{name}",
            f"  HostName {address['host']}",
            f"  Port {address['port']}",
            "  User root",
            f'  IdentityFile "{_escape(keys.user_path)}"',
            "  IdentitiesOnly yes",
            f'  UserKnownHostsFile "{_escape(known_hosts)}"',
            "  GlobalKnownHostsFile /dev/null",
            f"  HostKeyAlias wherry-{name}",
            "  HostKeyAlgorithms ssh-ed25519",
            "  StrictHostKeyChecking yes",
            "  BatchMode yes",
            "  Ciphers ^aes128-gcm@openssh.com",
            "  LogLevel ERROR",
            "",
        )
    )


def _escape(path: Path) -> str:
    """Keep ssh from replacing tokens in a path (ssh_config(5), TOKENS)."""
    return os.fspath(path).replace("%", "%%")


@click.command("ssh-config")
@name_argument
def ssh_config(name: str) -> None:
    """Print an OpenSSH block for machine NAME: ssh -F <(wherry ssh-config) wherry-NAME."""
    click.echo(ssh_block(layout(), name), nl=False)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[NAME] [-- COMMAND…]")
def shell(arguments: tuple[str, ...]) -> None:
    """Open a shell in the guest of machine NAME, or run COMMAND there."""
    name, command = _split(arguments, sys.argv)
    sys.exit(run_in_guest(layout(), name, command, terminal=None))


def _split(arguments: Sequence[str], argv: Sequence[str]) -> tuple[str, list[str]]:
    """Tell NAME from COMMAND: click drops the ``--`` that stands between them."""
    command_length = 0
    if "--" in argv:
        command_length = len(argv) - list(argv).index("--") - 1
    names = list(arguments[: len(arguments) - command_length])
    if len(names) > 1:
        raise click.UsageError("put -- before the command: wherry shell [NAME] -- COMMAND…")
    return (names or [DEFAULT_NAME])[0], list(arguments[len(names) :])


def run_in_guest(where: Layout, name: str, command: Sequence[str], *, terminal: bool | None) -> int:
    """Run a command in the guest on our own terminal and return its exit status.

    :param terminal: whether the guest makes a terminal; None when ours is one.
    """
    ssh = shutil.which("ssh")
    if ssh is None:
        raise WherryError("ssh is not on PATH", hint="install the OpenSSH client")
    if terminal is None:
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with tempfile.TemporaryDirectory(prefix="wherry-") as directory:
        config = Path(directory) / "ssh_config"
        config.write_text(ssh_block(where, name), encoding="utf-8")
        argv = [ssh, "-F", os.fspath(config), "-t" if terminal else "-T", f"wherry-{name}"]
        if command:
            import shlex

            argv += ["--", shlex.join(command)]
        child = spawn(argv, stdin=None, stdout=None, stderr=None)
        try:
            return child.wait()
        except KeyboardInterrupt:
            # The terminal sent the interrupt to ssh as well, which decides what it means.
            return child.wait()
