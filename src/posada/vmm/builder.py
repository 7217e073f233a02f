"""How a machine is made. `build` is the recipe; each step is one function below it.

Read `posada.vmm.layout` for where things are. Slots of memory come before the irqchip: the other order costs
milliseconds on some hosts. The order of devices is part of the saved state's format.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from posada.errors import SpecError
from posada.kvm.numbers import Cap, MemFlag
from posada.kvm.system import System
from posada.runtime.console import Console, DescriptorLog
from posada.vmm import jail, layout
from posada.vmm.acpi import dsdt, tables
from posada.vmm.block.chain import open_chain
from posada.vmm.boot import cpu
from posada.vmm.boot.load import load
from posada.vmm.bus import Ignore
from posada.vmm.config import MonitorConfig
from posada.vmm.cpuid import guest_cpuid
from posada.vmm.irq import Line
from posada.vmm.legacy import power
from posada.vmm.legacy.power import KeyboardReset, PowerRegisters
from posada.vmm.legacy.serial import Serial
from posada.vmm.life import Life
from posada.vmm.loop import Loop
from posada.vmm.machine import Machine, Slot, new_kick
from posada.vmm.memory import GuestMemory
from posada.vmm.net import open_backend
from posada.vmm.vcpu import Vcpus, VcpuThread
from posada.vmm.virtio.balloon import Balloon
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.fs import Fs
from posada.vmm.virtio.mmio import MmioTransport
from posada.vmm.virtio.net import Net
from posada.vmm.virtio.pages import RegisterPages
from posada.vmm.virtio.rng import Rng
from posada.vmm.virtio.spare import Bay
from posada.vmm.virtio.vsock.device import Vsock

CONSOLE_LOG_MAX = 1 << 20
"""Bytes of console log before it rotates (`posada.engine.base.CONSOLE_LOG_MAX`)."""
MAX_SLOTS = 48
REGISTERS = 8
"""Memory slot of the virtio devices' registers (`posada.vmm.virtio.pages`); RAM takes those from 0 on."""
MTRR_DEF_TYPE, MTRR_WRITE_BACK = 0x2FF, 0x806
"""Firmware's job: all memory is write-back. Without it Linux does without PAT."""


def build(config: MonitorConfig) -> Machine:
    """A machine that is ready to start at its kernel's first instruction.

    Raises KvmError, ImageError (a boot file), SpecError (the command line, too many devices), OSError. What was opened
    until then the process's end closes.
    """
    machine = prepare(config, GuestMemory.anonymous(config.memory, config.hugepages))
    rsdp = write_firmware(machine)
    entry = load(machine.memory, config.kernel, config.initrd, config.append, rsdp)
    wire(machine)
    cpu.set_entry(machine.vcpus.threads[0].vcpu, entry)
    return machine


def prepare(config: MonitorConfig, memory: GuestMemory) -> Machine:
    """The parts that are Python's: memory, loop, buses, devices. A restore begins with this too."""
    machine = Machine(config, System(config.kvm), Loop(), memory)
    machine.registers = RegisterPages(MAX_SLOTS)
    add_console(machine)
    add_power(machine)
    add_clock(machine)
    for name, device in devices(config):
        add_virtio(machine, name, device)
    return machine


def wire(machine: Machine) -> None:
    """The parts that are KVM's: a vm over the machine's memory, its vcpus, interrupts and kicks. A fork does it again."""
    vm = machine.vm = machine.system.create_vm()
    for slot, region in enumerate(machine.memory.regions):
        vm.set_memory(slot, region.base, region.size, region.address)
    if machine.slots and machine.system.check(Cap.READONLY_MEM):
        size = len(machine.slots) * layout.VIRTIO_MMIO_SIZE
        vm.set_memory(REGISTERS, layout.VIRTIO_MMIO, size, machine.registers.address, MemFlag.READONLY)
    vm.set_identity_map_addr(layout.IDENTITY_MAP)
    vm.set_tss_addr(layout.TSS)
    vm.create_irqchip()
    machine.connect()
    threads = []
    begin = partial(jail.lock_vcpu, machine.config.jail)
    supported = machine.system.supported_cpuid()
    deadline = bool(machine.system.check(Cap.TSC_DEADLINE_TIMER))
    for index in range(machine.config.cpus):
        vcpu = vm.create_vcpu(index)
        vcpu.set_cpuid(guest_cpuid(supported, index, machine.config.cpus, tsc_deadline=deadline))
        vcpu.set_msrs({MTRR_DEF_TYPE: MTRR_WRITE_BACK})
        threads.append(VcpuThread(vcpu, index, machine.pio, machine.mmio, machine.loop.lock, machine.exited, begin))
    machine.vcpus = Vcpus(threads)


