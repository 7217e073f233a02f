"""Which registers gdb sees of an x86-64 vcpu, in which order and width; and how they lie in KVM's structures.

The features ``org.gnu.gdb.i386.*`` and their registers' names are fixed by gdb ("Standard Target Features", i386).
"""

from __future__ import annotations

from dataclasses import dataclass

from posada.kvm.cpustructs import CONTROL, Fpu, Regs, Sregs


@dataclass(frozen=True)
class Register:
    """``source`` is where it lies: regs, sregs, segment (its selector), base (of a segment), st, fpu, xmm."""

    name: str
    size: int
    source: str
    kind: str = ""


_GENERAL = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15"
CORE = (
    *(Register(name, 8, "regs", "data_ptr" if name in ("rbp", "rsp") else "int64") for name in _GENERAL.split()),
    Register("rip", 8, "regs", "code_ptr"),
    Register("eflags", 4, "regs"),
    *(Register(name, 4, "segment") for name in ("cs", "ss", "ds", "es", "fs", "gs")),
    *(Register(f"st{i}", 10, "st", "i387_ext") for i in range(8)),
    *(Register(name, 4, "fpu") for name in ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")),
)
SSE = (*(Register(f"xmm{i}", 16, "xmm", "vec128") for i in range(16)), Register("mxcsr", 4, "fpu"))
SEGMENTS = (Register("fs_base", 8, "base"), Register("gs_base", 8, "base"))
SYSTEM = tuple(Register(name, 8, "sregs") for name in CONTROL)
REGISTERS = (*CORE, *SSE, *SEGMENTS, *SYSTEM)
SIZE = sum(register.size for register in REGISTERS)

_VECTOR = (
    '<vector id="v4f" type="ieee_single" count="4"/><vector id="v4i" type="int32" count="4"/>'
    '<union id="vec128"><field name="v4_float" type="v4f"/><field name="v4_int32" type="v4i"/>'
    '<field name="uint128" type="uint128"/></union>'
)


def target_xml() -> bytes:
    """The target description (qXfer:features:read:target.xml)."""
    parts = [
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target><architecture>i386:x86-64</architecture>",
    ]
    features = {"org.gnu.gdb.i386.core": CORE, "org.gnu.gdb.i386.sse": SSE, "org.gnu.gdb.i386.segments": SEGMENTS}
    number = 0
    for name, registers in {**features, "org.posada.system": SYSTEM}.items():
        parts.append(f'<feature name="{name}">{_VECTOR if registers is SSE else ""}')
        for register in registers:
            kind = register.kind or f"int{register.size * 8}"
            parts.append(f'<reg name="{register.name}" bitsize="{register.size * 8}" type="{kind}" regnum="{number}"/>')
            number += 1
        parts.append("</feature>")
    return "".join([*parts, "</target>"]).encode()


@dataclass
class State:
    """The structures a vcpu's registers lie in. `get` and `put` work on these; the target reads and writes them back."""

    regs: Regs
    sregs: Sregs
    fpu: Fpu

    def get(self, register: Register) -> bytes:
        """Little-endian, ``register.size`` bytes."""
        if register.source == "st":
            return bytes(self.fpu.fpr[int(register.name[2:])])[:10]
        if register.source == "xmm":
            return bytes(self.fpu.xmm[int(register.name[3:])])
        return int(self._value(register)).to_bytes(8, "little")[: register.size]

    def put(self, register: Register, data: bytes) -> None:
        """Raises ValueError for a wrong length, or a register that cannot be set (selectors, x87 control)."""
        if len(data) != register.size:
            raise ValueError(f"{register.name} has {register.size} bytes")
        value = int.from_bytes(data, "little")
        match register.source:
            case "st":
                self.fpu.fpr[int(register.name[2:])][:10] = list(data)
            case "xmm":
                self.fpu.xmm[int(register.name[3:])][:] = list(data)
            case "regs":
                setattr(self.regs, _KVM_NAMES.get(register.name, register.name), value)
            case "sregs":
                setattr(self.sregs, register.name, value)
            case "base":
                getattr(self.sregs, register.name[:2]).base = value
            case _:
                if value != self._value(register):
                    raise ValueError(f"{register.name} cannot be set")

    def _value(self, register: Register) -> int:
        match register.source:
            case "regs":
                value = getattr(self.regs, _KVM_NAMES.get(register.name, register.name))
            case "sregs":
                value = getattr(self.sregs, register.name)
            case "segment":
                value = getattr(self.sregs, register.name).selector
            case "base":
                value = getattr(self.sregs, register.name[:2]).base
            case _:
                field = _FPU_NAMES.get(register.name)
                value = getattr(self.fpu, field) if field else 0
        return int(value)


_KVM_NAMES = {"eflags": "rflags"}
_FPU_NAMES = {"fctrl": "fcw", "fstat": "fsw", "ftag": "ftwx", "fop": "last_opcode", "mxcsr": "mxcsr"}
