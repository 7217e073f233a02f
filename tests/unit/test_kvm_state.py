"""Saved state of vcpus and chips: what a guest sees before and after, and what is refused."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvm_kit import CODE, IDT, Memory, Running, Toy, counted, enter_long_mode, gate, needs_kvm, wait_until

from posada.errors import KvmError, StateError
from posada.kvm import MpState, System
from posada.kvm.cpustructs import Regs
from posada.kvm.structs import CpuidEntry
from posada.vmm import cpustate, vmstate

pytestmark = needs_kvm

HANDLER = bytes.fromhex("5052ff042500050000baf80300008a042500050000eebab000e0fec702000000005a5848cf")
"""Counts at 0x500, writes the count to port 0x3f8, EOI."""
APIC_ON = "bb0000e0fec783f0000000ff010000"
SPIN = bytes.fromhex("48ff042500050000ebf6")


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System.open() as opened:
        yield opened


def guest(system: System, code: bytes, **options: Any) -> Running:
    toy = Toy(system, code.ljust(0x80, b"\0") + HANDLER, long_mode=True, irqchip=True, **options)
    toy.memory.write(IDT + 0x30 * 16, gate(CODE + 0x80))
    return Running(toy)


def save(machine: Running) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    machine.vcpus.quiesce()
    return [cpustate.save(vcpu) for vcpu in machine.toy.vcpus], vmstate.save(machine.toy.vm)


def twin(system: System, machine: Running, saved: tuple[list[dict[str, Any]], dict[str, Any]]) -> Running:
    """A second vm from the state, over a copy of the memory; not yet started."""
    memory = Memory(machine.toy.memory.size)
    memory.write(0, machine.toy.memory.read(0, memory.size))
    toy = Toy(system, memory=memory, cpus=len(saved[0]), irqchip=True)
    cpustate.load_all(toy.vcpus, saved[0])
    vmstate.load(toy.vm, saved[1])
    for vcpu in toy.vcpus:
        cpustate.tell_paused(vcpu)
    return Running(toy)


def byte(machine: Running, at: int) -> int:
    return machine.toy.memory.read(at, 1)[0]


def quad(machine: Running, at: int) -> int:
    return int.from_bytes(machine.toy.memory.read(at, 8), "little")


def test_a_running_guest_goes_on_in_a_second_vm_and_both_live(system: System) -> None:
    with guest(system, SPIN) as first:
        first.vcpus.start()
        wait_until(lambda: counted(first) > 0, "the guest does not run")
        saved = save(first)
        stood = counted(first)
        with twin(system, first, saved) as second:
            again = save(second)
            for key in ("regs", "sregs", "xcrs", "debugregs", "cpuid", "events", "mp_state", "xsave", "lapic"):
                assert again[0][0][key] == saved[0][0][key], key
            for key in ("pic_master", "pic_slave", "ioapic"):
                assert again[1][key] == saved[1][key], key
            second.vcpus.start()
            wait_until(lambda: counted(second) > stood, "the twin does not run")
            assert counted(first) == stood
            first.vcpus.resume()
            wait_until(lambda: counted(first) > stood, "the first does not run on")


def test_the_vector_state_is_kept(system: System) -> None:
    """movdqu xmm7, [0x540]; wait for byte 0x510; movdqu [0x520], xmm7"""
    code = "f30f6f3c2540050000c604251805000001803c25100500000074f6f30f7f3c2520050000c604251905000001f4"
    with guest(system, bytes.fromhex(code)) as first:
        first.toy.memory.write(0x540, bytes(range(16)))
        first.vcpus.start()
        wait_until(lambda: byte(first, 0x518) == 1, "the guest does not run")
        with twin(system, first, save(first)) as second:
            second.toy.memory.write(0x510, b"\1")
            second.vcpus.start()
            wait_until(lambda: byte(second, 0x519) == 1, "the twin does not run")
            assert second.toy.memory.read(0x520, 16) == bytes(range(16))


def test_an_interrupt_on_its_way_arrives_after_the_load(system: System) -> None:
    """The guest has interrupts off while one comes; it turns them on in the second vm."""
    code = APIC_ON + "c604251805000001803c25100500000074f6fbf4ebfd"
    with guest(system, bytes.fromhex(code)) as first:
        first.vcpus.start()
        wait_until(lambda: byte(first, 0x518) == 1, "the guest does not run")
        assert first.toy.vm.signal_msi(0xFEE00000, 0x30) > 0
        with twin(system, first, save(first)) as second:
            assert byte(second, 0x500) == 0
            second.toy.memory.write(0x510, b"\1")
            second.vcpus.start()
            wait_until(lambda: second.pio.written(0x3F8) == [1], "the interrupt was lost")


def test_a_halted_guest_stays_halted_and_its_timer_goes_on(system: System) -> None:
    """The timer ticks every 20 ms: a guest in an emulated machine that is interrupted each millisecond does nothing else."""
    code = APIC_ON + "c783e00300000b000000c7832003000030000200c78380030000002d3101fbf4ebfd"
    with guest(system, bytes.fromhex(code)) as first:
        first.vcpus.start()
        wait_until(lambda: len(first.pio.log) > 2, "the timer does not tick")
        saved = save(first)
        ticks = byte(first, 0x500)
        with twin(system, first, saved) as second:
            second.vcpus.start()
            wait_until(lambda: byte(second, 0x500) > ticks + 2, "the timer does not tick in the twin")


TSC = bytes.fromhex("0f3148c1e2204809d0488904250805000048ff042500050000ebe5")
"""rdtsc to 0x508, for ever."""


def test_the_tsc_and_the_clock_never_go_backwards(system: System) -> None:
    with guest(system, TSC) as first:
        first.vcpus.start()
        wait_until(lambda: counted(first) > 3, "the guest does not run")
        saved = save(first)
        seen, clock, turns = quad(first, 0x508), saved[1]["clock"], counted(first)
        assert saved[0][0]["tsc"] >= seen
        with twin(system, first, saved) as second:
            assert second.toy.vm.get_clock().clock >= clock
            second.vcpus.start()
            wait_until(lambda: counted(second) > turns + 1, "the twin does not run")
            second.vcpus.quiesce()
            assert quad(second, 0x508) >= seen
            third = save(second)
            assert third[1]["clock"] >= clock
            rate = saved[0][0]["tsc_khz"] * 1000
            assert third[0][0]["tsc"] < saved[0][0]["tsc"] + 20 * rate


def test_smp_state_keeps_who_waits_for_what(system: System) -> None:
    """vcpu 1 was never started, vcpu 2 waits in HLT: in the second vm as in the first."""
    with guest(system, SPIN, cpus=3) as first:
        enter_long_mode(first.toy.memory, first.toy.vcpu)
        first.toy.vcpus[1].set_mp_state(MpState.UNINITIALIZED)
        first.toy.vcpus[2].set_mp_state(MpState.HALTED)
        first.vcpus.start()
        wait_until(lambda: counted(first) > 0, "the guest does not run")
        saved = save(first)
        assert [s["mp_state"] for s in saved[0]] == [0, 1, 3]
        with twin(system, first, saved) as second:
            assert [vcpu.get_mp_state() for vcpu in second.toy.vcpus] == [0, 1, 3]
            if "tsc_offset" in saved[0][0] and steady_tsc():  # elsewhere the kernel moves offsets at each change of cpu
                now = [vcpu.get_tsc_offset() for vcpu in second.toy.vcpus]
                assert len({(new - old["tsc_offset"]) % (1 << 64) for new, old in zip(now, saved[0], strict=True)}) == 1
            second.vcpus.start()
            before = counted(second)
            wait_until(lambda: counted(second) > before, "the twin does not run")


def steady_tsc() -> bool:
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    return source.exists() and source.read_text().strip() == "tsc"


@pytest.fixture(scope="module")
def sample(system: System) -> tuple[dict[str, Any], dict[str, Any]]:
    with guest(system, SPIN) as machine:
        cpus, chips = save(machine)
        return cpus[0], chips


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.__setitem__(key, value)


@pytest.mark.parametrize(
    "spoil",
    [
        *(
            drop(key)
            for key in ("version", "regs", "sregs", "xsave", "xcrs", "debugregs", "lapic", "events", "msrs", "cpuid")
        ),
        put("version", 2),
        put("mp_state", 5),
        put("mp_state", -1),
        put("regs", bytes(8)),
        put("regs", "text"),
        put("xsave", bytes(100)),
        put("cpuid", bytes(41)),
        put("cpuid", bytes(40 * 257)),
        put("msrs", bytes(15)),
        put("msrs", struct.pack("<IIQ", 0xDEAD0000, 0, 1)),
        put("tsc", -1),
        put("tsc", 1 << 64),
        put("tsc_khz", -5),
    ],
)
def test_a_spoilt_vcpu_state_is_refused(system: System, sample: Any, spoil: Callable[[dict[str, Any]], None]) -> None:
    document = copy.deepcopy(sample[0])
    spoil(document)
    toy = Toy(system, irqchip=True)
    with pytest.raises(StateError):
        cpustate.load(toy.vcpu, document)
    toy.close()


def test_state_that_the_processor_cannot_have_is_refused_by_the_kernel(system: System, sample: Any) -> None:
    toy = Toy(system, irqchip=True)
    document = sample[0] | {"xcrs": struct.pack("<IIIIQ", 1, 0, 0, 0, 0xFFFF_FFFF).ljust(len(sample[0]["xcrs"]), b"\0")}
    with pytest.raises(KvmError, match="KVM_SET_"):
        cpustate.load(toy.vcpu, document)
    with pytest.raises(StateError, match="2 vcpus"):
        cpustate.load_all(toy.vcpus, [sample[0], sample[0]])
    toy.close()


def test_an_unknown_msr_of_value_zero_is_no_fault(system: System, sample: Any) -> None:
    toy = Toy(system, irqchip=True)
    cpustate.load(toy.vcpu, sample[0] | {"msrs": sample[0]["msrs"] + struct.pack("<IIQ", 0xDEAD0000, 0, 0)})
    regs = Regs.from_buffer_copy(sample[0]["regs"])
    assert toy.vcpu.get_regs().rip == regs.rip
    toy.close()


@pytest.mark.parametrize(
    "spoil", [drop("clock"), put("clock", -1), put("clock", 1 << 63), drop("ioapic"), put("pit", b"")]
)
def test_a_spoilt_chip_state_is_refused(system: System, sample: Any, spoil: Callable[[dict[str, Any]], None]) -> None:
    document = copy.deepcopy(sample[1])
    spoil(document)
    toy = Toy(system, irqchip=True)
    with pytest.raises(StateError):
        vmstate.load(toy.vm, document)
    toy.close()


def test_the_chips_number_is_ours_not_the_documents(system: System, sample: Any) -> None:
    document = sample[1] | {"ioapic": struct.pack("<I", 77) + sample[1]["ioapic"][4:]}
    toy = Toy(system, irqchip=True)
    vmstate.load(toy.vm, document)
    toy.close()


def test_a_machine_without_chips_is_saved_without_them(system: System) -> None:
    toy = Toy(system, b"\xf4")
    state = cpustate.save(toy.vcpu)
    assert "lapic" not in state
    chips = vmstate.save(toy.vm)
    assert set(chips) == {"version", "clock"}
    other = Toy(system, memory=toy.memory)
    cpustate.load(other.vcpu, state)
    vmstate.load(other.vm, chips)
    assert other.vcpu.run() == 5
    toy.close()
    other.close()


def test_saved_cpuid_is_readable(sample: Any) -> None:
    entries = cpustate.saved_cpuid(sample[0])
    assert all(isinstance(entry, CpuidEntry) for entry in entries)
    assert entries[0].function == 0
