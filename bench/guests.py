"""Figures of guests: cold run, exec, fork, snapshot, restore, memory. Each value is verified before it counts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import posada
from bench.series import Figure

IMAGE = "debian:12"
MEMORY = "512MiB"
SPEC = {"cpus": 1, "memory": MEMORY}


class WrongAnswer(Exception):
    """The guest said something else: a time without the right result is no figure."""


def verified(vm: posada.VM, nonce: str) -> None:
    """The guest's reply: its agent reads the nonce out of a tmpfs."""
    got = vm.files.read_text("/dev/shm/nonce")
    if got != nonce:
        raise WrongAnswer(f"{vm.name} holds {got!r}, not {nonce!r}")


def first_command(vm: posada.VM, nonce: str) -> None:
    """The same by a program: emulated processors translate all of fork, exec and libc for it."""
    got = vm.exec("cat", "/dev/shm/nonce").stdout
    if got != nonce:
        raise WrongAnswer(f"cat in {vm.name} says {got!r}, not {nonce!r}")


def plant(vm: posada.VM) -> str:
    """A secret that only this machine's memory holds."""
    nonce = secrets.token_hex(16)
    vm.files.write("/dev/shm/nonce", nonce)
    return nonce


def cold_run(host: posada.Host, runs: int, tell: Callable[[str], None]) -> list[Figure]:
    figure = Figure("cold", "`run` → first command's result, cold", reach=4500)
    for number in range(runs + 1):
        began = time.perf_counter()
        with host.run(IMAGE, **SPEC) as vm:
            if vm.exec("echo", "first").stdout != "first\n":
                raise WrongAnswer("echo")
            took = (time.perf_counter() - began) * 1000
        if number:  # the first one fills the page cache
            figure.add(took)
        tell(f"cold run {number}: {took:.0f} ms")
    return [figure]


def exec_true(host: posada.Host, runs: int, tell: Callable[[str], None]) -> list[Figure]:
    figure = Figure("exec", "exec `true`, round trip", reach=10)
    with host.run(IMAGE, **SPEC) as vm:
        for _ in range(10):
            vm.exec("true", check=True)
        for _ in range(runs * 10):
            with figure.timed():
                vm.exec("true", check=True)
    return [figure]


def _pauses(host: posada.Host, after: int) -> list[float]:
    """Milliseconds that sources stood still, as the engine measured them, of the forks since event ``after``."""
    events = host.events.list(after=after)
    return [event.data["pause"] * 1000 for event in events if event.kind == "vm.forked"]


def _last_event(host: posada.Host) -> int:
    last, events = 0, host.events.list()
    while events:
        last, events = events[-1].id, host.events.list(after=events[-1].id)
    return last


def fork(host: posada.Host, runs: int, tell: Callable[[str], None]) -> list[Figure]:
    one = Figure("fork1", "fork(1) of a running machine → verified reply of the child", reach=300)
    command = Figure("fork1-exec", "fork(1) of a running machine → result of the child's first program (`cat`)")
    pause = Figure("pause", "the source's pause in a fork", statistic="p99", reach=150)
    eight = Figure("fork8", "fork(8) → all eight verified", reach=1600)
    second = Figure("refork", "fork(1) of a fork → verified reply")
    with host.run(IMAGE, **SPEC) as vm:
        nonce = plant(vm)
        after = _last_event(host)
        for number in range(runs + 1):
            began = time.perf_counter()
            with vm.fork(1)[0] as child:
                verified(child, nonce)
                took = (time.perf_counter() - began) * 1000
                first_command(child, nonce)
                until_command = (time.perf_counter() - began) * 1000
            if number:
                one.add(took)
                command.add(until_command)
            tell(f"fork {number}: {took:.0f} ms, first program {until_command:.0f} ms")
        pause.values = _pauses(host, after)[1:]
    # From here each on a source of its own: disks' chains grow with every fork, and a figure has to say which length.
    with host.run(IMAGE, **SPEC) as vm:
        nonce = plant(vm)
        for number in range(runs):
            with ExitStack() as stack:
                began = time.perf_counter()
                children = [stack.enter_context(child) for child in vm.fork(8)]
                for child in children:
                    verified(child, nonce)
                eight.add((time.perf_counter() - began) * 1000)
            tell(f"fork(8) {number}: {eight.values[-1]:.0f} ms")
    with host.run(IMAGE, **SPEC) as vm:
        nonce = plant(vm)
        with vm.fork(1)[0] as child:
            for number in range(runs):
                with ExitStack() as stack:
                    began = time.perf_counter()
                    grandchild = stack.enter_context(child.fork(1)[0])
                    verified(grandchild, nonce)
                    second.add((time.perf_counter() - began) * 1000)
                tell(f"fork of a fork {number}: {second.values[-1]:.0f} ms")
    return [one, command, pause, eight, second]


