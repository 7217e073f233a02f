"""The leak storm: fork and delete in cycles, with SIGKILL to posada, to QEMU, to keepers and to callers at random moments.

Afterwards nothing may be there that was not there before: processes, files, sockets, descriptors, ports, records. The
moments come from a seeded generator, so that a storm that found something can be had again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import posada
from bench.series import Figure

CALLER = Path(__file__).with_name("storm_caller.py")
IMAGE = "debian:12"

#: What is done to a cycle, and how often of 10.
FATES = {"let be": 2, "kill the caller": 4, "kill a QEMU": 2, "kill a keeper": 1, "kill caller and QEMU": 1}


@dataclass
class Report:
    """What a storm did and left. ``leaks`` is empty, or posada has a bug."""

    cycles: int = 0
    fates: dict[str, int] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def processes(places: tuple[Path, Path], own: int) -> dict[int, str]:
    """pid → command of every process that names our directories (arguments, or environment), but ours and callers."""
    names = [os.fsencode(place) for place in places]
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (own, os.getpid()):
            continue
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes()
            if any(name in arguments + (entry / "environ").read_bytes() for name in names):
                found[int(entry.name)] = arguments.replace(b"\0", b" ").decode(errors="replace")[:100].strip()
    return found


def files(places: tuple[Path, Path]) -> set[str]:
    return {str(path) for place in places for path in place.rglob("*") if "images" not in path.parts}


def listening(pids: set[int]) -> int:
    """How many listening TCP sockets the processes have."""
    listeners = {
        line.split()[9]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(descriptor)
                if target.startswith("socket:[") and target[8:-1] in listeners:
                    found.add(target)
    return len(found)


def descriptors() -> dict[str, str]:
    """This process's: number → what it is. Not the database's: SQLite keeps one back while a sibling holds a lock."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            found[entry.name] = os.readlink(entry)
    return {number: target for number, target in found.items() if not target.endswith("state.db")}


