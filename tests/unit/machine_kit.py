"""A whole `Machine` with a toy guest in it, and nothing of a host around it: for fork, snapshot, reset, migration.

The guest counts in memory and writes each count to a port, for ever; `Probe` is the device at that port.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from kvm_kit import CODE, enter_real_mode

from posada.vmm.builder import prepare, wire
from posada.vmm.config import MonitorConfig, VsockConfig
from posada.vmm.control import Control
from posada.vmm.fork import Child, Forked, Forker
from posada.vmm.machine import Machine
from posada.vmm.memory import GuestMemory

MIB = 1 << 20
PORT = 0x10
COUNTER = 0x2000
"""Where the toy guests count: 32 bits."""

COUNT = bytes.fromhex(
    "66 ff 06 00 20"  # inc dword [0x2000]
    "66 a1 00 20"  # mov eax, [0x2000]
    "66 e7 10"  # out 0x10, eax
    "eb f2"  # jmp to the start
)


class Probe:
    """The device at `PORT`. ``on_write`` is called with each value, the loop's lock held."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.on_write: Callable[[int], Any] = self.values.append

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.on_write(value)


def config(memory: int = 16 * MIB, **changes: Any) -> MonitorConfig:
    """A machine with a vsock device and no descriptor but /dev/kvm, which is opened."""
    made = MonitorConfig(
        uuid="",
        name="toy",
        cpus=1,
        memory=memory,
        kvm=os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC),
        vsock=VsockConfig(3),
    )
    return replace(made, **changes)


def toy(
    code: bytes = COUNT, *, memory: GuestMemory | None = None, size: int = 16 * MIB, **changes: Any
) -> tuple[Machine, Probe]:
    """BUILT, its first vcpu at ``code`` in real mode."""
    machine = prepare(config(size, **changes), memory or GuestMemory.anonymous(size))
    probe = Probe()
    machine.pio.add(PORT, 4, probe)
    wire(machine)
    machine.control = Control(machine.loop, -1, {})
    machine.memory.write(CODE, code)
    enter_real_mode(machine.vcpus.threads[0].vcpu)
    return machine, probe


def spin(machine: Machine, until: Callable[[], bool], timeout: float = 20) -> None:
    """Run the machine's loop on this thread until ``until`` holds; it is asked every few milliseconds."""
    deadline = time.monotonic() + timeout

    def look() -> None:
        if until() or time.monotonic() > deadline:
            machine.loop.stop()
        else:
            machine.loop.timer(0.002, look)

    machine.loop.soon(look)
    machine.loop.run()
    assert until(), "it did not happen in time"


def monitor(body: Callable[[Callable[..., None]], None], timeout: float = 40) -> list[dict[str, Any]]:
    """Run ``body(report)`` in a process of its own, and the children it forks; returns what they all reported, in order.

    ``report(key=value, …)``. A process ends when ``body`` returns in it; this returns when all have ended.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

        def report(**values: Any) -> None:
            os.write(writer, json.dumps(values).encode() + b"\n")

        try:
            body(report)
        except BaseException:
            report(error=traceback.format_exc())
        finally:
            os._exit(0)
    os.close(writer)
    data = b""
    deadline = time.monotonic() + timeout
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    else:
        os.kill(pid, signal.SIGKILL)
        data += b'{"error": "it took too long"}\n'
    os.close(reader)
    os.waitpid(pid, 0)
    reports: list[dict[str, Any]] = [json.loads(line) for line in data.splitlines()]
    assert not [r["error"] for r in reports if "error" in r], reports
    return reports


def fork(machine: Machine, forker: Forker, children: int, **changes: Any) -> Forked | None:
    """Fork as the control socket's handler does, from the loop. None in a child."""
    outcome: list[Forked | None] = []
    configs = [child(machine, index, **changes) for index in range(children)]
    machine.loop.soon(lambda: outcome.append(forker.fork(list(map(Child, configs)))))
    spin(machine, lambda: bool(outcome))
    return outcome[0]


def child(machine: Machine, index: int, **changes: Any) -> MonitorConfig:
    """A child's configuration: no descriptors, a generation id and a cid of its own."""
    return replace(
        machine.config,
        name=f"child{index}",
        kvm=-1,
        generation_id=f"00000000-0000-0000-0000-{index + 1:012}",
        vsock=VsockConfig(100 + index),
        **changes,
    )


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """Close what a test's machines left open: a process does that by ending, a test does not."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()  # what has an owner is closed by it
    for fd in set(os.listdir("/proc/self/fd")) - before:
        try:
            os.close(int(fd))
        except OSError:
            pass  # the listing's own


def counter(machine: Machine) -> int:
    return machine.memory.u32(COUNTER)
