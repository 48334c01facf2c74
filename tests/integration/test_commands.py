"""Single commands as a user meets them: on a terminal, in a pipe, with an editor, at a bad time."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fake_host import FakeHost, wait_until
from filelock import FileLock
from terminal import Terminal

from wherry.service import docker_context

# --debug.


def test_debug_adds_the_traceback_wherever_it_stands(host: FakeHost) -> None:
    plain = host.run("status", "absent")
    assert plain.line == "no machine is named absent; make it: wherry start absent"
    for place in range(3):
        arguments = ["status", "absent"]
        arguments.insert(place, "--debug")
        done = host.run(*arguments)
        assert done.status == plain.status == 3
        assert done.stderr.startswith("Traceback (most recent call last):\n")
        assert "\nwherry.core.errors.NoSuchMachine: " in done.stderr
        assert done.stderr.endswith(f"\n{plain.stderr}")


def test_debug_shows_what_caused_a_failure(host: FakeHost) -> None:
    host.make()
    host.paths.config.write_text("cpus = \n")
    done = host.run("config", "show", "--debug")
    assert done.status == 1
    assert "tomllib.TOMLDecodeError: " in done.stderr
    assert "direct cause" in done.stderr


# Progress.


def test_a_terminal_shows_each_stage_with_its_time(host: FakeHost) -> None:
    host.behave(delay_s=0.3)
    with Terminal([sys.executable, "-m", "wherry", "start"], host.env) as terminal:
        assert terminal.wait() == 0
    screen = terminal.screen.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    # Those before it asked for the first time may have passed.
    for stage in ("Booting the guest", "Connecting over SSH", "Waiting for the engine"):
        assert re.search(rf"✓ {stage} +\d:\d\d:\d\d", plain), plain
    assert "Machine default is running Docker 28.5.2" in screen
    with Terminal([sys.executable, "-m", "wherry", "stop"], host.env) as terminal:
        assert terminal.wait() == 0
    assert "Stopping the engine and its containers" in terminal.screen.decode()


def test_a_pipe_sees_no_progress(host: FakeHost) -> None:
    started = host.run("start")
    assert started.stdout.splitlines() == [
        "Machine default is running Docker 28.5.2. Try: docker --context wherry ps"
    ]
    # A computer without acceleration is told of, once and in one line.
    assert all(line.startswith("wherry: warning: ") for line in started.stderr.splitlines())
    assert len(started.stderr.splitlines()) <= 1
    stopped = host.run("stop")
    assert (stopped.stdout, stopped.stderr) == ("Machine default is stopped.\n", "")


# logs -f.


def read_until(command: subprocess.Popen[bytes], wanted: str) -> None:
    """Read exactly this from a command's output, which goes on."""
    assert command.stdout is not None
    said = b""
    end = time.monotonic() + 20
    while len(said) < len(wanted.encode()):
        assert select.select([command.stdout], [], [], end - time.monotonic())[0], said
        chunk = os.read(command.stdout.fileno(), 65536)
        assert chunk, said
        said += chunk
    assert said.decode() == wanted


def test_a_log_is_followed_through_rotations_and_new_beginnings(host: FakeHost) -> None:
    host.make()
    log = host.paths.service_log
    log.write_text("the first line, which is long\n")
    with host.spawn("logs", "-f") as command:
        read_until(command, "the first line, which is long\n")
        # As logging.handlers.RotatingFileHandler does it: no file, then a new one.
        with log.open("a") as file:
            file.write("the last line before\n")
        log.rename(log.with_suffix(".log.1"))
        time.sleep(0.5)
        log.write_text("after\n")
        read_until(command, "the last line before\nafter\n")
        with log.open("a") as file:
            file.write("more\n")
        read_until(command, "more\n")
        # As QEMU does it with the console's.
        log.write_text("new\n")
        read_until(command, "new\n")
        os.killpg(command.pid, signal.SIGINT)
        done = host.finish(command)
    assert (done.status, done.stdout) == (130, "")


# A service that hangs.


