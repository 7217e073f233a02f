"""Toy guests for tests on /dev/kvm: a few bytes of machine code in memory, no kernel.

They run anywhere /dev/kvm opens, also where the host emulates it. Code is given as bytes; the comments are the assembly.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from posada.kvm import Exit, GuestDebug, System, Vcpu, Vm
from posada.kvm.exits import ExitData
from posada.vmm.vcpu import Vcpus, VcpuThread

NO_KVM = None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm cannot be opened for reading and writing"
needs_kvm = pytest.mark.skipif(NO_KVM is not None, reason=str(NO_KVM))

PAGE = 4096
CODE = 0x1000
"""Where the toy guests' code starts, in guest-physical memory."""


class Memory:
    """Guest memory from address 0: one private mapping."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.anchor = (ctypes.c_char * size).from_buffer(self.map)
        self.address = ctypes.addressof(self.anchor)

    def read(self, gpa: int, length: int) -> bytes:
        if not 0 <= gpa <= gpa + length <= self.size:
            raise ValueError(f"no guest memory at {gpa:#x}")
        return self.map[gpa : gpa + length]

    def write(self, gpa: int, data: bytes) -> None:
        if not 0 <= gpa <= gpa + len(data) <= self.size:
            raise ValueError(f"no guest memory at {gpa:#x}")
        self.map[gpa : gpa + len(data)] = data


_KEPT: list[Vm | Vcpu] = []


def keep_kvm_on(system: System) -> None:
    """One vm with and one without an irqchip, for as long as the tests run.

    The first vm of a host turns virtualisation on, and each kind of vcpu that comes or goes as its first or last has the
    kernel patch its own code (static keys). In a lab, an emulated machine, hundreds of that hung its processors.
    """
    if not _KEPT:
        for irqchip in (False, True):
            vm = system.create_vm()
            if irqchip:
                vm.create_irqchip()
            _KEPT.extend((vm, vm.create_vcpu(0)))


class Toy:
    """A vm of a few pages with ``cpus`` vcpus; the first starts at `CODE`, in real mode or in long mode ring 0."""

    def __init__(
        self,
        system: System,
        code: bytes = b"",
        *,
        cpus: int = 1,
        irqchip: bool = False,
        long_mode: bool = False,
        size: int = 1 << 20,
        memory: Memory | None = None,
        flags: int = 0,
        before_vcpus: Callable[[Vm], None] = lambda vm: None,
    ) -> None:
        self.memory = memory or Memory(size)
        if code:
            self.memory.write(CODE, code)
        keep_kvm_on(system)
        self.vm = system.create_vm()
        self.vm.set_memory(0, 0, self.memory.size, self.memory.address, flags)
        if irqchip:
            self.vm.create_irqchip()
            self.vm.create_pit()
        before_vcpus(self.vm)
        self.vcpus: list[Vcpu] = []
        for index in range(cpus):
            vcpu = self.vm.create_vcpu(index)
            vcpu.set_cpuid(system.supported_cpuid())
            self.vcpus.append(vcpu)
        if long_mode:
            for vcpu in self.vcpus:
                enter_long_mode(self.memory, vcpu)
        else:
            enter_real_mode(self.vcpus[0])

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()


def enter_real_mode(vcpu: Vcpu, rip: int = CODE) -> None:
    """Flat segments at 0, stack below `CODE`."""
    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "ss"):
        segment = getattr(sregs, name)
        segment.base = segment.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = rip, CODE, 2
    vcpu.set_regs(regs)


PAGE_TABLES = 0x4000
GDT = 0x8000
IDT = 0x9000


def enter_long_mode(memory: Memory, vcpu: Vcpu, rip: int = CODE, user: bool = False) -> None:
    """64-bit mode, the first GiB and the one that ends at 4 GiB mapped one to one (2 MiB pages)."""
    flags = 7  # present, writable, user
    write_table(memory, PAGE_TABLES, {0: PAGE_TABLES + 0x1000 | flags})
    write_table(memory, PAGE_TABLES + 0x1000, {0: PAGE_TABLES + 0x2000 | flags, 3: PAGE_TABLES + 0x3000 | flags})
    write_table(memory, PAGE_TABLES + 0x2000, {i: i << 21 | flags | 0x80 for i in range(512)})
    write_table(memory, PAGE_TABLES + 0x3000, {i: 3 << 30 | i << 21 | flags | 0x80 for i in range(512)})
    memory.write(
        GDT, bytes(8) + (0x00AF9B000000FFFF).to_bytes(8, "little") + (0x00CF93000000FFFF).to_bytes(8, "little")
    )
    sregs = vcpu.get_sregs()
    sregs.cr3, sregs.cr4, sregs.cr0, sregs.efer = PAGE_TABLES, 0x620, 0x80050033, 0x500
    sregs.gdt.base, sregs.gdt.limit = GDT, 23
    sregs.idt.base, sregs.idt.limit = IDT, 4095
    dpl = 3 if user else 0
    for name, selector, kind in (
        ("cs", 8, 11),
        ("ds", 16, 3),
        ("es", 16, 3),
        ("ss", 16, 3),
        ("fs", 16, 3),
        ("gs", 16, 3),
    ):
        s = getattr(sregs, name)
        s.base, s.limit, s.selector, s.type, s.present, s.dpl, s.s, s.g = (
            0,
            0xFFFFFFFF,
            selector | dpl,
            kind,
            1,
            dpl,
            1,
            1,
        )
        s.l, s.db = (1, 0) if name == "cs" else (0, 1)
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = rip, 0x3000, 2
    vcpu.set_regs(regs)


def write_table(memory: Memory, at: int, entries: dict[int, int]) -> None:
    memory.write(at, b"".join(entries.get(i, 0).to_bytes(8, "little") for i in range(512)))


def gate(handler: int) -> bytes:
    """An interrupt gate of 16 bytes, selector 8, ring 0."""
    return (
        (handler & 0xFFFF).to_bytes(2, "little") + b"\x08\x00\x00\x8e" + (handler >> 16 & 0xFFFF).to_bytes(2, "little")
    ) + bytes(8)


class RecordingBus:
    """Notes every access and answers reads from ``answers`` (address → values in turn), else all ones."""

    def __init__(self, answers: dict[int, list[int]] | None = None) -> None:
        self.answers = answers or {}
        self.log: list[tuple[str, int, int, int]] = []
        self.on_write: dict[int, Callable[[int], Any]] = {}

    def read(self, address: int, size: int, /) -> int:
        queued = self.answers.get(address)
        value = queued.pop(0) if queued else (1 << 8 * size) - 1
        self.log.append(("r", address, size, value))
        return value

    def write(self, address: int, size: int, value: int, /) -> None:
        self.log.append(("w", address, size, value))
        if address in self.on_write:
            self.on_write[address](value)

    def written(self, address: int) -> list[int]:
        return [value for kind, at, _, value in self.log if kind == "w" and at == address]


class Ends:
    """An ``on_exit`` that keeps what it was told and lets the vcpu stand still; `wait` waits for the next one."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ExitData | Exception]] = []
        self._event = threading.Semaphore(0)

    def __call__(self, thread: VcpuThread, what: ExitData | Exception) -> bool:
        self.seen.append((thread.index, what))
        self._event.release()
        return False

    def wait(self, timeout: float = 10) -> ExitData | Exception:
        assert self._event.acquire(timeout=timeout), "no exit came"
        return self.seen[-1][1]


