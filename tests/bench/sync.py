"""Bind mounts beside tar, rsync and unison: first sync, changes, latency, jobs, and at rest.

    python tests/bench/sync.py [--files N] [--big MB] [--runs N] [--only PART] [--json FILE]

One machine, one run. The floor is ``tar | ssh tar``; rsync and unison are the guest's Debian's,
with the same libraries on both ends, over the same ``wherry ssh-config``. Their connection is
made before and shared (``ControlMaster``), as ours stands already. Each run of a first sync has
a place of its own in the guest; all read the same files of the host, which are in its cache.

A sync of ours is timed by a request that needs its barrier, ``POST /containers/create`` with a
bind, and an image that is not there, so the engine answers at once; the same request without a
bind is measured apart and taken off. Equality is checked after each by names and sizes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import give_json
from peers import bundle
from sandbox import Sandbox

CPUS, MEMORY_MIB = 2, 2048
HOST = "wherry-default"
PLACE = "/data/bench"
PARTS = ("small", "big", "barrier", "latency", "job", "rest")
EDITS = 50
CHANGED = 100
MB = 1_000_000
REST_AFTER_S = 60

# Prints a line whenever a file is closed after writing or moved to its name.
_WATCHER = r"""
import ctypes, os, struct, sys
library = ctypes.CDLL(None)
fd = library.inotify_init()
library.inotify_add_watch(fd, sys.argv[1].encode(), 0x8 | 0x80)
print("ready", flush=True)
while True:
    data = os.read(fd, 65536)
    offset = 0
    while offset < len(data):
        _, _, _, length = struct.unpack_from("iIII", data, offset)
        name = data[offset + 16 : offset + 16 + length].rstrip(b"\0").decode()
        offset += 16 + length
        if name == sys.argv[2]:
            try:
                print(open(os.path.join(sys.argv[1], name)).read().strip(), flush=True)
            except OSError:
                pass
"""
_SUM = r"""
import os, sys
n = s = 0
for d, _, fs in os.walk(sys.argv[1]):
    for f in fs:
        n += 1; s += os.lstat(os.path.join(d, f)).st_size
