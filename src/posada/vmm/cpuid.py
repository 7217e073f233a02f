"""What a guest's CPUID instruction says: what kernel and processor offer, less what we cannot save, plus its topology.

Sources: Intel SDM vol. 2A "CPUID", AMD APM vol. 3 appendix E, the kernel's Documentation/virt/kvm/x86/cpuid.rst.

The topology is flat: one socket, one core per vcpu, no hyper-threads; a vcpu's APIC id is its index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posada.kvm.numbers import CPUID_INDEXED
from posada.kvm.structs import CpuidEntry

MAX_CPUS = 255
"""APIC ids are 8 bits; 255 is the broadcast."""


def guest_cpuid(
    supported: Sequence[CpuidEntry], index: int, count: int, *, tsc_deadline: bool = True, nested: bool = False
) -> list[CpuidEntry]:
    """The leaves for vcpu ``index`` of ``count``, from `System.supported_cpuid`, whose entries are not changed.

    ``tsc_deadline``: the kernel has KVM_CAP_TSC_DEADLINE_TIMER and the vm an irqchip; the kernel does not say so itself
    (API 4.46). ``nested``: the guest may run guests; it cannot be saved then.
    """
    if not 0 <= index < count <= MAX_CPUS:
        raise ValueError(f"vcpu {index} of {count}: at most {MAX_CPUS}, counted from 0")
    leaves = [CpuidEntry.from_buffer_copy(entry) for entry in supported if entry.function not in _TOPOLOGY]
    largest = max((int(entry.eax) for entry in leaves if entry.function == 0), default=0)
    for entry in leaves:
        edit = _EDITS.get(entry.function)
        if edit:
            edit(entry, index, count)
        if not nested:
            _hide_nested(entry)
        if entry.function == 1 and tsc_deadline:
            entry.ecx |= 1 << 24
    offered = {entry.function for entry in supported}
    for function in _TOPOLOGY:
        if function in offered or (function == 0xB and largest >= 0xB):
            leaves += _topology(function, index, count)
    return leaves


def missing_features(wanted: Sequence[CpuidEntry], supported: Sequence[CpuidEntry]) -> list[str]:
    """Feature bits that a saved guest saw and this host does not offer, as ``leaf[.sub-leaf].register.bit``.

    Another maker's processor is ``vendor``: guests choose instructions by it once, when they boot.
    A guest must not be restored or migrated here unless the list is empty. ``supported`` is `System.supported_cpuid`.
    """
    here = {(e.function, e.index): e for e in guest_cpuid(supported, 0, 1, nested=True)}
    lost = []
    for entry in wanted:
        if entry.function == 0 and (entry.ebx, entry.ecx, entry.edx) != _vendor(here.get((0, 0))):
            lost.append("vendor")
        registers = _FEATURES.get((entry.function, entry.index), ())
        ours = here.get((entry.function, entry.index))
        for name in registers:
            bits = (
                getattr(entry, name) & ~(getattr(ours, name) if ours else 0) & ~_DYNAMIC.get((entry.function, name), 0)
            )
            sub = f".{entry.index}" if entry.flags & CPUID_INDEXED else ""
            lost += [f"{entry.function:#x}{sub}.{name}.{bit}" for bit in range(32) if bits >> bit & 1]
    return lost


def _vendor(entry: CpuidEntry | None) -> tuple[int, int, int]:
    return (entry.ebx, entry.ecx, entry.edx) if entry else (0, 0, 0)


def _bits(count: int) -> int:
    """How many bits number ``count`` things."""
    return (count - 1).bit_length()


def _features(entry: CpuidEntry, index: int, count: int) -> None:
    """Leaf 1: hypervisor present (without it a guest never looks for kvm-clock), APIC id, how many share the package."""
    entry.ecx |= 1 << 31
    entry.ecx &= ~(1 << 15)  # PDCM: performance counters, hidden below
    entry.ebx = entry.ebx & 0xFFFF | (1 << _bits(count)) << 16 & 0xFF0000 | index << 24
    entry.edx = entry.edx & ~(1 << 28) | (1 << 28 if count > 1 else 0)


def _caches(entry: CpuidEntry, index: int, count: int) -> None:
    """Leaves 4 and 0x8000001D: the last level is shared by all, the others are a core's own."""
    level = entry.eax >> 5 & 7
    sharing = (1 << _bits(count)) - 1 if level >= 3 else 0
    entry.eax = entry.eax & 0x3FFF | sharing << 14
    if entry.function == 4 and entry.eax & 0x1F:
        entry.eax |= ((1 << _bits(count)) - 1 & 0x3F) << 26


