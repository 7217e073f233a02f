"""Structures of a vcpu, as <asm/kvm.h> and <linux/kvm.h> lay them out. Their bytes are also what saved state holds."""

from __future__ import annotations

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
)  # fmt: skip
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


class Regs(Structure):
    """struct kvm_regs."""

    _fields_ = [(name, c_uint64) for name in GENERAL]


class Segment(Structure):
    """struct kvm_segment: a segment register with its hidden part; ``limit`` in bytes."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class Dtable(Structure):
    """struct kvm_dtable: GDTR or IDTR."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, Segment) for name in SEGMENTS),
        ("gdt", Dtable),
        ("idt", Dtable),
        *((name, c_uint64) for name in CONTROL),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class Fpu(Structure):
    """struct kvm_fpu."""

    _fields_ = [
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class Xcr(Structure):
    """struct kvm_xcr."""

    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class Xcrs(Structure):
    """struct kvm_xcrs."""

    _fields_ = [("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", Xcr * 16), ("padding", c_uint64 * 16)]


class MsrHead(Structure):
    """The head of struct kvm_msrs; the entries follow."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class MsrEntry(Structure):
    """struct kvm_msr_entry."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class Lapic(Structure):
    """struct kvm_lapic_state: the local APIC's register page, its first KiB."""

    _fields_ = [("regs", c_uint8 * 1024)]


class VcpuEvents(Structure):
    """struct kvm_vcpu_events: exceptions, interrupts, NMIs and SMIs on their way into the vcpu."""

    _fields_ = [
        ("exception_injected", c_uint8),
        ("exception_nr", c_uint8),
        ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8),
        ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8),
        ("interrupt_nr", c_uint8),
        ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8),
        ("nmi_pending", c_uint8),
        ("nmi_masked", c_uint8),
        ("nmi_pad", c_uint8),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi_smm", c_uint8),
        ("smi_pending", c_uint8),
        ("smi_inside_nmi", c_uint8),
        ("smi_latched_init", c_uint8),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class MpStateData(Structure):
    """struct kvm_mp_state."""

    _fields_ = [("mp_state", c_uint32)]


class DebugRegs(Structure):
    """struct kvm_debugregs."""

    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class GuestDebugData(Structure):
    """struct kvm_guest_debug; ``debugreg`` 0–3 are addresses, 7 is DR7."""

    _fields_ = [("control", c_uint32), ("pad", c_uint32), ("debugreg", c_uint64 * 8)]


class Translation(Structure):
    """struct kvm_translation."""

    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    ]


class Interrupt(Structure):
    """struct kvm_interrupt."""

    _fields_ = [("irq", c_uint32)]