def devices(config: MonitorConfig) -> Iterator[tuple[str, Device]]:
    """Every virtio device and its name, in the order of its address."""
    yield "rng", Rng()
    yield "balloon", Balloon()
    if config.vsock is not None:
        yield "vsock", Vsock(config.vsock.cid, config.vsock.listeners, config.vsock.connect)
    for disk in config.disks:
        if disk.bay < 0:
            yield disk.device, Blk(open_chain(disk.chain, disk.size, disk.readonly), disk.name)
    inserted = {disk.bay: disk for disk in config.disks if disk.bay >= 0}
    for index in range(config.bays):
        there = inserted.get(index)
        opened = open_chain(there.chain, there.size, there.readonly) if there is not None else None
        yield f"bay:{index}", Bay(opened, there.name if there is not None else "")
    for index, nic in enumerate(config.nics):
        yield f"nic:{index}", Net(nic.mac, open_backend(nic.kind.value, nic.fd), mtu=nic.mtu)
    for folder in config.folders:
        yield folder.tag, Fs(folder.tag, folder.fd)


def add_console(machine: Machine) -> None:
    """COM1, its clients and log, and what ties the machine to its host."""
    config, loop = machine.config, machine.loop
    log = DescriptorLog(config.console.log, config.console.log_old, CONSOLE_LOG_MAX)
    line = machine.lines["serial"] = Line(layout.COM1_GSI)
    machine.console = Console(loop, config.console.listener, log, lambda typed: machine.serial.feed(typed))
    machine.serial = Serial(loop, line, machine.console.output)
    machine.pio.add(layout.COM1_PORT, 8, machine.serial)
    machine.life = Life(loop, config.life, config.exit, machine.console, machine.pause)


def add_power(machine: Machine) -> None:
    """The power button, power off, reset, and the ports that guests write to for no effect."""
    line = machine.lines["power"] = Line(layout.EVENT_GSI)
    machine.power = PowerRegisters(line, machine.powered_off, machine.reset)
    machine.pio.add(layout.EVENT_PORT, power.SIZE, machine.power)
    machine.pio.add(layout.KEYBOARD_PORT, 1, KeyboardReset(machine.reset))
    machine.pio.add(layout.POST_PORT, 1, Ignore())


def add_clock(machine: Machine) -> None:
    machine.pio.add(layout.RTC_PORT, 2, machine.rtc)


def add_virtio(machine: Machine, name: str, device: Device) -> None:
    """Put ``device`` behind a transport in the next slot. Raises SpecError when there is none left."""
    index = len(machine.slots)
    if index >= MAX_SLOTS or name in machine.slots:
        raise SpecError("", f"{name!r} is there already, or one device more than {MAX_SLOTS}")
    device.name = name
    address = layout.VIRTIO_MMIO + index * layout.VIRTIO_MMIO_SIZE
    line = Line(layout.VIRTIO_GSIS[index % len(layout.VIRTIO_GSIS)])
    page = machine.registers.page(index)
    slot = Slot(MmioTransport(device, machine.memory, line, machine.loop, page), address, line)
    for queue in range(len(device.queue_sizes)):
        slot.kicks.append(new_kick())
        slot.transport.watch_kicks(queue, slot.kicks[queue])
    machine.slots[name] = slot
    machine.mmio.add(address, layout.VIRTIO_MMIO_SIZE, slot.transport)


def write_firmware(machine: Machine) -> int:
    """What firmware would leave in memory: ACPI tables, generation ID, reset vector. Returns the RSDP's address."""
    transports = [dsdt.Transport(slot.address, slot.line.gsi) for slot in machine.slots.values()]
    machine.memory.write(layout.ACPI_TABLES, tables.build(machine.config.cpus, transports))
    machine.memory.write(layout.VMGENID, tables.generation_bytes(machine.config.generation_id))
    machine.memory.write(layout.RESET_VECTOR, power.reset_code(layout.EVENT_PORT + power.RESET))
    return layout.ACPI_TABLES