print(n, s)
"""


class Guest:
    """The machine, reached by ssh with one shared connection, and by the engine's socket."""

    def __init__(self, sandbox: Sandbox, scratch: Path) -> None:
        self.scratch = scratch
        self.sandbox = sandbox
        self.config = scratch / "ssh_config"
        self.config.write_bytes(
            sandbox.wherry("ssh-config").stdout
            + f"  ControlMaster auto\n  ControlPersist yes\n  ControlPath {scratch}/cm\n".encode()
        )
        self.ssh = ["ssh", "-F", str(self.config), HOST]
        self.run("true")
        self.docker_socket = sandbox.status()["docker_host"].removeprefix("unix://")

    def run(self, command: str, **options: Any) -> str:
        """Run a command in the guest; return what it printed."""
        done = subprocess.run(
            [*self.ssh, command], stdout=subprocess.PIPE, check=True, timeout=1800, **options
        )
        return str(done.stdout.decode())

    def python(self, script: str, *arguments: str) -> list[str]:
        """Return the command line, on the host, of a script that runs in the guest."""
        return [*self.ssh, shlex.join(["python3", "-c", script, *arguments])]

    def sum(self, path: str) -> str:
        """Return the number and size of files below a directory of the guest."""
        return subprocess.check_output(self.python(_SUM, path)).decode().strip()

    def ask(self, *binds: Path) -> float:
        """Return the seconds of a request that waits for the barriers of binds."""
        connection = http.client.HTTPConnection("localhost", timeout=3600)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.docker_socket)
        body = {"Image": "none:none", "HostConfig": {"Binds": [f"{path}:/b" for path in binds]}}
        begun = time.monotonic()
        connection.request(
            "POST",
            "/v1.47/containers/create",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        text = answer.read()
        took = time.monotonic() - begun
        connection.close()
        if answer.status != 404:
            sys.exit(f"the engine answered {answer.status}: {text!r}")
        return took

    def close(self) -> None:
        """End the shared connection."""
        subprocess.run([*self.ssh[:-1], "-O", "exit", HOST], stderr=subprocess.DEVNULL)


class Peers:
    """What ours is compared with. Each method makes a directory of the guest like the host's."""

    def __init__(self, guest: Guest, cache: Path) -> None:
        self.guest = guest
        tools = guest.scratch / "peers"
        bundle(cache, tools, str(tools))
        guest.run(f"rm -rf {PLACE}; mkdir -p {PLACE} {tools.parent}; ln -s {PLACE}/peers {tools}")
        with subprocess.Popen(["tar", "-C", str(tools), "-c", "."], stdout=subprocess.PIPE) as tar:
            guest.run(f"mkdir {PLACE}/peers && tar -x -C {PLACE}/peers", stdin=tar.stdout)
        self.bin = tools / "bin"
        self.archives = guest.scratch / "unison"

    def tar(self, source: Path, target: str) -> None:
        self.guest.run(f"mkdir -p {target}")
        with subprocess.Popen(["tar", "-C", str(source), "-c", "."], stdout=subprocess.PIPE) as tar:
            self.guest.run(f"tar -x -C {target}", stdin=tar.stdout)

    def rsync(self, source: Path, target: str) -> None:
        self._run(
            f"{self.bin}/rsync",
            *("-a", "-e", shlex.join(self.guest.ssh[:-1]), f"--rsync-path={self.bin}/rsync"),
            *(f"{source}/", f"{HOST}:{target}/"),
        )

    def unison(self, source: Path, target: str, *more: str) -> None:
        self._run(
            *(f"{self.bin}/unison-2.53", str(source), f"ssh://{HOST}/{target}"),
            *("-sshargs", f"-F {self.guest.config}", "-batch", "-silent", "-confirmbigdel=false"),
            *("-servercmd", f"{self.bin}/unison-2.53", "-addversionno=false", *more),
        )

    def _run(self, *argv: str) -> None:
        env = {**os.environ, "UNISON": str(self.archives)}
        subprocess.run(argv, check=True, env=env, stdout=subprocess.DEVNULL, timeout=3600)


def make_tree(directory: Path, files: int) -> int:
    """Make a tree of Python's library, some times over, no two files alike; return its bytes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "__pycache__", "lib-dynload"}
    found = []
    for above, below, names in os.walk(library):
        below[:] = [name for name in below if name not in skipped]
        found += [Path(above, name) for name in names]
    found = [path for path in sorted(found) if path.is_file() and path.stat().st_size < MB]
    size = 0
    for number in range(files):
        path = found[number % len(found)]
        copy = number // len(found)
        target = directory / f"copy-{copy}" / path.relative_to(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() + b"# %d %d\n" % (copy, number)
        target.write_bytes(data)
        size += len(data)
    return size


class Bench:
    """The parts; each adds to :attr:`results`."""

    def __init__(self, guest: Guest, peers: Peers, options: argparse.Namespace) -> None:
        self.guest = guest
        self.peers = peers
        self.options = options
        self.without = set(options.without)
        self.results: dict[str, Any] = {}
        guest.ask()
        self.base = statistics.median(guest.ask() for _ in range(9))
        self.results["request_without_bind_s"] = self.base

    def note(self, name: str, samples: dict[str, list[float]]) -> None:
        """Keep what was measured, and the medians' ratios to ours."""
        medians = {who: statistics.median(found) for who, found in samples.items()}
        self.results[name] = {"median_s": medians, "samples_s": samples}
        row = "   ".join(f"{who} {value:7.2f} s" for who, value in medians.items())
        print(f"{name:28}{row}", file=sys.stderr, flush=True)

    def syncs(
        self, name: str, source: Path, runs: int, change: Callable[[Path, int], object]
    ) -> None:
        """Measure first syncs, and syncs after a change, of one directory of the host.

        :param change: changes the directory, each time otherwise.
        """
        who = [each for each in ("ours", "tar", "rsync", "unison") if each not in self.without]
        first: dict[str, list[float]] = {each: [] for each in who}
        again: dict[str, list[float]] = {each: [] for each in who if each != "tar"}
        for run in range(runs):
            # A place of its own, so that it is a first sync; the name is what tells roots apart.
            place = source.with_name(f"{source.name}-{run}")
            source.rename(place)
            source = place
            targets = {each: f"{PLACE}/{each}/{name}-{run}" for each in who}
            targets["ours"] = str(place)
            self._measure(place, targets, first)
            for step in range(max(1, 5 // runs)):
                change(place, run * 10 + step)
                self._measure(place, targets, again)
            for each in who[1:]:
                self.guest.run(f"rm -rf {targets[each]}")
        self.note(f"first sync, {name}", first)
        if again["ours"]:
            self.note(f"sync after a change, {name}", again)
        shutil.rmtree(source)

    def _measure(
        self, place: Path, targets: dict[str, str], samples: dict[str, list[float]]
    ) -> None:
        """Have each make its copy, ours first, as it would begin by itself while others work."""
        expected = local_sum(place)
        for each, found in samples.items():
            target = targets[each]
            if each == "ours":
                found.append(self.guest.ask(place) - self.base)
            else:
                self.guest.run(f"mkdir -p {PLACE}/{each}")
                begun = time.monotonic()
                getattr(self.peers, each)(place, target)
                found.append(time.monotonic() - begun)
            print(f"  {each} {found[-1]:.2f} s", file=sys.stderr, flush=True)
            self.check(target, expected)

    def check(self, path: str, expected: str) -> None:
        """Stop if a directory of the guest is not what it should be."""
        found = self.guest.sum(path)
        if found != expected:
            sys.exit(f"{path} in the guest has {found} files and bytes, not {expected}")

    def small(self) -> None:
        """Many small files; then some of them change."""
        root = self.guest.scratch / "small"
        self.results["small_bytes"] = make_tree(root, self.options.files)

        def change(place: Path, step: int) -> None:
            files = [path for path in sorted(place.rglob("*")) if path.is_file()]
            for number, path in enumerate(files[step :: max(1, len(files) // CHANGED)][:CHANGED]):
                # Half of them get something at the end, half at the beginning.
                data, new = path.read_bytes(), b"# changed %d\n" % step
                path.write_bytes(data + new if number % 2 else new + data)

        self.syncs("small", root, self.options.runs, change)

    def big(self) -> None:
        """One big file; then a megabyte in its midst changes."""
        root = self.guest.scratch / "big"
        root.mkdir()
        with (root / "file").open("wb") as file:
            for _ in range(self.options.big):
                file.write(os.urandom(MB))

        def change(place: Path, step: int) -> None:
            with (place / "file").open("r+b") as file:
                file.seek(self.options.big * MB // 2 + step * 4096)
                file.write(os.urandom(MB))

        self.syncs("big", root, self.options.big_runs, change)

    def barrier(self) -> None:
        """A barrier with nothing to do, of 10 000 files."""
        root = self.guest.scratch / "idle"
        make_tree(root, self.options.idle_files)
        self.guest.ask(root)
        # Until what follows a first sync has calmed down.
        time.sleep(15)
        times, bases = [], []
        for _ in range(21):
            bases.append(self.guest.ask())
            times.append(self.guest.ask(root))
        trips = []
        for _ in range(9):
            begun = time.monotonic()
            self.guest.run("true")
            trips.append(time.monotonic() - begun)
        cost = statistics.median(times) - statistics.median(bases)
        self.results["barrier"] = {
            "files": self.options.idle_files,
            "cost_s": cost,
            "samples_s": times,
            "without_bind_s": bases,
            "ssh_true_s": statistics.median(trips),
        }
        print(f"{'idle barrier':28}{cost * 1000:7.1f} ms", file=sys.stderr, flush=True)
        shutil.rmtree(root)

    def latency(self) -> None:
        """From a write on the host to the line of a watcher in the guest."""
        root = self.guest.scratch / "live"
        make_tree(root, 1000)
        (root / "edited").write_text("0\n")
        self.guest.ask(root)
        time.sleep(8)
        self._edit("latency", root, str(root), EDITS, lambda: None)
        if "unison" not in self.without:
            # Debian has no unison-fsmonitor, so there is no -repeat watch. This is less than it
            # would take: unison is told at once, and of the one path that has changed.
            target = f"{PLACE}/unison/live"
            self.guest.run(f"mkdir -p {PLACE}/unison")
            self.peers.unison(root, target)
            self._edit(
                "latency, unison told of the path",
                root,
                target,
                EDITS // 5,
                lambda: self.peers.unison(root, target, "-path", "edited"),
            )
        shutil.rmtree(root)

    def _edit(
        self, name: str, root: Path, target: str, edits: int, then: Callable[[], object]
    ) -> None:
        """Measure the time from a write to the line of a watcher in the guest.

        :param then: what is done after each write.
        """
        times = []
        with watching(self.guest, target, "edited") as seen:
            for number in range(1, edits + 1):
                begun = time.monotonic()
                (root / "edited").write_text(f"{name} {number}\n")
                then()
                while next(seen) != f"{name} {number}":
                    pass
                times.append(time.monotonic() - begun)
                time.sleep(0.2)
        times.sort()
        self.results[name] = {
            "edits": edits,
            "p50_s": statistics.median(times),
            "p99_s": times[min(len(times) - 1, int(len(times) * 0.99))],
            "samples_s": times,
        }
        print(
            f"{name:34}p50 {statistics.median(times) * 1000:.0f} ms   "
            f"p99 {times[-1] * 1000:.0f} ms",
            file=sys.stderr,
            flush=True,
        )

    def job(self) -> None:
        """Unpack, find and remove a tree in a container: a bind mount beside a volume."""
        scratch = self.guest.scratch
        make_tree(scratch / "job", self.options.job_files)
        image = scratch / "image"
        (image / "bin").mkdir(parents=True)
        shutil.copy("/bin/busybox", image / "bin" / "busybox")
        subprocess.run(["tar", "-C", scratch, "-cf", image / "job.tar", "job"], check=True)
        with subprocess.Popen(["tar", "-C", image, "-c", "."], stdout=subprocess.PIPE) as tar:
            self.guest.sandbox.docker(
                "import", "-", "bench-job", input=tar.communicate()[0], timeout=600
            )
        root = scratch / "work"
        root.mkdir()
        b = "/bin/busybox"
        script = (
            f"{b} tar xf /job.tar -C /work && {b} find /work | {b} wc -l && {b} rm -r /work/job"
        )
        inside: dict[str, list[float]] = {"ours": [], "volume": []}
        after: dict[str, list[float]] = {"ours": [], "volume": []}
        self.guest.sandbox.docker("volume", "create", "bench-job")
        sources = {"ours": str(root), "volume": "bench-job"}
        for run in range(self.options.runs + 1):
            for each, source in sources.items():
                begun = time.time()
                done = self.guest.sandbox.docker(
                    *("run", "--rm", "-v", f"{source}:/work", "bench-job", b, "sh", "-c"),
                    # The guest's clock is the host's nearly; its own times are what counts.
                    f"{b} cat /proc/uptime; {script}; {b} cat /proc/uptime",
                    timeout=1800,
                )
                total = time.time() - begun
                lines = done.stdout.decode().split("\n")
                took = float(lines[2].split()[0]) - float(lines[0].split()[0])
                if run:
                    # The first one warms the engine up.
                    inside[each].append(took)
                    after[each].append(total - took)
        self.note("job in a container", inside)
        self.note("docker run around the job", after)
        shutil.rmtree(scratch / "job")
        shutil.rmtree(root)

    def rest(self) -> None:
        """Memory and processor time with one big root and nothing to do."""
        root = self.guest.scratch / "rest"
        for number in range(self.options.rest_files // 100):
            directory = root / f"{number // 100}" / f"{number % 100}"
            directory.mkdir(parents=True)
            for index in range(100):
                (directory / f"{index}.txt").write_bytes(b"%d %d\n" % (number, index))
        took = self.guest.ask(root)
        # What follows a first sync, a look at all of the copy and a flush, takes this long.
        time.sleep(REST_AFTER_S)
        service = psutil.Process(self.guest.sandbox.status()["service_pid"])
        agent = "ps -eo pid,args | awk '/wherry_guest.agent/ && !/awk/ {print $1; exit}'"
        stat = f"p=$({agent}); cat /proc/$p/stat; grep -E 'VmRSS' /proc/$p/status"

        def spent() -> tuple[float, float, float]:
            said = self.guest.run(stat)
            fields = said.split("\n")[0].rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            rss = float(said.split("VmRSS:")[1].split()[0]) / 1024
            return sum(service.cpu_times()[:2]), ticks / 100, rss

        before = spent()
        begun = time.monotonic()
        time.sleep(self.options.idle)
        after = spent()
        took_idle = time.monotonic() - begun
        found = {
            "files": self.options.rest_files,
            "first_sync_s": took,
            "service_rss_mib": service.memory_info().rss / 2**20,
            "agent_rss_mib": after[2],
            "service_cpu_percent": 100 * (after[0] - before[0]) / took_idle,
            "agent_cpu_percent": 100 * (after[1] - before[1]) / took_idle,
        }
        self.results["rest"] = found
        for key, value in found.items():
            print(f"{key:28}{value:9.2f}", file=sys.stderr, flush=True)
        shutil.rmtree(root)


def local_sum(path: Path) -> str:
    """Return what :meth:`Guest.sum` should."""
    return subprocess.check_output([sys.executable, "-c", _SUM, str(path)]).decode().strip()


@contextmanager
def watching(guest: Guest, directory: str, name: str) -> Iterator[Iterator[str]]:
    """Yield the lines of a watcher in the guest, which is ready."""
    watcher = subprocess.Popen(
        guest.python(_WATCHER, directory, name), stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None
    try:
        lines = (line.strip() for line in watcher.stdout)
        assert next(lines) == "ready"
        yield lines
    finally:
        watcher.terminate()
        watcher.wait()
        watcher.stdout.close()


def table(results: dict[str, Any]) -> None:
    """Print what was measured."""
    print(f"{'medians, s':30}{'ours':>9}{'tar':>9}{'rsync':>9}{'unison':>9}{'ours / tar':>12}")
    for name, found in results.items():
        if isinstance(found, dict) and "median_s" in found:
            medians = found["median_s"]
            row = "".join(
                f"{medians[who]:9.2f}" if who in medians else f"{'':9}"
                for who in ("ours", "tar", "rsync", "unison")
            )
            ratio = f"{medians['ours'] / medians['tar']:12.2f}" if "tar" in medians else ""
            if "volume" in medians:
                ratio = f"   {medians['volume']:.2f} in a volume"
            print(f"{name:30}{row}{ratio}")
    if "barrier" in results:
        print(f"idle barrier: {results['barrier']['cost_s'] * 1000:.1f} ms")
    for name in (name for name in results if name.startswith("latency")):
        found = results[name]
        print(f"{name}: p50 {found['p50_s'] * 1000:.0f} ms, p99 {found['p99_s'] * 1000:.0f} ms")
    for key, value in results.get("rest", {}).items():
        print(f"{key:30}{value:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=20_000, help="of the tree of small files")
    parser.add_argument("--job-files", type=int, default=20_000)
    parser.add_argument("--idle-files", type=int, default=10_000)
    parser.add_argument("--rest-files", type=int, default=100_000)
    parser.add_argument("--big", type=int, default=1000, help="MB of the big file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--big-runs", type=int, default=1)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to watch at rest")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--without", action="append", default=[], choices=("rsync", "unison"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/wherry/packages")
    parser.add_argument("--home", type=Path, help="a WHERRY_HOME whose machine is used and left")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Ended from outside, it still ends its machine.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="wherry-bench-") as scratch:
        directory = Path(scratch)
        sandbox = Sandbox(directory)
        if options.home:
            sandbox.env |= {
                "WHERRY_HOME": str(options.home),
                "DOCKER_CONFIG": str(options.home / "docker"),
            }
        guest = None
        try:
            size = ["--cpus", str(CPUS), "--memory", f"{MEMORY_MIB}MiB"]
            sandbox.wherry("start", *([] if options.home else size))
            guest = Guest(sandbox, directory)
            bench = Bench(guest, Peers(guest, options.cache), options)
            bench.results["accelerator"] = sandbox.status()["accelerator"]
            for part in options.only or PARTS:
                getattr(bench, part)()
        finally:
            if guest is not None:
                guest.close()
            if not options.home:
                sandbox.stop_all()
    table(bench.results)
    give_json(bench.results, options.json)


if __name__ == "__main__":
    main()
