"""posada.kvm on /dev/kvm, with guests of a few instructions."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest
from kvm_kit import CODE, IDT, Memory, Toy, gate, has_hardware_breakpoints, needs_kvm

from posada.errors import KvmError
from posada.kvm import Cap, Chip, ChipRoute, Exit, GuestDebug, MemFlag, MpState, MsiRoute, System, Vcpu
from posada.kvm.dirty import DirtyRing
from posada.kvm.exits import DebugExit
from posada.kvm.report import report

pytestmark = needs_kvm


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System.open() as opened:
        yield opened


def test_the_system_says_what_it_can(system: System) -> None:
    assert system.api_version == 12
    assert system.check(Cap.USER_MEMORY) == 1
    assert system.vcpu_mmap_size >= 8192
    assert {entry.function for entry in system.supported_cpuid()} >= {0, 1, 7, 0x80000001}
    assert 0x10 in system.msr_indices()
    assert isinstance(system.feature_msr_indices(), list)


def test_what_is_not_kvm_is_refused() -> None:
    with pytest.raises(KvmError, match=r"KVM_GET_API_VERSION failed \(ENOTTY\)"), open(os.devnull) as null:
        System(null.fileno())
    with pytest.raises(KvmError, match="/nowhere"):
        System.open("/nowhere")


def test_port_io_of_each_width(system: System) -> None:
    """out dx, al; in al, dx; in ax, 0x40; in eax, dx; each result stored."""
    toy = Toy(system, bytes.fromhex("baf803b041eeeca20005e540a3020566ed66a30405f4"))
    run, io = toy.vcpu.run, toy.vcpu.io_exit
    assert run() == Exit.IO
    assert (io()[:4], bytes(io().data)) == ((True, 0x3F8, 1, 1), b"A")
    for port, answer in ((0x3F8, b"Z"), (0x40, b"\x34\x12"), (0x3F8, b"\x78\x56\x34\x12")):
        assert run() == Exit.IO
        assert io()[:4] == (False, port, len(answer), 1)
        io().data[:] = answer
    assert run() == Exit.HLT
    assert toy.memory.read(0x500, 8) == b"Z\0\x34\x12\x78\x56\x34\x12"
    toy.close()


def test_string_io_moves_every_item(system: System) -> None:
    """rep outsb of five bytes to 0x3f8; rep insw of four words from 0x1f0."""
    toy = Toy(system, bytes.fromhex("fcbaf803be0006b90500f36ebaf001bf0007b90400f36df4"))
    toy.memory.write(0x600, b"hello")
    sent, words = b"", [b"ab", b"cd", b"ef", b"gh"]
    while toy.vcpu.run() == Exit.IO:
        write, port, size, repeat, data = toy.vcpu.io_exit()
        assert len(data) == size * repeat
        if write:
            sent += bytes(data)
        else:
            assert (port, size) == (0x1F0, 2)
            data[:] = b"".join(words[:repeat])
            del words[:repeat]
    assert (sent, words) == (b"hello", [])
    assert toy.memory.read(0x700, 8) == b"abcdefgh"
    toy.close()


def test_mmio_in_long_mode(system: System) -> None:
    """32-bit write and read at 0xd0000000, then 8-bit and 64-bit ones."""
    code = "bb000000d0c703443322118b430489042500050000884310"
    code += "48b9887766554433221148894b20488b53284889142508050000f4"
    toy = Toy(system, bytes.fromhex(code), long_mode=True)
    seen = []
    while toy.vcpu.run() == Exit.MMIO:
        write, address, data = toy.vcpu.mmio_exit()
        seen.append((write, address, bytes(data) if write else len(data)))
        if not write:
            data[:] = bytes(range(0xA0, 0xA0 + len(data)))
    assert seen == [
        (True, 0xD0000000, b"\x44\x33\x22\x11"),
        (False, 0xD0000004, 4),
        (True, 0xD0000010, b"\xa0"),
        (True, 0xD0000020, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
        (False, 0xD0000028, 8),
    ]
    assert toy.memory.read(0x500, 16) == b"\xa0\xa1\xa2\xa3\0\0\0\0\xa0\xa1\xa2\xa3\xa4\xa5\xa6\xa7"
    toy.close()


INTERRUPTED = bytes.fromhex("bb0000e0fec783f0000000ff010000fbf4ebfd").ljust(0x80, b"\0") + bytes.fromhex(
    "5052ff042500050000baf80300008a042500050000eebab000e0fec702000000005a5848cf"
)
"""Turn the local APIC on, sti, hlt for ever; the handler at +0x80 counts at 0x500, writes the count to 0x3f8, EOI."""


def interrupted_toy(system: System) -> Toy:
    toy = Toy(system, INTERRUPTED, irqchip=True, long_mode=True)
    toy.memory.write(IDT + 0x30 * 16, gate(CODE + 0x80))
    apic_on(toy.vcpu)
    return toy


def apic_on(vcpu: Vcpu) -> None:
    """Before the guest does it itself: an interrupt that comes earlier than that waits, and is not lost."""
    lapic = vcpu.get_lapic()
    lapic.regs[0xF0:0xF2] = [0xFF, 0x01]
    vcpu.set_lapic(lapic)


def test_irqfd_wakes_a_halted_guest(system: System) -> None:
    toy = interrupted_toy(system)
    toy.vm.set_gsi_routing([MsiRoute(5, 0xFEE00000, 0x30)])
    event = os.eventfd(0)
    toy.vm.irqfd(event, 5)
    for count in (1, 2, 3):
        threading.Timer(0.01, os.eventfd_write, (event, 1)).start()  # while KVM_RUN waits in HLT
        assert toy.vcpu.run() == Exit.IO
        assert bytes(toy.vcpu.io_exit().data) == bytes([count])
    toy.vm.irqfd(event, 5, assign=False)
    os.close(event)
    toy.close()


def test_interrupts_by_line_and_by_message(system: System) -> None:
    toy = interrupted_toy(system)
    toy.vm.set_gsi_routing([ChipRoute(7, Chip.IOAPIC, 9)])
    ioapic = toy.vm.get_irqchip(Chip.IOAPIC)
    at = 24 + 9 * 8  # struct kvm_ioapic_state: redirtbl
    ioapic.chip[at : at + 8] = list((0x30).to_bytes(8, "little"))  # vector 0x30, edge, physical, to APIC 0, unmasked
    toy.vm.set_irqchip(ioapic)
    vcpu = toy.vcpu

    def interrupted() -> int:
        assert vcpu.run() == Exit.IO
        return vcpu.io_exit().data[0]

    toy.vm.irq_line(7, 1)
    toy.vm.irq_line(7, 0)
    assert interrupted() == 1
    assert toy.vm.signal_msi(0xFEE00000, 0x30) > 0
    assert interrupted() == 2
    toy.close()


def test_ioeventfd_takes_a_write_without_an_exit(system: System) -> None:
    """Two MMIO writes: one that matches the ioeventfd's value, one that does not."""
    code = bytes.fromhex("bb000000d066c74350010066c743500200f4")  # mov word [rbx+0x50], 1 ; 2
    toy = Toy(system, code, long_mode=True)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    toy.vm.ioeventfd(event, 0xD0000050, 2, datamatch=1)
    assert toy.vcpu.run() == Exit.MMIO
    assert bytes(toy.vcpu.mmio_exit().data) == b"\x02\0"
    assert os.eventfd_read(event) == 1
    assert toy.vcpu.run() == Exit.HLT
    toy.vm.ioeventfd(event, 0xD0000050, 2, datamatch=1, assign=False)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD.*0xd0000050"):
        toy.vm.ioeventfd(event, 0xD0000050, 2, datamatch=1, assign=False)
    assert not select.select([event], [], [], 0)[0]
    os.close(event)
    toy.close()


