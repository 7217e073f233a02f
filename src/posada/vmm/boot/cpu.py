"""The first vcpu's registers at the kernel's entry, and the tables they point to.

Sources: Linux boot.rst, *64-bit Boot Protocol*; Xen, docs/misc/pvh.markdown (*x86/HVM direct boot ABI*); Intel SDM 3A.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Protocol

from posada.kvm.cpustructs import Regs, Segment, Sregs
from posada.vmm import layout
from posada.vmm.memory import GuestMemory


class Mode(enum.Enum):
    """How a kernel is entered."""

    PVH = "pvh"
    """32-bit protected mode, no paging; EBX holds the start info."""
    LINUX64 = "linux64"
    """Long mode, identity-mapped; RSI holds the zero page."""


@dataclass(frozen=True, slots=True)
class Entry:
    mode: Mode
    address: int


class Registers(Protocol):
    """The part of `posada.kvm.Vcpu` that is needed."""

    def get_sregs(self) -> Sregs: ...

    def set_sregs(self, state: Sregs) -> None: ...

    def set_regs(self, state: Regs) -> None: ...


_PE, _ET, _NE, _WP, _PG = 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
_PAE = 1 << 5
_LME, _LMA = 1 << 8, 1 << 10
_CODE, _DATA, _TSS32_BUSY = 11, 3, 11
_CS, _DS, _TR = 0x10, 0x18, 0x20
"""Selectors; the 64-bit protocol fixes the first two."""


def write_tables(memory: GuestMemory) -> None:
    """GDT, and page tables that map the first 4 GiB onto themselves (used in long mode only). Raises BadAddress."""
    gdt = [0, 0, _descriptor(_CODE, long=True), _descriptor(_DATA), 0x0000_8B00_0000_0067, 0]
    memory.write(layout.GDT, struct.pack(f"<{len(gdt)}Q", *gdt))
    memory.put_u64(layout.PML4, layout.PDPT | 3)
    for i in range(4):
        memory.put_u64(layout.PDPT + 8 * i, layout.PAGE_DIRECTORIES + 4096 * i | 3)
    pages = struct.pack("<2048Q", *(i << 21 | 0x83 for i in range(2048)))  # present, writable, 2 MiB
    memory.write(layout.PAGE_DIRECTORIES, pages)


def set_entry(vcpu: Registers, entry: Entry) -> None:
    """Point the boot vcpu at the kernel. Raises KvmError."""
    long = entry.mode is Mode.LINUX64
    sregs = vcpu.get_sregs()
    sregs.cs = _segment(_CS, _CODE, long=long)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = _segment(_DS, _DATA)
    sregs.tr = Segment(base=0, limit=0x67, selector=_TR, type=_TSS32_BUSY, present=1)
    sregs.gdt.base, sregs.gdt.limit = layout.GDT, 6 * 8 - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0 = _PE | _ET | _NE
    sregs.cr4 = 0
    if long:
        sregs.cr3 = layout.PML4
        sregs.cr4 = _PAE
        sregs.cr0 |= _WP | _PG
        sregs.efer |= _LME | _LMA
    vcpu.set_sregs(sregs)
    regs = Regs(rip=entry.address, rflags=2, rsp=layout.BOOT_STACK, rbp=layout.BOOT_STACK)
    if long:
        regs.rsi = layout.ZERO_PAGE
    else:
        regs.rbx = layout.START_INFO
    vcpu.set_regs(regs)


def _segment(selector: int, kind: int, *, long: bool = False) -> Segment:
    """A flat 4 GiB segment of ring 0."""
    return Segment(
        base=0, limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, s=1, g=1, l=int(long), db=int(not long)
    )


def _descriptor(kind: int, *, long: bool = False) -> int:
    """The same in the GDT: present, ring 0, 4 KiB granularity."""
    flags = 0xA if long else 0xC
    return 0x0000_0000_0000_FFFF | (0x90 | kind) << 40 | 0xF << 48 | flags << 52
