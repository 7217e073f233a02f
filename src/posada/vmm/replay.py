"""The kernel's part of a machine as requests recorded beforehand, so that a forked child only has to repeat them.

A child's first milliseconds are page faults: what the interpreter touches it must copy. Making a vm through
`posada.vmm.builder.wire` and `Machine.load` touches some 300 pages, this about 50, for the same ioctls: it is one
function over plain tuples, and what it does for the first time is little. What the requests are, and the order of saving
and loading, are `posada.vmm.cpustate`'s and `vmstate`'s; a test compares the outcomes.

`record` while the vcpus stand still; the buffers are then what a forked child `play`s into a new vm, and what an
in-place reset puts back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import addressof, c_uint64, sizeof
from fcntl import ioctl
from typing import NamedTuple

from posada.errors import KvmError
from posada.kvm import cpustructs as cs
from posada.kvm import numbers
from posada.kvm.call import call_long, failure
from posada.kvm.numbers import Chip, Ioctl, MemFlag
from posada.kvm.structs import ClockData, CpuidHead, DeviceAttr, IrqChip, MemoryRegion
from posada.kvm.system import System
from posada.kvm.vcpu import Vcpu
from posada.kvm.vm import Vm
from posada.vmm import layout
from posada.vmm.cpustate import HYPERV_MSRS, MSR_TSC

# Plain integers: a member of an enum is looked up through its class, at some pages each.
_CREATE_VM, _CREATE_IRQCHIP, _CREATE_VCPU = int(Ioctl.CREATE_VM), int(Ioctl.CREATE_IRQCHIP), int(Ioctl.CREATE_VCPU)
_SET_MSRS, _SET_TSC_KHZ = int(Ioctl.SET_MSRS), int(Ioctl.SET_TSC_KHZ)

_GENU = int.from_bytes(b"Genu", "little")  # "GenuineIntel", CPUID leaf 0, EBX first


class Request(NamedTuple):
    """One ioctl: its number and what goes with it, or comes back."""

    number: Ioctl
    argument: bytearray


Plain = tuple[tuple[int, bytearray], ...]
"""Requests as the paths that must be short use them."""


def plain(requests: Iterable[Request]) -> Plain:
    return tuple((int(number), argument) for number, argument in requests)


class CpuState:
    """A vcpu's state in the kernel, less what never changes."""

    def __init__(self, vcpu: Vcpu) -> None:
        """Once per vcpu, while it stands still: finds out which MSRs can be read and written back. Raises KvmError."""
        entries = vcpu.get_cpuid()
        self.cpuid = Request(Ioctl.SET_CPUID2, bytearray(CpuidHead(nent=len(entries))) + b"".join(map(bytes, entries)))
        self.is_intel = any(e.function == 0 and e.ebx == _GENU for e in entries)
        self.tsc_khz = vcpu.tsc_khz
        regs, sregs, mp_state = (bytearray(sizeof(kind)) for kind in (cs.Regs, cs.Sregs, cs.MpStateData))
        xcrs, debug, events, lapic = (
            bytearray(sizeof(kind)) for kind in (cs.Xcrs, cs.DebugRegs, cs.VcpuEvents, cs.Lapic)
        )
        xsave = bytearray(vcpu.xsave_size)
        self.msrs = _msrs(vcpu)
        self._tsc_offset = c_uint64()
        # SAFETY: the attribute is a u64; it is this object's, which outlives every call, and fork(2) keeps its address.
        attr = bytearray(DeviceAttr(0, numbers.TSC_CTRL, numbers.TSC_OFFSET, addressof(self._tsc_offset)))
        tsc = bytearray(cs.MsrHead(nmsrs=1)) + bytes(cs.MsrEntry(MSR_TSC))
        # The order is that of `posada.vmm.cpustate`, which says why.
        has_offset = vcpu.has_tsc_offset()
        self.gets = (
            Request(Ioctl.GET_MP_STATE, mp_state),
            Request(Ioctl.GET_REGS, regs),
            Request(Ioctl.GET_SREGS, sregs),
            Request(Ioctl.GET_XSAVE2 if vcpu.xsave_size > 4096 else Ioctl.GET_XSAVE, xsave),
            Request(Ioctl.GET_XCRS, xcrs),
            Request(Ioctl.GET_DEBUGREGS, debug),
            *([Request(Ioctl.GET_LAPIC, lapic)] if vcpu.has_lapic else []),
            Request(Ioctl.GET_MSRS, self.msrs),
            Request(Ioctl.GET_DEVICE_ATTR, attr) if has_offset else Request(Ioctl.GET_MSRS, tsc),
            Request(Ioctl.GET_VCPU_EVENTS, events),
        )
        self.sets = (
            Request(Ioctl.SET_SREGS, sregs),
            Request(Ioctl.SET_XCRS, xcrs),
            Request(Ioctl.SET_XSAVE, xsave),
            Request(Ioctl.SET_DEBUGREGS, debug),
            *([Request(Ioctl.SET_LAPIC, lapic)] if vcpu.has_lapic else []),
            Request(Ioctl.SET_DEVICE_ATTR, attr) if has_offset else Request(Ioctl.SET_MSRS, tsc),
            Request(Ioctl.SET_MSRS, self.msrs),
            Request(Ioctl.SET_REGS, regs),
            Request(Ioctl.SET_MP_STATE, mp_state),
            Request(Ioctl.SET_VCPU_EVENTS, events),
        )

        self._gets, self._sets = plain(self.gets), plain(self.sets)
        self.fresh = plain([self.cpuid, *self.sets])
        """All that a fresh vcpu is given."""

    def record(self, vcpu: Vcpu) -> None:
        repeat(vcpu.fd, self._gets)

    def put_back(self, vcpu: Vcpu) -> None:
        """Into the vcpu it is of."""
        repeat(vcpu.fd, self._sets)