def test_machines_whose_services_hang_are_broken_and_say_so(host: FakeHost) -> None:
    for name in ("default", "other"):
        host.good("start", name)
        os.kill(host.status(name)["service_pid"], signal.SIGSTOP)
    begin = time.monotonic()
    found = json.loads(host.good("list", "--json"))
    # Together, not one after the other.
    assert time.monotonic() - begin < 2 * 5
    for fields in found:
        assert fields["state"] == "broken"
        assert fields["reason"] == "the machine's service did not answer within 5 s"
        assert fields["service_pid"] is not None
        os.kill(fields["service_pid"], signal.SIGCONT)
    assert host.status()["state"] == "running"


# Settings of a machine that exists.


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("disk", "1GiB", "disk = 1 GiB is smaller than the data disk, 2 GiB; a disk can only grow"),
        ("image", "nonsense", "no image nonsense for "),
    ],
)
def test_what_no_start_could_use_is_not_saved(
    key: str, value: str, says: str, host: FakeHost
) -> None:
    host.make(disk="2GiB")
    before = host.paths.config.read_bytes()
    for command in (["start", f"--{key}", value], ["config", "set", key, value]):
        done = host.run(*command)
        assert (done.status, says in done.line) == (2, True), done
    assert host.paths.config.read_bytes() == before
    assert host.launches() == 0


def test_a_disk_above_the_default_size_cannot_return_to_it(host: FakeHost) -> None:
    host.make(disk="65GiB")
    done = host.run("config", "unset", "disk")
    assert (done.status, "disk = 64 GiB is smaller than" in done.line) == (2, True), done


def test_a_setting_can_be_changed_while_another_is_amiss_elsewhere(host: FakeHost) -> None:
    """A lost disk or image is told at the start; it does not keep the rest from being mended."""
    host.make(disk="2GiB")
    host.good("config", "set", "image", "1")
    host.paths.data_disk.unlink()
    shutil.rmtree(host.image)
    host.good("config", "set", "cpus", "1")
    host.good("config", "unset", "image")


def test_a_wrong_value_in_the_file_is_named_where_it_is(host: FakeHost) -> None:
    host.make()
    host.paths.config.write_text("# mine\ncpus = 9999\n")
    done = host.run("config", "set", "memory", "1GiB")
    assert done.status == 1
    assert done.line.startswith(f"{host.paths.config}:2: cpus = 9999 is more than the ")
    host.good("config", "set", "cpus", "1")


def test_a_restart_warns_as_a_start_does(host: FakeHost) -> None:
    host.make()
    host.behave(trial={"kvm": "crashes"})
    done = host.run("restart")
    assert (done.status, done.stdout) == (0, "Machine default is running.\n")
    assert "wherry: warning: running in emulation" in done.stderr


# config edit.


def editor(host: FakeHost, script: str) -> dict[str, str]:
    """Make an editor that runs a script on the file, and return what chooses it."""
    program = host.bin / "editor"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"VISUAL": str(program), "EDITOR": str(program)}


def test_editing_keeps_what_was_written(host: FakeHost) -> None:
    host.make(disk="2GiB")
    text = "# mine\ncpus = 1\ndisk = '2GiB'\n"
    done = host.run("config", "edit", **editor(host, f'printf "{text}" >"$1"'))
    assert (done.status, done.stderr) == (0, "")
    assert host.paths.config.read_text() == text
    assert host.good("config", "edit", **editor(host, "true")) == "Nothing changed.\n"


def test_editing_tells_what_a_running_machine_takes_later(host: FakeHost) -> None:
    host.good("start", "--disk", "2GiB")
    with_link = editor(host, 'printf "[endpoint]\ndefault_socket = true\n" >>"$1"')
    done = host.run("config", "edit", **with_link)
    assert (done.status, done.stderr) == (0, "")
    assert host.default_socket.is_symlink()
    done = host.run("config", "edit", **editor(host, 'sed -i "1i cpus = 1" "$1"'))
    assert done.stderr == "It takes effect at the next start: wherry restart default\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("cpus = 'many'", "'many' is not a whole number"),
        ("cpus = 9999", "cpus = 9999 is more than the"),
        ("disk = '1GiB'", "smaller than the data disk, 2 GiB"),
        ("image = 'nonsense'", "no image nonsense"),
    ],
)
def test_a_wrong_edit_is_not_saved_and_not_lost(line: str, says: str, host: FakeHost) -> None:
    host.make(disk="2GiB")
    before = host.paths.config.read_bytes()
    text = f"# mine\n\n{line}\n"
    done = host.run("config", "edit", **editor(host, f'printf "{text}" >"$1"'))
    kept = host.paths.config.with_name("config.toml.rejected")
    first, last = done.stderr.splitlines()
    assert done.status == 1
    assert first == f"Not saved; what you wrote is in {kept}"
    assert last.startswith(f"wherry: {host.paths.config}:3: ")
    assert says in last
    assert kept.read_text() == text
    assert host.paths.config.read_bytes() == before


