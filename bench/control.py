"""Figures that need no guest: the command's start-up, and lists of a thousand machines."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import posada
from bench.series import Figure

MACHINES = 1000


def command(*arguments: str, home: Path | None = None, runtime: Path | None = None) -> float:
    """Milliseconds of a whole `posada` process. Raises CalledProcessError when it fails."""
    environment = dict(os.environ)
    if home is not None and runtime is not None:
        environment |= {"POSADA_HOME": str(home), "POSADA_RUNTIME": str(runtime)}
    posada_command = Path(sys.executable).with_name("posada")
    began = time.perf_counter()
    subprocess.run([posada_command, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1000


def start_up(runs: int, tell: Callable[[str], None]) -> list[Figure]:
    version = Figure("version", "start-up of the CLI (`posada version`)", reach=120)
    python = Figure("python", "for comparison: an empty Python (`python -c pass`)")
    command("version")
    for _ in range(runs):
        version.add(command("version"))
        with python.timed():
            subprocess.run([sys.executable, "-c", "pass"], check=True)
    tell(f"posada version: {version.result:.0f} ms")
    return [version, python]


def thousand(runs: int, tell: Callable[[str], None]) -> list[Figure]:
    """Lists of 1,000 defined machines, in a state directory of their own."""
    whole = Figure("ps", f"`posada ps -a` with {MACHINES:,} defined machines, whole process", reach=250)
    call = Figure("list", f"`host.vms.list()` with {MACHINES:,} defined machines, API call", reach=15)
    define = Figure("define", "define a machine (durable: record, vm.json, disk)")
    with tempfile.TemporaryDirectory(prefix="posada-bench-") as scratch:
        home, runtime = Path(scratch, "home"), Path(scratch, "run")
        disk = Path(scratch, "disk.raw")
        with disk.open("wb") as file:
            file.truncate(1 << 20)
        with posada.connect(home=home, runtime=runtime) as host:
            image = host.images.import_disk(disk, name="empty:1")
            for number in range(MACHINES):
                with define.timed():
                    host.vms.create(image.name, name=f"m{number}", firmware="bios")
            for _ in range(runs):
                with call.timed():
                    found = len(host.vms.list())
                if found != MACHINES:
                    raise RuntimeError(f"the list holds {found} machines")
        for _ in range(runs):
            whole.add(command("ps", "--all", home=home, runtime=runtime))
    tell(f"1,000 machines: ps {whole.result:.0f} ms, list {call.result:.1f} ms, define {define.result:.1f} ms")
    return [whole, call, define]
