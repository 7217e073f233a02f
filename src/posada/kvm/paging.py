"""From a linear to a guest-physical address, by the guest's page tables as they lie in its memory."""

from __future__ import annotations

from typing import Protocol

from posada.kvm.vcpu import Vcpu

_PRESENT, _LARGE = 1, 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000
_LONG_MODE_ACTIVE, _FIVE_LEVELS, _PAGING = 1 << 10, 1 << 12, 1 << 31
_MAY_BE_LARGE = (30, 21)


class Readable(Protocol):
    """Guest-physical memory; ValueError where there is none."""

    def read(self, gpa: int, length: int, /) -> bytes: ...


def translate(vcpu: Vcpu, memory: Readable, linear: int) -> int | None:
    """None: nothing is mapped there. The vcpu must not be running.

    KVM_TRANSLATE looks with a kernel's eyes, and with SMAP a kernel must not see what is a program's. A debugger may: where
    the kernel finds nothing in long mode, the tables are walked here (Intel SDM vol. 3A, 4.5; AMD64 vol. 2, 5.3).
    """
    linear &= (1 << 64) - 1
    physical = vcpu.translate(linear)
    if physical is not None:
        return physical
    sregs = vcpu.get_sregs()
    if not (sregs.efer & _LONG_MODE_ACTIVE and sregs.cr0 & _PAGING):
        return None
    return walk(memory, sregs.cr3, 5 if sregs.cr4 & _FIVE_LEVELS else 4, linear)


def walk(memory: Readable, cr3: int, levels: int, linear: int) -> int | None:
    """The tables are the guest's: they may lead anywhere, and it ends after ``levels`` reads all the same."""
    top = 11 + 9 * levels  # the highest bit that is translated; those above it must be the same
    if linear >> top not in (0, (1 << 64 - top) - 1):
        return None
    table = cr3 & _ADDRESS
    for shift in range(top - 8, 11, -9):
        try:
            entry = int.from_bytes(memory.read(table + 8 * (linear >> shift & 511), 8), "little")
        except ValueError:
            return None
        if not entry & _PRESENT:
            return None
        if shift == 12 or (shift in _MAY_BE_LARGE and entry & _LARGE):
            within = (1 << shift) - 1
            return int(entry & _ADDRESS & ~within | linear & within)
        table = entry & _ADDRESS
    return None
