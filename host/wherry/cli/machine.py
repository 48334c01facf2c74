"""start, stop, restart, delete."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from wherry.cli import interrupts
from wherry.cli.common import layout, name_argument
from wherry.config.layout import Layout, MachinePaths
from wherry.core.errors import UsageError, WherryError


def _settings(cpus: str | None, memory: str | None, disk: str | None, accel: str | None,
              image: str | None) -> dict[str, Any]:  # fmt: skip
    given = {
        "cpus": cpus,
        "memory": memory,
        "disk": disk,
        "accelerator": accel,
        "image": image,
    }
    return {key: value for key, value in given.items() if value is not None}


@click.command()
@name_argument
@click.option("--cpus", metavar="N", help="Virtual processors.")
@click.option("--memory", metavar="SIZE", help="Memory of the guest, such as 4GiB.")
@click.option("--disk", metavar="SIZE", help="Size the data disk may grow to; it cannot shrink.")
@click.option("--accel", metavar="NAME", help="kvm, hvf, whpx or tcg instead of a trial of each.")
@click.option("--image", metavar="VERSION", help="Guest image; the newest if left out.")
@click.option("--use", is_flag=True, help="Make this machine the docker CLI's current context.")
def start(
    name: str,
    cpus: str | None,
    memory: str | None,
    disk: str | None,
    accel: str | None,
    image: str | None,
    use: bool,
) -> None:
    """Start machine NAME, making it if there is none; returns when the engine answers.

    Settings given here are kept for later starts.
    """
    status = start_machine(layout(), name, _settings(cpus, memory, disk, accel, image), use=use)
    _warn(status)
    click.echo(
        f"Machine {name} is running Docker {status['engine_version']}. "
        f"Try: docker --context {status['docker_context']} ps"
    )


def _warn(status: Mapping[str, Any]) -> None:
    """Tell what the user should know of a machine that has just started."""
    if status.get("warning"):
        click.echo(f"wherry: warning: {status['warning']}", err=True)
    for problem in status.get("certificate_problems", ()):
        click.echo(f"wherry: warning: {problem}", err=True)
    default = status.get("default_socket")
    if default and default["problem"]:
        click.echo(f"wherry: warning: {default['problem']}; {default['hint']}", err=True)


def start_machine(
    where: Layout, name: str, settings: dict[str, Any], *, use: bool = False
) -> dict[str, Any]:
    """Start a machine and return its status.

    An interrupt ends what this call began: a machine it made is removed again.
    """
    from wherry.cli.progress import stages
    from wherry.config.load import load
    from wherry.control.client import call
    from wherry.service import docker_context, docker_proxies, launch, machine, proxies, state

    paths = where.machine(name)
    made = launched = False
    try:
        with machine.locked(where, name):
            # Noted before the deed: an interrupt may come at any point between.
            made = not machine.exists(paths)
            # A virtual machine that has lost its service is none that this call began.
            launched = made or not (launch.answers(where, paths) or state.find_orphan(paths))
            if made:
                _require_image(where, settings)
                machine.create(where, name, settings)
            elif settings and not launched:
                raise UsageError(
                    f"machine {name} is running, and these settings need it stopped",
                    hint=f"wherry stop {name}, then start it with them",
                )
            elif settings:
                machine.reconfigure(where, paths, settings)
            launch.ensure(where, paths)
        with stages() as show:
            try:
                status: dict[str, Any] = call(
                    where.platform,
                    paths.control_socket,
                    "wait_running",
                    {"ssh_auth_sock": os.environ.get("SSH_AUTH_SOCK", "")},
                    on_event=show,
                )
            except WherryError:
                # It says why before it has cleaned up, and until then is neither running nor not.
                with contextlib.suppress(WherryError):
                    launch.wait_gone(where, paths)
                raise
        # It runs. An interrupt from here to the end of the program would leave a context
        # without its machine, or be reported as one while the machine runs.
        interrupts.ignore()
        docker_context.create(paths.docker_context, status["docker_host"], name)
        try:
            docker_proxies.update(paths, load(paths.config, where.platform), proxies.system())
        except WherryError as error:
            click.echo(f"wherry: warning: {error}", err=True)
        if use:
            docker_context.use(paths.docker_context)
        return status
    except KeyboardInterrupt:
        if launched:
            _undo(where, paths, made=made)
        raise


def _require_image(where: Layout, settings: dict[str, Any]) -> None:
    """Refuse before anything is made for it."""
    from wherry.vm import image

    image.choose(where, str(settings.get("image", "")), where.platform.architecture())


def _undo(where: Layout, paths: MachinePaths, *, made: bool) -> None:
    """Stop the machine, and remove it if this call made it."""
    from wherry.service import launch, machine

    # A second interrupt would leave half of it; every wait in here has a bound.
    interrupts.ignore()
    with machine.locked(where, paths.name):
        if machine.exists(paths):
            launch.end_by_force(where, paths)
            if made:
                machine.delete(paths)


@click.command()
@name_argument
@click.option("--force", is_flag=True, help="Do not wait for the guest: like pulling the plug.")
def stop(name: str, force: bool) -> None:
    """Stop machine NAME."""
    if stop_machine(layout(), name, force=force):
        click.echo(f"Machine {name} is stopped.")
    else:
        click.echo(f"Machine {name} was not running.")


def stop_machine(where: Layout, name: str, *, force: bool) -> bool:
    """Stop a machine and return whether there was anything to stop."""
    from wherry.service import machine

    paths = machine.require(where, name)
    with machine.locked(where, name):
        return _stop(where, paths, force=force)


def _stop(where: Layout, paths: MachinePaths, *, force: bool) -> bool:
    from wherry.service.default_socket import DefaultSocket

    stopped = _end(where, paths, force=force)
    # The service does this, unless it died. A link that somebody else made for us stays.
    with contextlib.suppress(WherryError):
        DefaultSocket.of(where, paths).release()
    return stopped


def _end(where: Layout, paths: MachinePaths, *, force: bool) -> bool:
    from wherry.cli.progress import stages
    from wherry.control.client import call
    from wherry.service import launch, state

    if force:
        return launch.end_by_force(where, paths)
    with stages() as show:
        if not launch.answers(where, paths):
            if state.find_orphan(paths) is None:
                state.mark_stopped(paths)
                return False
            # Its service died. A new one adopts the machine, and can stop it in order.
            launch.ensure(where, paths)
            try:
                call(where.platform, paths.control_socket, "wait_running", on_event=show)
            except WherryError as error:
                launch.wait_gone(where, paths)
                if state.find_orphan(paths) is None:
                    return True
                raise WherryError(
                    f"machine {paths.name} still runs, and cannot be taken over: {error.message}",
                    hint=f"end it by force: wherry stop --force {paths.name}",
                ) from error
        call(where.platform, paths.control_socket, "stop", on_event=show)
        launch.wait_gone(where, paths)
    return True


@click.command()
@name_argument
def restart(name: str) -> None:
    """Stop machine NAME and start it again."""
    where = layout()
    stop_machine(where, name, force=False)
    _warn(start_machine(where, name, {}))
    click.echo(f"Machine {name} is running.")


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """Tell of a failure that must not keep the rest from being done."""
    try:
        yield
    except WherryError as error:
        click.echo(f"wherry: warning: {error}", err=True)


@click.command()
@name_argument
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def delete(name: str, yes: bool) -> None:
    """Remove machine NAME: its images, containers, volumes and settings."""
    from wherry.service import docker_context, docker_proxies, machine
    from wherry.service.default_socket import DefaultSocket

    where = layout()
    paths = machine.require(where, name)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "there is no terminal to confirm on", hint=f"wherry delete --yes {name}"
            )
        if not click.confirm(f"Remove machine {name} with all its images, containers and volumes?"):
            click.echo("Nothing is removed.")
            return
    # One lock for both, so that no start comes between.
    with machine.locked(where, name):
        machine.require(where, name)  # it may have gone during the question
        try:
            _stop(where, paths, force=True)
        except WherryError as error:
            raise WherryError(
                f"machine {name} cannot be stopped, so it is not removed: {error.message}",
                hint=error.hint,
            ) from error
        # What leads to the machine goes first: nobody would find it after the machine.
        with contextlib.suppress(WherryError):  # somebody else's stay
            docker_proxies.remove(paths)
        with _warned():
            docker_context.remove(paths.docker_context)
        with _warned():
            DefaultSocket.of(where, paths).release()
        machine.delete(paths)
    click.echo(f"Machine {name} is removed.")
