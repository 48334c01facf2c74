"""How long a cold start takes, and what a machine at rest costs.

    python tests/bench/start.py [--runs N] [--idle SECONDS] [--json FILE]

The floor is the same QEMU command line with an initramfs that only says that it is
there: from QEMU's start to that line. Floor and start alternate, so that a busy
computer slows both. The start is `wherry start` of a stopped machine, timed from
outside; "QEMU to API" is the part from QEMU's start to the engine's first answer.
After each start the machine rests, and what it costs then is measured. All figures are
medians of the runs.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import give_json
from sandbox import Sandbox

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.vm import disk, image
from wherry.vm.driver import MachineSpec
from wherry.vm.qemu import programs
from wherry.vm.qemu.arguments import arguments

LINE = b"wherry: init"
CPUS, MEMORY = 2, 2 << 30


def floor(directory: Path, accelerator: str) -> float:
    """Return the seconds from QEMU's start to the first line of an empty initramfs."""
    platform = current()
    chosen = image.choose(Layout.current(platform), "", platform.architecture())
    tools = programs.find(chosen.architecture, platform)
    data, console = directory / "data.qcow2", directory / "console.log"
    if not data.exists():
        disk.create(data, 1 << 30, qemu_img=tools.img)
    console.unlink(missing_ok=True)
    spec = MachineSpec(
        name="floor",
        image=chosen,
        cpus=CPUS,
        memory_bytes=MEMORY,
        accelerator=accelerator,
        data_disk=data,
        console_log=console,
        qmp_socket=directory / "qmp.sock",
    )
    argv = [str(tools.system), *arguments(spec)]
    argv[argv.index("-initrd") + 1] = str(chosen.probe)
    begun = time.monotonic()
    process = subprocess.Popen(argv)
    try:
        while not (console.exists() and LINE in console.read_bytes()):
            if process.poll() is not None or time.monotonic() - begun > 120:
                sys.exit("the floor's boot said nothing")
            time.sleep(0.005)
        return time.monotonic() - begun
    finally:
        process.kill()
        process.wait()


def start(sandbox: Sandbox) -> tuple[float, float]:
    """Return the seconds of `wherry start`, and of its part from QEMU's start to the API."""
    begun = time.time()
    sandbox.wherry("start")
    total = time.time() - begun
    status = sandbox.status()
    answered = begun + total - status["uptime_s"]
    return total, answered - psutil.Process(status["qemu_pid"]).create_time()


def rest(sandbox: Sandbox, seconds: float) -> dict[str, float]:
    """Return what the machine costs when nobody uses it."""
    status = sandbox.status()
    service, qemu = psutil.Process(status["service_pid"]), psutil.Process(status["qemu_pid"])
    time.sleep(10)  # the agent comes after the API
    before = [sum(process.cpu_times()[:2]) for process in (service, qemu)]
    time.sleep(seconds)
    after = [sum(process.cpu_times()[:2]) for process in (service, qemu)]
    said = sandbox.wherry("shell", "--", "cat", "/proc/meminfo").stdout.decode()
    memory = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in said.splitlines()}
    return {
        "guest_memory_mib": memory["MemTotal"] - memory["MemAvailable"],
        "service_rss_mib": service.memory_info().rss / 2**20,
        "qemu_rss_mib": qemu.memory_info().rss / 2**20,
        "service_cpu_percent": 100 * (after[0] - before[0]) / seconds,
        "qemu_cpu_percent": 100 * (after[1] - before[1]) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to watch each at rest")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    # Ended from outside, it still ends its machine.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="wherry-bench-") as scratch:
        directory = Path(scratch)
        sandbox = Sandbox(directory)
        try:
            sandbox.wherry("start", "--cpus", str(CPUS), "--memory", f"{MEMORY >> 20}MiB")
            accelerator = sandbox.status()["accelerator"]
            samples: dict[str, list[float]] = {}
            for _ in range(options.runs):
                sandbox.wherry("stop")
                found = {"floor_s": floor(directory, accelerator)}
                found["start_s"], found["qemu_to_api_s"] = start(sandbox)
                resting = rest(sandbox, options.idle)
                for key, value in (found | resting).items():
                    samples.setdefault(key, []).append(value)
                print(
                    *(f"{key} {value:.2f}" for key, value in (found | resting).items()),
                    sep="   ",
                    file=sys.stderr,
                )
        finally:
            sandbox.stop_all()
    medians = {key: statistics.median(values) for key, values in samples.items()}
    base = medians["floor_s"]
    result: dict[str, Any] = {
        "accelerator": accelerator,
        "runs": options.runs,
        "idle_s": options.idle,
        **medians,
        "start_ratio": medians["start_s"] / base,
        "qemu_to_api_ratio": medians["qemu_to_api_s"] / base,
        "samples": samples,
    }
    print(f"{'':24}{'median':>10}{'x floor':>10}")
    print(f"{'floor (QEMU to init)':24}{base:8.2f} s")
    for label, key in (("QEMU to API", "qemu_to_api"), ("wherry start", "start")):
        print(f"{label:24}{result[key + '_s']:8.2f} s{result[key + '_ratio']:10.2f}")
    for key in resting:
        print(f"{key:24}{medians[key]:8.1f}")
    give_json(result, options.json)


if __name__ == "__main__":
    main()
