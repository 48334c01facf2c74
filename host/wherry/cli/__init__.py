"""The command line: one module for each noun, imported when its command is called.

``wherry --help`` has to be quick, so nothing here imports paramiko, rich or the
service: a command imports what it needs when it runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from wherry.cli import interrupts
from wherry.core.errors import WherryError

_COMMANDS = {
    "start": ("machine", "Start a machine, making it if there is none."),
    "stop": ("machine", "Stop a machine; containers get their usual time to end."),
    "restart": ("machine", "Stop a machine and start it again."),
    "delete": ("machine", "Remove a machine and everything in it."),
    "status": ("status", "Show the state of a machine."),
    "list": ("status", "Show all machines."),
    "shell": ("shell", "Open a shell in the guest, or run a command there."),
    "ssh-config": ("shell", "Print an OpenSSH configuration for the guest."),
    "env": ("env", "Print what makes Docker clients use a machine."),
    "logs": ("logs", "Show the log of the service, the console or the engine."),
    "ports": ("ports", "Show the published ports of a machine."),
    "sync": ("sync", "Show and manage the files that containers mount."),
    "image": ("image", "Build, fetch and manage guest images."),
    "config": ("config", "Show and change a machine's settings."),
    "completion": ("completion", "Print the completion script for a shell."),
    "version": ("version", "Print the versions of wherry and QEMU."),
}
"""Each command's module and its line in ``wherry --help``."""


_NO_ARGUMENTS: type[click.ClickException] | tuple[()] = getattr(
    click.exceptions, "NoArgsIsHelpError", ()
)
"""Raised by click from 8.2 on for a group alone; its message is the whole help."""


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is looked up."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"wherry.cli.{_COMMANDS[name][0]}")
        command: click.Command = getattr(module, name.replace("-", "_").replace("list", "list_"))
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.version_option(package_name="wherry", message="%(version)s")
def cli(debug: bool) -> None:
    """The Docker engine on your laptop."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented status."""
    arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        interrupts.catch()
        status = cli.main(arguments, prog_name="wherry", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except WherryError as error:
        _fail(str(error), error.exit_status, debug)
    except _NO_ARGUMENTS as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"; see: {error.ctx.command_path} --help"
        _fail(error.format_message().rstrip(".") + hint, error.exit_code, debug)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130, debug)
    except BrokenPipeError:
        # The reader of our output left, for example `| head`. What is still buffered
        # would be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename} cannot be used: " if error.filename else ""
        hint = "check that there is space, and that you may write there"
        _fail(f"{what}{error.strerror or error}; {hint}", 1, debug)
    except Exception as error:
        _fail(f"an internal error: {error!r}; see more with: wherry --debug …", 1, debug)


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take ``--debug`` from wherever it is; what follows a ``--`` is another program's."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [word for word in arguments[:end] if word != "--debug"]
    return ours + arguments[end:], len(ours) < end


def _fail(message: str, status: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"wherry: {message}", err=True)
    sys.exit(status)
