"""Numbers of the KVM API: ioctls, capabilities, exit reasons, flags (<linux/kvm.h>, <asm/kvm.h>; x86-64).

An ioctl's number holds its direction (bits 30–31), the size of its argument (16–29), the type 0xAE and a serial number.
A test compares each size with the structure's, and each number with the system's header.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

API_VERSION = 12


class Ioctl(IntEnum):
    """Every request this package makes; the name is the kernel's without ``KVM_``."""

    # on /dev/kvm
    GET_API_VERSION = 0x0000AE00
    CREATE_VM = 0x0000AE01
    GET_MSR_INDEX_LIST = 0xC004AE02
    CHECK_EXTENSION = 0x0000AE03
    GET_VCPU_MMAP_SIZE = 0x0000AE04
    GET_SUPPORTED_CPUID = 0xC008AE05
    GET_MSR_FEATURE_INDEX_LIST = 0xC004AE0A
    # on a vm
    CREATE_VCPU = 0x0000AE41
    GET_DIRTY_LOG = 0x4010AE42
    SET_USER_MEMORY_REGION = 0x4020AE46
    SET_TSS_ADDR = 0x0000AE47
    SET_IDENTITY_MAP_ADDR = 0x4008AE48
    CREATE_IRQCHIP = 0x0000AE60
    IRQ_LINE = 0x4008AE61
    GET_IRQCHIP = 0xC208AE62
    SET_IRQCHIP = 0x8208AE63
    SET_GSI_ROUTING = 0x4008AE6A
    REINJECT_CONTROL = 0x0000AE71
    IRQFD = 0x4020AE76
    CREATE_PIT2 = 0x4040AE77
    SET_BOOT_CPU_ID = 0x0000AE78
    IOEVENTFD = 0x4040AE79
    SET_CLOCK = 0x4030AE7B
    GET_CLOCK = 0x8030AE7C
    GET_PIT2 = 0x8070AE9F
    SET_PIT2 = 0x4070AEA0
    SIGNAL_MSI = 0x4020AEA5
    CLEAR_DIRTY_LOG = 0xC018AEC0
    RESET_DIRTY_RINGS = 0x0000AEC7
    # on a vm or a vcpu
    ENABLE_CAP = 0x4068AEA3
    SET_TSC_KHZ = 0x0000AEA2
    GET_TSC_KHZ = 0x0000AEA3
    SET_DEVICE_ATTR = 0x4018AEE1
    GET_DEVICE_ATTR = 0x4018AEE2
    HAS_DEVICE_ATTR = 0x4018AEE3
    # on a vcpu
    RUN = 0x0000AE80
    GET_REGS = 0x8090AE81
    SET_REGS = 0x4090AE82
    GET_SREGS = 0x8138AE83
    SET_SREGS = 0x4138AE84
    TRANSLATE = 0xC018AE85
    INTERRUPT = 0x4004AE86
    GET_MSRS = 0xC008AE88
    SET_MSRS = 0x4008AE89
    GET_FPU = 0x81A0AE8C
    SET_FPU = 0x41A0AE8D
    GET_LAPIC = 0x8400AE8E
    SET_LAPIC = 0x4400AE8F
    SET_CPUID2 = 0x4008AE90
    GET_CPUID2 = 0xC008AE91
    GET_MP_STATE = 0x8004AE98
    SET_MP_STATE = 0x4004AE99
    NMI = 0x0000AE9A
    SET_GUEST_DEBUG = 0x4048AE9B
    GET_VCPU_EVENTS = 0x8040AE9F
    SET_VCPU_EVENTS = 0x4040AEA0
    GET_DEBUGREGS = 0x8080AEA1
    SET_DEBUGREGS = 0x4080AEA2
    GET_XSAVE = 0x9000AEA4
    SET_XSAVE = 0x5000AEA5
    GET_XSAVE2 = 0x9000AECF
    GET_XCRS = 0x8188AEA6
    SET_XCRS = 0x4188AEA7
    KVMCLOCK_CTRL = 0x0000AEAD


class Cap(IntEnum):
    """Capabilities that are asked about or enabled (KVM_CHECK_EXTENSION, KVM_ENABLE_CAP)."""

    IRQCHIP = 0
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    SET_GUEST_DEBUG = 23
    IRQ_ROUTING = 25
    IRQFD = 32
    PIT2 = 33
    PIT_STATE2 = 35
    IOEVENTFD = 36
    SET_IDENTITY_MAP_ADDR = 37
    ADJUST_CLOCK = 39
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    KVMCLOCK_CTRL = 76
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    CHECK_EXTENSION_VM = 105
    X86_SMM = 117
    SPLIT_IRQCHIP = 121
    VCPU_ATTRIBUTES = 127
    MAX_VCPU_ID = 128
    X2APIC_API = 129
    IMMEDIATE_EXIT = 136
    X86_DISABLE_EXITS = 143
    EXCEPTION_PAYLOAD = 164
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    HALT_POLL = 182
    DIRTY_LOG_RING = 192
    EXIT_ON_EMULATION_FAILURE = 204
    XSAVE2 = 208


class Exit(IntEnum):
    """Why KVM_RUN returned (kvm_run.exit_reason)."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    WATCHDOG = 21
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39


class MpState(IntEnum):
    """What a vcpu waits for (KVM_GET_MP_STATE)."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4


class MemFlag(IntFlag):
    """Flags of a memory slot."""

    LOG_DIRTY_PAGES = 1
    READONLY = 2


class GuestDebug(IntFlag):
    """``control`` of KVM_SET_GUEST_DEBUG."""

    ENABLE = 1
    SINGLESTEP = 2
    USE_SW_BP = 1 << 16
    USE_HW_BP = 1 << 17
    INJECT_DB = 1 << 18
    INJECT_BP = 1 << 19
    BLOCKIRQ = 1 << 20


class Chip(IntEnum):
    """Parts of the in-kernel irqchip (KVM_GET_IRQCHIP)."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2


IRQFD_DEASSIGN = 1
IRQFD_RESAMPLE = 2
IOEVENTFD_DATAMATCH = 1
IOEVENTFD_PIO = 2
IOEVENTFD_DEASSIGN = 4
ROUTING_IRQCHIP = 1
ROUTING_MSI = 2
PIT_SPEAKER_DUMMY = 1
CPUID_INDEXED = 1
"""CpuidEntry.flags: the leaf has sub-leaves, ``index`` counts (KVM_CPUID_FLAG_SIGNIFCANT_INDEX)."""
CLOCK_TSC_STABLE = 2
CLOCK_REALTIME = 4
CLOCK_HOST_TSC = 8
TSC_CTRL = 0
"""Group of vcpu attributes; its attribute 0 is the TSC offset."""
TSC_OFFSET = 0
DIRTY_RING_PAGE = 64
"""Page of the vcpu's mapping at which its dirty ring starts."""
