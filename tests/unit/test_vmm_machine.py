"""Whole machines on /dev/kvm: toy kernels that enter as Linux does, print, and power off. And the machine's states."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from kvm_kit import needs_kvm
from tests.unit.vmm_kernels import bzimage, elf, file

from posada.errors import EngineError, StateError
from posada.kvm.cpustructs import Regs
from posada.vmm import layout
from posada.vmm.builder import build
from posada.vmm.config import ConsoleConfig, DiskConfig, MonitorConfig
from posada.vmm.legacy import power
from posada.vmm.machine import Machine, State

pytestmark = needs_kvm

MIB = 1 << 20

# 32-bit: print "P" if EBX points at the start info's magic, then power off.
PVH = bytes.fromhex(
    "813b78c56e33"  # cmp dword [ebx], 0x336ec578
    "7507"  # jne off
    "66baf803"  # mov dx, 0x3f8
    "b050"  # mov al, 'P'
    "ee"  # out dx, al
    "66ba0106"  # off: mov dx, 0x601
    "b034"  # mov al, S5 and enable
    "ee"  # out dx, al
    "f4ebfd"  # hlt; jmp
)
# 64-bit: print "L" if RSI points at a zero page with the header's magic, then reset.
LINUX64 = bytes.fromhex(
    "81be0202000048647253"  # cmp dword [rsi+0x202], "HdrS"
    "7507"  # jne reset
    "66baf803"  # mov dx, 0x3f8
    "b04c"  # mov al, 'L'
    "ee"  # out dx, al
    "66ba0306"  # reset: mov dx, 0x603
    "b001"  # mov al, 1
    "ee"  # out dx, al
    "f4ebfd"  # hlt; jmp
)
SPIN = bytes.fromhex("fbebfe")  # sti; jmp to itself
TRIPLE_FAULT = bytes.fromhex("0f0b")  # ud2, and there is no IDT


class Host:
    """Files a machine is given, and what is in them at the end."""

    def __init__(self) -> None:
        self.exit = file(b"")
        self.log = file(b"")
        self.machines: list[Machine] = []

    def build(self, kernel: bytes, **changes: Any) -> Machine:
        config = MonitorConfig(
            uuid="",
            name="toy",
            cpus=1,
            memory=16 * MIB,
            kvm=os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC),
            exit=self.exit,
            kernel=file(kernel),
            console=ConsoleConfig(log=self.log),
        )
        self.machines.append(build(replace(config, **changes)))
        return self.machines[-1]

    def run(self, kernel: bytes, **changes: Any) -> tuple[str, str]:
        """(what it printed, how it ended)."""
        machine = self.build(kernel, **changes)
        machine.loop.timer(20, lambda: machine.end("timed out"))
        machine.start()
        machine.loop.run()
        machine.close()
        assert machine.state is State.CLOSED
        return os.pread(self.log, 1000, 0).decode(), self.ended()["reason"]

    def ended(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(os.pread(self.exit, 10000, 0))
        return record


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    for machine in made.machines:
        machine.close()


def test_pvh_kernel(host: Host) -> None:
    assert host.run(elf(PVH)) == ("P", "guest powered off")
    assert host.ended()["crashed"] is False


def test_bzimage(host: Host) -> None:
    assert host.run(bzimage(LINUX64)) == ("L", "guest rebooted")


def test_elf_kernel_by_the_64_bit_protocol(host: Host) -> None:
    assert host.run(elf(LINUX64, pvh=False)) == ("L", "guest rebooted")


def test_memory_beyond_the_gap_and_many_vcpus(host: Host) -> None:
    assert host.run(elf(PVH), memory=5 << 30, cpus=4) == ("P", "guest powered off")


def test_the_reset_vector_resets(host: Host) -> None:
    """As a jump to a PC's BIOS finds it: real mode, F000:FFF0."""
    machine = host.build(elf(SPIN))
    vcpu = machine.vcpus.threads[0].vcpu
    with machine.system.create_vm() as vm, vm.create_vcpu(0) as untouched:
        sregs = untouched.get_sregs()
    sregs.cs.base, sregs.cs.selector, sregs.apic_base = 0xF_0000, 0xF000, vcpu.get_sregs().apic_base
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=0xFFF0, rflags=2))
    machine.start()
    machine.loop.run()
    machine.close()
    assert machine.vcpus.threads[0].counts()["IO"] == 1
    assert host.ended()["reason"] == "guest rebooted"


def test_a_triple_fault_is_a_reset(host: Host) -> None:
    assert host.run(elf(TRIPLE_FAULT))[1] == "guest rebooted"


def test_states(host: Host) -> None:
    machine = host.build(elf(SPIN))
    with pytest.raises(EngineError, match="cannot pause a machine that is built"):
        machine.pause()
    machine.start(paused=True)
    assert machine.state is State.PAUSED
    machine.resume()
    machine.resume()
    assert machine.state is State.RUNNING
    with pytest.raises(EngineError):
        machine.save()
    with pytest.raises(EngineError):
        machine.start()
    machine.pause()
    machine.pause()
    assert machine.state is State.PAUSED
    machine.end("enough")
    machine.close()
    machine.close()
    with pytest.raises(EngineError):
        machine.resume()
    assert host.ended()["reason"] == "enough"


def test_state_goes_from_one_machine_to_another(host: Host) -> None:
    disk = DiskConfig("root", MIB, ((file(bytes(MIB)), "raw"),))
    machine = host.build(elf(SPIN), disks=(disk,))
    machine.start()
    machine.pause()
    machine.powerdown()
    saved = machine.save()
    other_disk = DiskConfig("root", MIB, ((file(bytes(MIB)), "raw"),))
    other = host.build(elf(SPIN), disks=(other_disk,))
    other.load(saved)
    assert other.power.read(power.EVENTS, 1) == 1
    assert bytes(other.vcpus.threads[0].vcpu.get_regs()) == bytes(machine.vcpus.threads[0].vcpu.get_regs())
    with pytest.raises(StateError, match="disk:root"):
        host.build(elf(SPIN)).load(saved)
    for key in saved:
        with pytest.raises(StateError):
            other.load({**saved, key: None})


def test_a_new_generation_is_announced(host: Host) -> None:
    machine = host.build(elf(SPIN), generation_id="00112233-4455-6677-8899-aabbccddeeff")
    assert machine.memory.read(layout.VMGENID, 4).hex() == "33221100"
    machine.new_generation("ffeeddcc-bbaa-9988-7766-554433221100")
    assert machine.memory.read(layout.VMGENID, 4).hex() == "ccddeeff"
    assert machine.power.read(power.EVENTS, 1) == 2


def test_a_device_that_fails_ends_the_machine_with_its_reason(host: Host) -> None:
    machine = host.build(elf(PVH))
    machine.serial.write = lambda *_: 1 // 0  # type: ignore[method-assign, assignment]
    machine.start()
    machine.loop.run()
    machine.close()
    assert host.ended()["crashed"] is True and "division" in host.ended()["reason"]
    assert "ZeroDivisionError" in host.ended()["stderr"]