def _structured(entry: CpuidEntry, index: int, count: int) -> None:
    """Leaf 7: no SGX, processor trace or architectural LBR: their state is not in the MSRs we save."""
    if entry.index == 0:
        entry.ebx &= ~(1 << 2 | 1 << 25)
        entry.ecx &= ~(1 << 30)
        entry.edx &= ~(1 << 19)


def _nothing(entry: CpuidEntry, index: int, count: int) -> None:
    """A whole leaf hidden: its state cannot be saved, or it describes the host."""
    entry.eax = entry.ebx = entry.ecx = entry.edx = 0


def _amd_features(entry: CpuidEntry, index: int, count: int) -> None:
    """Leaf 0x80000001: no performance counters (core, NB, L2); CmpLegacy says that cores share a package."""
    entry.ecx &= ~(1 << 23 | 1 << 24 | 1 << 28 | 1 << 1)
    if count > 1 and entry.ecx >> 22 & 1:  # TOPOEXT is AMD's alone; Intel must not have CmpLegacy
        entry.ecx |= 1 << 1


def _power(entry: CpuidEntry, index: int, count: int) -> None:
    """Leaf 0x80000007: no invariant TSC: the guest may go on on a host of another frequency. kvm-clock is kept."""
    entry.edx &= ~(1 << 8)


def _sizes(entry: CpuidEntry, index: int, count: int) -> None:
    """Leaf 0x80000008 ECX: cores, and bits of an APIC id that number them."""
    entry.ecx = (count - 1) | _bits(count) << 12 if entry.ecx else 0


def _amd_topology(entry: CpuidEntry, index: int, count: int) -> None:
    """Leaf 0x8000001E: APIC id; core id, one thread each; node 0 of one."""
    entry.eax, entry.ebx, entry.ecx, entry.edx = index, index & 0xFF, 0, 0


def _hide_nested(entry: CpuidEntry) -> None:
    if entry.function == 1:
        entry.ecx &= ~(1 << 5)  # VMX
    elif entry.function == 0x80000001:
        entry.ecx &= ~(1 << 2)  # SVM
    elif entry.function == 0x8000000A:
        entry.eax = entry.ebx = entry.ecx = entry.edx = 0


def _topology(function: int, index: int, count: int) -> list[CpuidEntry]:
    """Leaves 0xB and 0x1F: a level of threads (one per core), a level of cores, the end. EDX: the x2APIC id."""
    levels = ((0, 1, 1), (_bits(count), count, 2), (0, 0, 0))  # bits to shift, processors at this level, its type
    return [
        CpuidEntry(function, i, CPUID_INDEXED, shift, processors, i | kind << 8, index)
        for i, (shift, processors, kind) in enumerate(levels)
    ]


_TOPOLOGY = (0xB, 0x1F)
_EDITS: dict[int, Callable[[CpuidEntry, int, int], None]] = {
    0x1: _features,
    0x4: _caches,
    0x7: _structured,
    0xA: _nothing,  # performance counters
    0x12: _nothing,  # SGX
    0x14: _nothing,  # processor trace
    0x1C: _nothing,  # last branch records
    0x80000001: _amd_features,
    0x80000007: _power,
    0x80000008: _sizes,
    0x8000001D: _caches,
    0x8000001E: _amd_topology,
    0x8000001F: _nothing,  # memory encryption
    0x80000022: _nothing,  # performance counters, version 2
}
_FEATURES = {
    (0x1, 0): ("ecx", "edx"),
    (0x7, 0): ("ebx", "ecx", "edx"),
    (0x7, 1): ("eax",),
    (0xD, 0): ("eax", "edx"),
    (0xD, 1): ("eax",),
    (0x40000001, 0): ("eax",),
    (0x80000001, 0): ("ecx", "edx"),
    (0x80000008, 0): ("ebx",),
}
"""Where a set bit means that the guest may use something."""
_DYNAMIC = {(0x1, "ecx"): 1 << 27 | 1 << 24, (0x1, "edx"): 1 << 28, (0x80000001, "ecx"): 1 << 1}
"""Bits that follow the guest's own CR4 (OSXSAVE), the topology, or are the monitor's (TSC deadline)."""