def test_an_edit_of_a_file_that_changed_meanwhile_is_not_saved(host: FakeHost) -> None:
    """The editor holds no lock: another command goes on, and what it did is kept."""
    host.make(disk="2GiB")
    meanwhile = f'"{sys.executable}" -m wherry config set cpus 1; echo "memory = \'1GiB\'" >>"$1"'
    done = host.run("config", "edit", **editor(host, meanwhile))
    assert done.status == 1
    assert "was changed by something else meanwhile; do it again: wherry config edit" in done.stderr
    assert host.good("config", "get", "cpus") == "1\n"
    assert "memory" not in host.paths.config.read_text()


def test_an_edit_waits_for_the_command_that_holds_the_machine(host: FakeHost) -> None:
    host.make(disk="2GiB")
    edited = host.directory / "edited"
    chosen = editor(host, f'echo "cpus = 1" >>"$1"; touch "{edited}"')
    with FileLock(host.layout.machines / ".default.lock"):
        command = host.spawn("config", "edit", **chosen)
        wait_until(edited.exists, 20, "the editor ends")
        time.sleep(0.5)
        assert command.poll() is None
        assert "cpus" not in host.paths.config.read_text()
    assert host.finish(command).status == 0
    assert "cpus = 1" in host.paths.config.read_text()


# Removal.


def test_a_machine_that_is_removed_in_part_leaves_no_context(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.make()
    monkeypatch.setenv("DOCKER_CONFIG", str(host.directory / "docker"))
    docker_context.create("wherry", f"unix://{host.paths.docker_socket}", "default")
    assert host.contexts()
    (host.paths.directory / "busy").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", host.paths.directory / "busy"], check=True)
    try:
        done = host.run("delete", "--yes")
    finally:
        moved = host.paths.directory.with_name(".default.deleted") / "busy"
        subprocess.run(["umount", moved], check=True)
    assert (done.status, "cannot be removed" in done.line) == (1, True)
    assert not host.contexts()


# completion.

COMPLETE = {
    "bash": 'eval "$(wherry completion bash)"; COMP_WORDS=(wherry status d); COMP_CWORD=2; '
    '_wherry_completion wherry; printf "%s\\n" "${COMPREPLY[@]}"',
    "zsh": "compdef() { :; }; compadd() { :; }; _describe() { :; }; "
    'eval "$(wherry completion zsh)"; functions _wherry_completion >/dev/null && '
    "COMP_WORDS='wherry status d' COMP_CWORD=2 _WHERRY_COMPLETE=zsh_complete wherry | sed -n 2p",
    "fish": "wherry completion fish | source; complete -C 'wherry status d'",
}


@pytest.mark.parametrize("shell", list(COMPLETE))
def test_a_real_shell_completes_names(shell: str, host: FakeHost) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}")
    for name in ("default", "work"):
        (host.layout.machines / name).mkdir()
    (host.bin / "wherry").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m wherry "$@"\n')
    (host.bin / "wherry").chmod(0o755)
    home = host.directory / "shell"
    home.mkdir()
    done = subprocess.run(
        [program, "-c", COMPLETE[shell]],
        env={**host.env, "HOME": str(home)},
        capture_output=True,
        timeout=60,
    )
    assert (done.stdout.decode().split(), done.stderr) == (["default"], b"")


def test_commands_are_completed(host: FakeHost) -> None:
    env = {"COMP_WORDS": "wherry st", "COMP_CWORD": "1", "_WHERRY_COMPLETE": "bash_complete"}
    assert host.good(**env).split() == ["plain,start", "plain,stop", "plain,status"]
