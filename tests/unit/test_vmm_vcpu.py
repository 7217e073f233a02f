"""posada.vmm.vcpu: threads, kicks, parking with accesses whole, SMP, fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kvm_kit import CODE, RecordingBus, Running, Toy, counted, enter_long_mode, needs_kvm, wait_until

from posada.errors import KvmError
from posada.kvm import Exit, System
from posada.kvm.exits import InternalError, Plain
from posada.vmm.vcpu import State

pytestmark = needs_kvm

SPIN = bytes.fromhex("48ff042500050000ebf6")
"""inc qword [0x500]; jmp back"""

COUNT = bytes.fromhex("baf8030000ed83c1018904250005000039c8750589c8efebecba80000000eef4")
"""Reads 1, 2, 3… from port 0x3f8 (32 bits) and writes each back; a number lost or read twice is told to port 0x80."""

ECHO_MMIO = bytes.fromhex("bb000000d0488b0348894308ebf7")
"""mov rax, [rbx]; mov [rbx+8], rax; jmp back"""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System.open() as opened:
        yield opened


class Counter(RecordingBus):
    """Answers each read with the next number, and checks that what is written is the number just read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.wrong: list[tuple[int, int]] = []
        self.enough = threading.Event()
        self.goal = 0

    def read(self, address: int, size: int, /) -> int:
        self.count += 1
        if self.count >= self.goal:
            self.enough.set()
        return self.count

    def write(self, address: int, size: int, value: int, /) -> None:
        if value != self.count:
            self.wrong.append((address, value))

    def wait(self, more: int) -> None:
        self.goal = self.count + more
        self.enough.clear()
        assert self.enough.wait(10), "the guest does not move"


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(*args: Any, **kwargs: Any) -> Running:
        made.append(Running(*args, **kwargs))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


def test_a_halt_without_an_irqchip_is_told_and_the_vcpu_stands(system: System, running: Any) -> None:
    machine = running(Toy(system, bytes.fromhex("baf803b041eef4")))
    machine.vcpus.start()
    assert machine.ends.wait() == Plain(Exit.HLT)
    machine.first.wait_parked()
    assert (machine.first.state, machine.first.held) == (State.PARKED, True)
    assert machine.pio.log == [("w", 0x3F8, 1, 0x41)]
    assert machine.first.counts().items() >= {("IO", 1), ("HLT", 1)}
    machine.vcpus.resume()  # not for one that stands by its own exit
    assert machine.first.state is State.PARKED
    machine.first.unpark()
    machine.ends.wait()
    assert len(machine.ends.seen) == 2


def test_string_io_reaches_the_bus_item_by_item(system: System, running: Any) -> None:
    pio = RecordingBus({0x1F0: [0x6261, 0x6463, 0x6665, 0x6867]})
    code = bytes.fromhex("fcbaf803be0006b90500f36ebaf001bf0007b90400f36df4")
    machine = running(Toy(system, code), pio)
    machine.toy.memory.write(0x600, b"hello")
    machine.vcpus.start()
    machine.ends.wait()
    assert bytes(pio.written(0x3F8)) == b"hello"
    assert machine.toy.memory.read(0x700, 8) == b"abcdefgh"


def test_a_spinning_guest_is_parked_and_goes_on(system: System, running: Any) -> None:
    machine = running(Toy(system, SPIN, long_mode=True))
    machine.vcpus.start()
    for _ in range(50):
        before = counted(machine)
        wait_until(lambda before=before: counted(machine) > before, "the guest does not run")
        machine.vcpus.quiesce()
        assert machine.first.state is State.PARKED
        assert CODE <= machine.toy.vcpu.get_regs().rip <= CODE + 8
        stood = counted(machine)
        machine.vcpus.quiesce()
        assert counted(machine) == stood
        machine.vcpus.resume()
        machine.vcpus.resume()