def test_ioeventfd_on_a_port(system: System) -> None:
    toy = Toy(system, bytes.fromhex("baf803b041eef4"))
    event = os.eventfd(0, os.EFD_NONBLOCK)
    toy.vm.ioeventfd(event, 0x3F8, 1, pio=True)
    assert toy.vcpu.run() == Exit.HLT
    assert os.eventfd_read(event) == 1
    os.close(event)
    toy.close()


def test_split_irqchip(system: System) -> None:
    toy = Toy(system, INTERRUPTED, long_mode=True, before_vcpus=lambda vm: vm.create_split_irqchip(24))
    toy.memory.write(IDT + 0x30 * 16, gate(CODE + 0x80))
    assert toy.vcpu.has_lapic
    apic_on(toy.vcpu)
    threading.Timer(0.01, toy.vm.signal_msi, (0xFEE00000, 0x30)).start()
    assert toy.vcpu.run() == Exit.IO
    assert toy.vcpu.io_exit().data[0] == 1
    toy.close()


def pages(bitmap: bytes) -> set[int]:
    return {i * 8 + bit for i, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


TOUCHES = bytes.fromhex("c604250000020001c604250050030001f4")
"""mov byte [0x20000], 1; mov byte [0x35000], 1; hlt"""


def test_the_dirty_log_names_the_pages_written(system: System) -> None:
    toy = Toy(system, TOUCHES, long_mode=True, flags=MemFlag.LOG_DIRTY_PAGES)
    assert toy.vcpu.run() == Exit.HLT
    assert pages(toy.vm.dirty_log(0)) >= {0x20, 0x35}
    assert not pages(toy.vm.dirty_log(0))
    regs = toy.vcpu.get_regs()
    regs.rip = CODE
    toy.vcpu.set_regs(regs)
    assert toy.vcpu.run() == Exit.HLT
    tables = {4, 5, 6, 7}  # their accessed bits, where the processor walks them itself
    assert pages(toy.vm.dirty_log(0)) - tables == {0x20, 0x35}
    toy.vm.set_memory(0, 0, 0, 0)
    assert toy.vm.dirty_log(0) == b""
    toy.close()


def test_dirty_pages_are_cleared_by_hand(system: System) -> None:
    if not system.check(Cap.MANUAL_DIRTY_LOG_PROTECT2):
        pytest.skip("this kernel has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    toy = Toy(
        system, TOUCHES, long_mode=True, flags=MemFlag.LOG_DIRTY_PAGES,
        before_vcpus=lambda vm: vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1),
    )  # fmt: skip
    assert toy.vcpu.run() == Exit.HLT
    log = toy.vm.dirty_log(0)
    assert pages(log) >= {0x20, 0x35}
    assert toy.vm.dirty_log(0) == log
    toy.vm.clear_dirty_log(0, 0, toy.memory.size // 4096, log)
    assert not pages(toy.vm.dirty_log(0))
    with pytest.raises(ValueError, match="too short"):
        toy.vm.clear_dirty_log(0, 0, toy.memory.size // 4096, log[:-8])
    toy.close()


def test_the_dirty_ring_names_them_in_order(system: System) -> None:
    if not system.check(Cap.DIRTY_LOG_RING):
        pytest.skip("this kernel has no KVM_CAP_DIRTY_LOG_RING")
    toy = Toy(
        system, TOUCHES, long_mode=True, flags=MemFlag.LOG_DIRTY_PAGES,
        before_vcpus=lambda vm: vm.enable_dirty_ring(1024),
    )  # fmt: skip
    ring = DirtyRing(toy.vcpu, 1024)
    for _ in range(3):
        assert toy.vcpu.run() == Exit.HLT
        found = ring.harvest()
        assert [page for page in found if page[1] in (0x20, 0x35)] == [(0, 0x20), (0, 0x35)]
        assert toy.vm.reset_dirty_rings() == len(found)
        assert ring.harvest() == []
        regs = toy.vcpu.get_regs()
        regs.rip = CODE
        toy.vcpu.set_regs(regs)
    ring.close()
    toy.close()


def test_a_read_only_slot_makes_writes_exits(system: System) -> None:
    toy = Toy(system, TOUCHES, long_mode=True, size=0x20000)
    rom = Memory(0x20000)
    toy.vm.set_memory(1, 0x20000, rom.size, rom.address, MemFlag.READONLY)
    assert toy.vcpu.run() == Exit.MMIO
    assert toy.vcpu.mmio_exit()[:2] == (True, 0x20000)
    toy.close()


def test_single_step(system: System) -> None:
    toy = Toy(system, TOUCHES, long_mode=True)
    toy.vcpu.set_guest_debug(GuestDebug.ENABLE | GuestDebug.SINGLESTEP)
    for done in (8, 16):
        assert toy.vcpu.run() == Exit.DEBUG
        what = toy.vcpu.exit()
        assert isinstance(what, DebugExit)
        assert (what.exception, what.pc) == (1, CODE + done)
    toy.close()


def test_hardware_breakpoints(system: System) -> None:
    if not has_hardware_breakpoints(system):
        pytest.skip("this processor has no hardware breakpoints for guests (QEMU's emulated SVM)")
    toy = Toy(system, TOUCHES, long_mode=True)
    for place in (CODE + 8, CODE + 16):
        toy.vcpu.set_guest_debug(GuestDebug.ENABLE | GuestDebug.USE_HW_BP, [place, 0, 0, 0, 0, 0, 0, 0x402])
        assert toy.vcpu.run() == Exit.DEBUG
        assert toy.vcpu.get_regs().rip == place
    toy.close()


def test_a_triple_fault_is_reported_with_the_bytes_at_rip(system: System) -> None:
    """ud2 without handlers: SHUTDOWN, or an internal error on a host that gives up earlier. AMD resets the registers."""
    toy = Toy(system, bytes.fromhex("48c7c0341200000f0b"), long_mode=True)
    assert toy.vcpu.run() in (Exit.SHUTDOWN, Exit.INTERNAL_ERROR)
    text = report(toy.vcpu, toy.memory)
    assert text.startswith("vcpu 0: ")
    assert "code at" in text
    toy.close()


def test_an_internal_error_says_what_could_not_be_emulated(system: System) -> None:
    """Code in unmapped memory cannot be fetched: KVM gives up with INTERNAL_ERROR, or returns all ones by MMIO."""
    toy = Toy(system, b"", long_mode=True)
    regs = toy.vcpu.get_regs()
    regs.rip, regs.rax = 0xD0000000, 0xFEEDFACE
    toy.vcpu.set_regs(regs)
    reason = toy.vcpu.run()
    assert reason == Exit.INTERNAL_ERROR
    text = report(toy.vcpu, toy.memory)
    assert "INTERNAL_ERROR" in text
    assert "cr3 0000000000004000" in text
    assert "64-bit" in text
    assert "00000000feedface" in text
    assert "code at 0xd0000000" in text
    toy.close()


def test_state_of_every_kind_comes_back_as_it_was_set(system: System) -> None:
    toy = Toy(system, b"\xf4", irqchip=True, long_mode=True)
    vcpu = toy.vcpu
    for name in ("regs", "sregs", "fpu", "xcrs", "lapic", "vcpu_events", "debugregs"):
        state = getattr(vcpu, f"get_{name}")()
        getattr(vcpu, f"set_{name}")(state)
        assert bytes(getattr(vcpu, f"get_{name}")()) == bytes(state), name
    xsave = vcpu.get_xsave()
    vcpu.set_xsave(xsave)
    assert vcpu.get_xsave() == xsave
    with pytest.raises(ValueError, match="XSAVE area of 100 bytes"):
        vcpu.set_xsave(bytearray(100))
    assert vcpu.get_mp_state() == MpState.RUNNABLE
    vcpu.set_mp_state(MpState.HALTED)
    assert vcpu.get_mp_state() == MpState.HALTED
    assert vcpu.set_msrs({0x174: 8, 0xC0000082: 0xFFFF800000001000}) == 2
    assert vcpu.get_msrs([0x174, 0xC0000082]) == {0x174: 8, 0xC0000082: 0xFFFF800000001000}
    assert vcpu.get_tsc_khz() > 100_000
    pit = toy.vm.get_pit()
    toy.vm.set_pit(pit)
    clock = toy.vm.get_clock()
    clock.clock, clock.flags = 10**15, 0
    toy.vm.set_clock(clock)
    assert 10**15 <= toy.vm.get_clock().clock < 10**15 + 10**10
    assert [entry.function for entry in vcpu.get_cpuid()] == [entry.function for entry in system.supported_cpuid()]
    vcpu.nmi()
    assert vcpu.get_vcpu_events().nmi_pending or vcpu.get_vcpu_events().nmi_injected
    toy.close()


def test_errors_name_the_request(system: System) -> None:
    toy = Toy(system, b"\xf4")
    with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU failed \(EEXIST\)"):
        toy.vm.create_vcpu(0)
    with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION.*slot 1, 0x1000 bytes at 0x5"):
        toy.vm.set_memory(1, 5, 4096, toy.memory.address)
    with pytest.raises(KvmError, match="KVM_IRQFD"):
        toy.vm.irqfd(0, 5)
    toy.vm.set_tss_addr(0xFFFBD000)
    toy.close()
    toy.close()
    with pytest.raises(ValueError, match="descriptor"):
        toy.vm.get_clock()