def repeat(fd: int, requests: Plain) -> None:
    """One after the other. Raises KvmError."""
    number = 0
    try:
        for number, argument in requests:
            done = ioctl(fd, number, argument)
            if number == _SET_MSRS and done != int.from_bytes(argument[:4], "little"):
                raise KvmError("KVM_SET_MSRS", 0, detail=f"only {done} of the vcpu's MSRs could be put back")
    except OSError as error:
        raise failure(Ioctl(number).name, error) from error


def _msrs(vcpu: Vcpu) -> bytearray:
    """A struct kvm_msrs of those MSRs that can be read, and written with the same value."""
    wanted = [index for index in vcpu.state_msrs if index != MSR_TSC and index not in HYPERV_MSRS]
    values: dict[int, int] = {}
    while wanted:
        part = vcpu.get_msrs(wanted)
        values.update(part)
        wanted = wanted[len(part) + 1 :]
    rest = list(values)
    while rest:
        done = vcpu.set_msrs({index: values[index] for index in rest})
        if done < len(rest):
            del values[rest[done]]
        rest = rest[done + 1 :]
    return bytearray(cs.MsrHead(nmsrs=len(values))) + b"".join(bytes(cs.MsrEntry(index)) for index in values)


class ChipState:
    """Interrupt chips and clock. No PIT: our machines have none."""

    def __init__(self, vm: Vm) -> None:
        chips = [bytearray(IrqChip(chip_id=chip)) for chip in Chip] if vm.has_irqchip else []
        self._clock = bytearray(ClockData())
        clock = Request(Ioctl.GET_CLOCK, self._clock)
        self.gets = (*(Request(Ioctl.GET_IRQCHIP, chip) for chip in chips), clock)
        self.sets = (
            *(Request(Ioctl.SET_IRQCHIP, chip) for chip in chips),
            Request(Ioctl.SET_CLOCK, self._clock),
        )
        self._gets, self.plain = plain(self.gets), plain(self.sets)

    def record(self, vm: Vm, clock: ClockData | None = None) -> None:
        repeat(vm.fd, self._gets)
        if clock is not None:
            self._clock[:8] = bytes(clock)[:8]
        self._clock[8:12] = bytes(4)  # flags: on from here, not from the time of day

    def put_back(self, vm: Vm) -> None:
        repeat(vm.fd, self.plain)