def test_no_kick_is_lost_and_no_access_is_lost_or_doubled(system: System, running: Any) -> None:
    """Park and run on as fast as possible, a guest that counts in lockstep with the device."""
    pio = Counter()
    machine = running(Toy(system, COUNT, long_mode=True), pio)
    machine.vcpus.start()
    for _ in range(300):
        machine.vcpus.quiesce()
        before = pio.count
        regs = machine.toy.vcpu.get_regs()
        assert regs.rip not in (CODE + 5, CODE + 0x17) or regs.rcx in (before, before - 1, 0)
        machine.vcpus.resume()
    pio.wait(100)
    machine.vcpus.quiesce()
    assert not pio.wrong
    assert not machine.ends.seen


def test_registers_of_a_parked_vcpu_hold_what_the_device_answered(system: System, running: Any) -> None:
    """The device asks for a stop in the middle of a read; the read's value is in the register when it stands."""
    pio = RecordingBus({0x3F8: [0x55]})
    machine = running(Toy(system, bytes.fromhex("baf803ecebfe")), pio)  # in al, dx; jmp $
    answer = pio.read

    def read_and_park(address: int, size: int, /) -> int:
        machine.first.park(wait=False)
        return answer(address, size)

    pio.read = read_and_park  # type: ignore[method-assign]
    machine.vcpus.start()
    machine.first.wait_parked()
    wait_until(lambda: machine.first.state is State.PARKED and bool(pio.log), "it did not park")
    regs = machine.toy.vcpu.get_regs()
    assert (regs.rax & 0xFF, regs.rip) == (0x55, CODE + 4)


def test_waiting_for_a_vcpu_gives_the_lock_up(system: System, running: Any) -> None:
    """Whoever parks holds the lock, twice; the vcpu needs it to finish its access."""
    pio = Counter()
    machine = running(Toy(system, COUNT, long_mode=True), pio)
    machine.vcpus.start()
    pio.wait(10)
    with machine.lock, machine.lock:
        wait_until(lambda: machine.first.exits[Exit.IO] > 10, "no access")
        machine.vcpus.quiesce()
        assert machine.first.state is State.PARKED
    machine.vcpus.resume()
    pio.wait(10)


def test_mmio_is_answered(system: System, running: Any) -> None:
    mmio = Counter()
    machine = running(Toy(system, ECHO_MMIO, long_mode=True), mmio=mmio)
    machine.vcpus.start()
    mmio.wait(20)
    with machine.vcpus.quiesced():
        assert machine.first.state is State.PARKED
    mmio.wait(20)
    assert not mmio.wrong
    assert machine.first.counts()["MMIO"] >= 40


def test_a_device_that_fails_does_not_end_in_silence(system: System, running: Any) -> None:
    class Broken(RecordingBus):
        def write(self, address: int, size: int, value: int, /) -> None:
            raise ZeroDivisionError("device")

    machine = running(Toy(system, bytes.fromhex("baf803b041eef4")), Broken())
    machine.vcpus.start()
    assert isinstance(machine.ends.wait(), ZeroDivisionError)
    machine.first.wait_parked()
    assert machine.first.held


def test_an_internal_error_is_told(system: System, running: Any) -> None:
    machine = running(Toy(system, b"", long_mode=True))
    regs = machine.toy.vcpu.get_regs()
    regs.rip = 0xD0000000
    machine.toy.vcpu.set_regs(regs)
    machine.vcpus.start()
    assert isinstance(machine.ends.wait(), InternalError)


def test_a_vcpu_cannot_wait_for_itself(system: System, running: Any) -> None:
    machine = running(Toy(system, bytes.fromhex("baf803b041eef4")))
    machine.pio.on_write[0x3F8] = lambda value: machine.first.park()
    machine.vcpus.start()
    assert isinstance(machine.ends.wait(), RuntimeError)