def has_hardware_breakpoints(system: System) -> bool:
    """Whether this processor stops guests at them: QEMU's emulated SVM does not. nop; hlt, with one at the hlt."""
    toy = Toy(system, b"\x90\xf4", long_mode=True)
    control = GuestDebug.ENABLE | GuestDebug.USE_HW_BP
    toy.vcpu.set_guest_debug(control, [CODE + 1, 0, 0, 0, 0, 0, 0, 0x402])
    reason = toy.vcpu.run()
    toy.close()
    return reason == Exit.DEBUG


class Running:
    """A toy with its threads."""

    def __init__(self, toy: Toy, pio: Any = None, mmio: Any = None, ends: Any = None, lock: Any = None) -> None:
        self.toy = toy
        self.pio, self.mmio = pio or RecordingBus(), mmio or RecordingBus()
        self.ends = ends or Ends()
        self.lock = lock or threading.RLock()
        self.vcpus = Vcpus(
            VcpuThread(vcpu, i, self.pio, self.mmio, self.lock, self.ends) for i, vcpu in enumerate(toy.vcpus)
        )

    @property
    def first(self) -> VcpuThread:
        return self.vcpus.threads[0]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.vcpus.stop()
        self.toy.close()


def counted(machine: Running) -> int:
    return int.from_bytes(machine.toy.memory.read(0x500, 8), "little")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)