def snapshot_and_restore(host: posada.Host, runs: int, tell: Callable[[str], None]) -> list[Figure]:
    pause = Figure("snapshot-pause", "full snapshot of a running machine, pause", statistic="p99", reach=200)
    whole = Figure("snapshot", "full snapshot, whole call (durable on disk)")
    restore = Figure("restore", "restore in place → verified reply", reach=300)
    with host.run(IMAGE, **SPEC) as vm:
        nonce = plant(vm)
        for number in range(runs):
            with whole.timed():
                point = vm.snapshot(f"s{number}")
            pause.add(point.pause * 1000)
            tell(f"snapshot {number}: pause {pause.values[-1]:.0f} ms of {whole.values[-1]:.0f} ms")
            if number:
                point.delete()
        for number in range(runs + 1):
            vm.files.write("/dev/shm/nonce", "overwritten")
            began = time.perf_counter()
            vm.restore("s0")
            verified(vm, nonce)
            took = (time.perf_counter() - began) * 1000
            if number:
                restore.add(took)
            tell(f"restore {number}: {took:.0f} ms")
    return [restore, pause, whole]


def memory(host: posada.Host, runs: int, tell: Callable[[str], None]) -> list[Figure]:
    """PSS of an idle fork after its first command, and what it consists of."""
    total = Figure("pss", "extra host memory of a fork (PSS, idle, after its first command)", unit="MiB", reach=90)
    parts: dict[str, Figure] = {}
    with host.run(IMAGE, **SPEC) as vm:
        nonce = plant(vm)
        with ExitStack() as stack:
            for child in [stack.enter_context(child) for child in vm.fork(4)]:
                first_command(child, nonce)
                running = child.record.running or child.refresh().running
                if running is None:
                    raise WrongAnswer("the child does not run")
                consists = pss_parts(running.process.pid)
                keeper = pss_parts(running.keeper.pid)["Pss"] if running.keeper else 0.0
                total.add(consists["Pss"] + keeper)
                named = {
                    "guest pages written, QEMU's heap and translated code": consists["Pss_Anon"],
                    "QEMU's program and libraries, its share": consists["Pss_File"],
                    "sealed copy of the source's memory, its share": consists["Pss_Shmem"],
                    "keeper": keeper,
                }
                for name, value in named.items():
                    parts.setdefault(name, Figure(name, name, unit="MiB")).add(value)
    total.note = "; ".join(f"{name} {figure.result or 0:.0f} MiB" for name, figure in parts.items())
    tell(f"memory of a fork: {total.note}")
    return [total]


def pss_parts(pid: int) -> dict[str, float]:
    """The proportional set size of a process in MiB, and of what: anonymous, file and shared memory."""
    found = {"Pss": 0.0, "Pss_Anon": 0.0, "Pss_File": 0.0, "Pss_Shmem": 0.0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) / 1024
    return found


ALL = {"cold": cold_run, "exec": exec_true, "fork": fork, "snapshot": snapshot_and_restore, "memory": memory}