def test_exits_are_traced_on_request(system: System, running: Any) -> None:
    pio = Counter()
    machine = running(Toy(system, COUNT, long_mode=True), pio)
    machine.first.trace(8)
    machine.vcpus.start()
    pio.wait(20)
    machine.vcpus.quiesce()
    kept = machine.first.traced()
    assert len(kept) == 8
    assert [at for at, _ in kept] == sorted(at for at, _ in kept)
    assert any("port 0x3f8" in what for _, what in kept)
    machine.first.trace(0)
    assert machine.first.traced() == []


def test_the_order_of_life_is_kept(system: System, running: Any) -> None:
    machine = running(Toy(system, SPIN, long_mode=True))
    machine.first.park()  # not started: nothing to park
    machine.first.kick()
    assert machine.first.state is State.NEW
    machine.vcpus.start(parked=True)
    machine.first.wait_parked()
    assert counted(machine) == 0
    with pytest.raises(RuntimeError, match="must be new"):
        machine.first.start()
    machine.vcpus.stop()
    machine.vcpus.stop()
    machine.vcpus.quiesce()
    machine.vcpus.resume()
    assert machine.first.state is State.STOPPED


START_ALL = bytes.fromhex(
    "bb0000e0fec783f0000000ff010000c7830003000000450c00c7830003000002460c00"
    "8a0425000500003a04250105000075f0baf8030000eef4"
)
"""Local APIC on; INIT and start-up IPI (vector 2) to all others; wait until byte 0x500 equals byte 0x501; out; hlt."""
STARTED = bytes.fromhex("31c08ed8f0fe06000566b8010000000fa266c1eb1888d8baf903eefaf4ebfc")
"""Real mode at 0x2000: lock inc byte [0x500]; APIC id by CPUID to port 0x3f9; cli; hlt."""


@pytest.mark.parametrize("cpus", [2, 3, 4])
def test_vcpus_are_started_by_ipi(system: System, running: Any, cpus: int) -> None:
    from posada.vmm.cpuid import guest_cpuid

    toy = Toy(system, START_ALL, cpus=cpus, irqchip=True)
    enter_long_mode(toy.memory, toy.vcpu)
    toy.memory.write(0x2000, STARTED)
    toy.memory.write(0x501, bytes([cpus - 1]))
    for index, vcpu in enumerate(toy.vcpus):
        vcpu.set_cpuid(guest_cpuid(system.supported_cpuid(), index, cpus))
    machine = running(toy)
    machine.vcpus.start()
    wait_until(lambda: len(machine.pio.log) == cpus, f"{machine.pio.log} of {cpus} vcpus came")
    assert machine.pio.written(0x3F8) == [cpus - 1]
    assert sorted(machine.pio.written(0x3F9)) == list(range(1, cpus))
    machine.vcpus.quiesce()  # all in HLT inside the kernel
    assert {thread.state for thread in machine.vcpus.threads} == {State.PARKED}


def test_the_machine_goes_on_in_a_forked_child(system: System, running: Any) -> None:
    """The child makes a new vm over the copied memory and starts new threads; both count on, apart."""
    machine = running(Toy(system, SPIN, long_mode=True))
    machine.vcpus.start()
    wait_until(lambda: counted(machine) > 0, "the guest does not run")
    machine.vcpus.quiesce()
    stood = counted(machine)
    sregs, regs = machine.toy.vcpu.get_sregs(), machine.toy.vcpu.get_regs()
    reader, writer = os.pipe()
    with machine.lock:
        child = os.fork()
    if child == 0:  # no pytest in here: whatever happens, leave
        try:
            with pytest.raises(KvmError, match="after fork"):
                machine.toy.vm.get_clock()
            twin = Running(Toy(system, memory=machine.toy.memory))
            twin.toy.vcpu.set_sregs(sregs)
            twin.toy.vcpu.set_regs(regs)
            twin.vcpus.start()
            wait_until(lambda: counted(twin) > stood, "the child does not run")
            twin.vcpus.quiesce()
            os.write(writer, b"went on")
            twin.close()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said == b"went on"
    assert counted(machine) == stood
    machine.vcpus.resume()
    wait_until(lambda: counted(machine) > stood, "the source does not run on")
