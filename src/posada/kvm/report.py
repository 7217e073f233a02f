"""What is printed when KVM gives up on a guest: the exit, the registers, and the bytes at RIP."""

from __future__ import annotations

from posada.errors import PosadaError
from posada.kvm.cpustructs import CONTROL, GENERAL, SEGMENTS, Sregs
from posada.kvm.paging import Readable, translate
from posada.kvm.vcpu import Vcpu

BEFORE, AFTER = 16, 32
"""How many bytes around RIP are shown."""


def report(vcpu: Vcpu, memory: Readable) -> str:
    """Several lines of text. The vcpu must not be running. Never raises for what the guest did."""
    lines = [f"vcpu {vcpu.id}: {vcpu.exit()}", registers(vcpu)]
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    rip = int(regs.rip) if _long_mode(sregs) else (int(sregs.cs.base) + int(regs.rip)) & 0xFFFFFFFF
    before, after = read_linear(vcpu, memory, rip - BEFORE, BEFORE), read_linear(vcpu, memory, rip, AFTER)
    lines.append(f"code at {rip:#x}: {before.hex(' ')} <{after[:1].hex()}> {after[1:].hex(' ')}".rstrip())
    return "\n".join(lines)


def registers(vcpu: Vcpu) -> str:
    """The general, segment and control registers. The vcpu must not be running."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    cells = [f"{name:>6} {getattr(regs, name):016x}" for name in GENERAL]
    lines = ["  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    for name in SEGMENTS:
        s = getattr(sregs, name)
        lines.append(
            f"{name:>6} {s.selector:04x}  base {s.base:016x}  limit {s.limit:08x}  type {s.type:x} dpl {s.dpl}"
            f"{'' if s.present else ' absent'}{' 64-bit' if s.l else ''}"
        )
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        lines.append(f"{name:>6} base {table.base:016x}  limit {table.limit:04x}")
    cells = [f"{name:>9} {getattr(sregs, name):016x}" for name in CONTROL]
    lines += ["  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    lines.append(f"mp state {vcpu.get_mp_state().name}")
    return "\n".join(lines)


def read_linear(vcpu: Vcpu, memory: Readable, linear: int, length: int) -> bytes:
    """Up to ``length`` bytes at a linear address; fewer where a page is missing. The vcpu must not be running."""
    out = b""
    while len(out) < length:
        at = (linear + len(out)) & 0xFFFF_FFFF_FFFF_FFFF
        part = min(length - len(out), 4096 - at % 4096)
        try:
            physical = translate(vcpu, memory, at)
            if physical is None:
                break
            out += memory.read(physical, part)
        except (PosadaError, ValueError):  # no memory there
            break
    return out


def _long_mode(sregs: Sregs) -> bool:
    return bool(sregs.efer & 0x400 and sregs.cs.l)