class Storm:
    """One source machine, and callers that fork it."""

    def __init__(self, host: posada.Host, places: tuple[Path, Path], seed: int, tell: Callable[[str], None]) -> None:
        self.host = host
        self.places = places
        self.dice = random.Random(seed)
        self.tell = tell
        self.report = Report()

    def run(self, cycles: int) -> Report:
        with self.host.run(IMAGE, name="storm-source", memory="512MiB", keep=True, ports=[7000]) as source:
            self.source = source
            running = source.refresh().running
            if running is None:
                raise RuntimeError("the source does not run")
            self.qemu = running.process.pid
            self.cycle("let be", 1)  # whatever is made once is made now
            before = self.state()
            for number in range(cycles):
                fate = self.dice.choices(list(FATES), list(FATES.values()))[0]
                began = time.monotonic()
                self.cycle(fate, self.dice.randint(1, 3))
                self.report.seconds.append(time.monotonic() - began)
                self.report.cycles += 1
                self.report.fates[fate] = self.report.fates.get(fate, 0) + 1
                self.tell(f"storm {number}: {fate}, {self.report.seconds[-1]:.1f} s")
                self.compare(before, f"cycle {number} ({fate})")
                if source.exec("echo", "alive").stdout != "alive\n":
                    self.report.leaks.append(f"cycle {number}: the source does not answer")
        return self.report

    def state(self) -> dict[str, object]:
        """What must be the same after each cycle. The source's own chain of layers grows with each fork, by design."""
        pids = processes(self.places, os.getpid())
        chain = {layer for disk in self.source.refresh().disks for layer in disk.chain}
        return {
            "processes": pids,
            "machines": sorted(vm.record.name for vm in self.host.vms.list()),
            "operations": sorted(o.id for o in self.host.operations.list() if o.record.state in ("pending", "running")),
            "files": {path for path in files(self.places) if not any(layer[:8] in path for layer in chain)},
            "ports": listening(set(pids)),
        }

    def compare(self, before: dict[str, object], when: str) -> None:
        after = self.state()
        for what, value in before.items():
            if after[what] != value:
                self.report.leaks.append(f"{when}: {what}: {difference(value, after[what])}")
                before[what] = after[what]  # say it once

    def cycle(self, fate: str, n: int) -> None:
        """One caller, its fate, and then what the next posada finds is put right and deleted."""
        with tempfile.TemporaryFile() as output:
            arguments = [sys.executable, str(CALLER), "storm-source", str(n), self.dice.choice(["keep", "delete"])]
            home, runtime = map(str, self.places)
            environment = os.environ | {"POSADA_HOME": home, "POSADA_RUNTIME": runtime}
            caller = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment)
            try:
                if fate != "let be":
                    # A condition there is none: the moment itself is what is drawn.
                    time.sleep(self.dice.uniform(0.1, 1.5))
                    self.strike(fate, caller)
                caller.wait(120)
            finally:
                caller.kill()
                caller.wait()
            if fate == "let be" and caller.returncode:
                output.seek(0)
                self.report.leaks.append(f"a caller nobody touched failed: {output.read().decode()[-500:]}")
        self.host.recover()
        for vm in self.host.vms.list():
            if vm.uuid != self.source.uuid:
                with contextlib.suppress(posada.NotFound):
                    vm.delete()
        self.settle()

    def strike(self, fate: str, caller: subprocess.Popen[bytes]) -> None:
        if "caller" in fate:
            caller.kill()
        if "QEMU" in fate or "keeper" in fate:
            victims = []
            for vm in self.host.vms.list():
                running = vm.record.running
                if vm.uuid != self.source.uuid and running is not None:
                    keeper = running.keeper.pid if running.keeper else 0
                    victims.append(running.process.pid if "QEMU" in fate else keeper)
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.dice.choice(victims), signal.SIGKILL)

    def settle(self, timeout: float = 10.0) -> None:
        """Wait until processes that were told to end have ended: a keeper notices its owner's death by itself."""
        mine = {running.pid for running in self.expected()}
        end = time.monotonic() + timeout
        while set(processes(self.places, os.getpid())) - mine and time.monotonic() < end:
            time.sleep(0.02)

    def expected(self) -> list[posada.VmRecord]:
        running = self.source.refresh().running
        return [process for process in (running.process, running.keeper) if process] if running else []  # type: ignore[misc]


def difference(before: object, after: object) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        new = {key: after[key] for key in after.keys() - before.keys()}
        gone = {key: before[key] for key in before.keys() - after.keys()}
        return f"new {new}" if new else f"gone {gone}"
    if isinstance(before, (set, list)) and isinstance(after, (set, list)):
        return f"new {sorted(set(after) - set(before))[:8]}, gone {sorted(set(before) - set(after))[:8]}"
    return f"{before} → {after}"


def storm(places: tuple[Path, Path], cycles: int, seed: int, tell: Callable[[str], None]) -> Report:
    """Run one in a state directory that holds the image. Raises nothing for leaks: they are in the report."""
    own = descriptors()
    with posada.connect(home=places[0], runtime=places[1]) as host:
        report = Storm(host, places, seed, tell).run(cycles)
    after = descriptors()
    if len(after) > len(own):
        report.leaks.append(f"descriptors of this process: {difference(own, after)}")
    if left := processes(places, os.getpid()):
        report.leaks.append(f"processes at the end: {left}")
    return report


def figures(cycles: int, tell: Callable[[str], None]) -> list[Figure]:
    """The line of the table. The state directory is the one POSADA_HOME and POSADA_RUNTIME name."""
    report = storm((Path(os.environ["POSADA_HOME"]), Path(os.environ["POSADA_RUNTIME"])), cycles, 1, tell)
    figure = Figure(
        "storm", f"leaks after {report.cycles} fork/kill cycles with random SIGKILLs", unit="", statistic="max", reach=0
    )
    figure.add(len(report.leaks))
    figure.note = ", ".join(f"{fate} {count} times" for fate, count in sorted(report.fates.items()))
    if report.leaks:
        figure.note += "; " + "; ".join(report.leaks[:5])
    return [figure]