def _slot(region: MemoryRegion) -> bytearray:
    """Without its dirty log: who tracks is the parent."""
    copy = MemoryRegion.from_buffer_copy(region)
    copy.flags &= ~MemFlag.LOG_DIRTY_PAGES
    return bytearray(copy)


class Replay:
    """All of it, of one machine."""

    def __init__(self, system: System, vm: Vm, vcpus: Sequence[Vcpu]) -> None:
        """While all vcpus stand still. Raises KvmError."""
        self.system, self.vm, self.vcpus = system, vm, vcpus
        self.cpus = [CpuState(vcpu) for vcpu in vcpus]
        self.chips = ChipState(vm)
        self._identity_map: Plain = (
            (int(Ioctl.SET_IDENTITY_MAP_ADDR), bytearray(layout.IDENTITY_MAP.to_bytes(8, "little"))),
        )
        self._cpus = tuple((v.id, c.tsc_khz, c.fresh) for v, c in zip(vcpus, self.cpus, strict=True))
        self._plan: tuple[int, Plain, bool, bool, tuple[tuple[int, int, Plain], ...], Plain]
        """All that `play` needs to know, in one place."""

    def record(self, clock: ClockData | None = None) -> None:
        """While all vcpus stand still, since when kvm-clock was ``clock``. Raises KvmError."""
        for cpu, vcpu in zip(self.cpus, self.vcpus, strict=True):
            cpu.record(vcpu)
        self.chips.record(self.vm, clock)
        regions = self.vm.slots.values()
        slots = plain(Request(Ioctl.SET_USER_MEMORY_REGION, _slot(region)) for region in regions)
        intel, irqchip = self.cpus[0].is_intel, self.vm.has_irqchip
        self._plan = (self.system.fd, slots, intel, irqchip, self._cpus, self.chips.plain)

    def put_back(self) -> None:
        """What was recorded last, into the same vm. While all vcpus stand still. Raises KvmError."""
        for cpu, vcpu in zip(self.cpus, self.vcpus, strict=True):
            cpu.put_back(vcpu)
        self.chips.put_back(self.vm)

    def play(self) -> list[int]:
        """In a forked child: make a vm of this process, as `posada.vmm.builder.wire` does; its descriptor, and its vcpus'.

        They can run at once; `become` makes them ``vm`` and ``vcpus``. Raises KvmError.
        """
        kvm, slots, is_intel, has_irqchip, cpus, chips = self._plan
        vm = _number(kvm, _CREATE_VM)
        repeat(vm, slots)
        if is_intel:  # AMD's half of KVM ignores both
            repeat(vm, self._identity_map)
            call_long(vm, Ioctl.SET_TSS_ADDR, layout.TSS)
        if has_irqchip:
            _number(vm, _CREATE_IRQCHIP)
        made = [vm]
        for index, tsc_khz, fresh in cpus:
            vcpu = _number(vm, _CREATE_VCPU, index)
            if tsc_khz:
                _number(vcpu, _SET_TSC_KHZ, tsc_khz)
            repeat(vcpu, fresh)
            made.append(vcpu)
        repeat(vm, chips)
        return made

    def become(self, made: list[int]) -> None:
        """What `play` made is the machine's; the parent's vm is closed and unmapped. Raises KvmError."""
        self.vm.after_fork(made[0])
        for vcpu, fd in zip(self.vcpus, made[1:], strict=True):
            vcpu.after_fork(fd)


def _number(fd: int, request: int, argument: int = 0) -> int:
    """`call` for a plain integer. Raises KvmError."""
    while True:
        try:
            # Without an argument it is 0, and given one, `ioctl` first tries whether it is a buffer.
            return ioctl(fd, request, argument) if argument else ioctl(fd, request)
        except InterruptedError:
            continue
        except OSError as error:
            raise failure(Ioctl(request).name, error) from error
