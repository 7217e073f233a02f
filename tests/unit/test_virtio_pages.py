"""Registers as read-only memory, on /dev/kvm: a guest reads and acknowledges its interrupts without an exit to us."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from kvm_kit import Toy, needs_kvm

from posada.kvm import System, Vm
from posada.kvm.numbers import Cap, Exit, MemFlag
from posada.vmm.loop import Loop
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.mmio import SIZE, MmioTransport, Register
from posada.vmm.virtio.pages import ACKNOWLEDGE, USED_BUFFER, RegisterPages
from posada.vmm.virtio.rng import Rng

BASE = 0xD000_0000
TURNS = 3
CODE = bytes.fromhex(
    "bb000000d0"  # mov ebx, BASE
    f"b9{TURNS:02x}000000"  # mov ecx, TURNS
    "8b4360"  # again: mov eax, [rbx + INTERRUPT_STATUS]
    "894364"  # mov [rbx + INTERRUPT_ACK], eax
    "ffc9"  # dec ecx
    "75f6"  # jnz again
    "8b13"  # mov edx, [rbx + MAGIC]
    "f4"  # hlt
)

pytestmark = needs_kvm


@pytest.fixture
def swallowed() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def guest(swallowed: int) -> Iterator[tuple[Toy, MmioTransport]]:
    system = System.open()
    if not system.check(Cap.READONLY_MEM):
        pytest.skip("this kernel has no read-only guest memory")
    pages = RegisterPages(2)
    loop = Loop()
    transport = MmioTransport(Rng(), GuestMemory.anonymous(1 << 20), lambda: None, loop, pages.page(0))

    def add_registers(vm: Vm) -> None:
        vm.set_memory(8, BASE, 2 * SIZE, pages.address, MemFlag.READONLY)
        vm.ioeventfd(swallowed, BASE + ACKNOWLEDGE, 4, datamatch=USED_BUFFER)

    toy = Toy(system, CODE, long_mode=True, before_vcpus=add_registers)
    yield toy, transport
    toy.close()
    loop.close()


def test_the_usual_interrupt(guest: tuple[Toy, MmioTransport], swallowed: int) -> None:
    toy, transport = guest
    transport.interrupt_used()
    assert toy.vcpu.run() == Exit.HLT
    regs = toy.vcpu.get_regs()
    assert (regs.rax, regs.rdx.to_bytes(4, sys.byteorder)) == (USED_BUFFER, b"virt")
    assert os.eventfd_read(swallowed) == TURNS


def test_a_change_of_the_configuration_is_acknowledged_to_us(guest: tuple[Toy, MmioTransport], swallowed: int) -> None:
    toy, transport = guest
    transport.status |= 4  # DRIVER_OK
    transport.interrupt_used()
    transport.interrupt_config()
    assert toy.vcpu.run() == Exit.MMIO
    access = toy.vcpu.mmio_exit()
    assert access.write
    assert access.address == BASE + Register.INTERRUPT_ACK
    transport.write(Register.INTERRUPT_ACK, 4, int.from_bytes(access.data, sys.byteorder))
    for _ in range(TURNS - 1):  # from here on the guest reads 0, and acknowledges nothing
        assert toy.vcpu.run() == Exit.MMIO
        assert not any(toy.vcpu.mmio_exit().data)
    assert toy.vcpu.run() == Exit.HLT
    assert toy.vcpu.get_regs().rax == 0
