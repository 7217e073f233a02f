"""Structures of the vm and of /dev/kvm, as <linux/kvm.h> and <asm/kvm.h> lay them out. Field names are the kernel's."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_uint8, c_uint16, c_uint32, c_uint64


class MemoryRegion(Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class DirtyLog(Structure):
    """struct kvm_dirty_log; ``dirty_bitmap`` is an address, one bit per page."""

    _fields_ = [("slot", c_uint32), ("padding", c_uint32), ("dirty_bitmap", c_uint64)]


class ClearDirtyLog(Structure):
    """struct kvm_clear_dirty_log."""

    _fields_ = [
        ("slot", c_uint32),
        ("num_pages", c_uint32),
        ("first_page", c_uint64),
        ("dirty_bitmap", c_uint64),
    ]


class IrqLevel(Structure):
    """struct kvm_irq_level."""

    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class IrqChip(Structure):
    """struct kvm_irqchip: ``chip`` holds a kvm_pic_state or a kvm_ioapic_state, as the kernel wrote it."""

    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", c_uint8 * 512)]


class PitConfig(Structure):
    """struct kvm_pit_config."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class PitChannel(Structure):
    """struct kvm_pit_channel_state."""

    _fields_ = [
        ("count", c_uint32),
        ("latched_count", c_uint16),
        ("count_latched", c_uint8),
        ("status_latched", c_uint8),
        ("status", c_uint8),
        ("read_state", c_uint8),
        ("write_state", c_uint8),
        ("write_latch", c_uint8),
        ("rw_mode", c_uint8),
        ("mode", c_uint8),
        ("bcd", c_uint8),
        ("gate", c_uint8),
        ("count_load_time", c_uint64),
    ]


class PitState(Structure):
    """struct kvm_pit_state2."""

    _fields_ = [("channels", PitChannel * 3), ("flags", c_uint32), ("reserved", c_uint32 * 9)]


class ClockData(Structure):
    """struct kvm_clock_data: ``clock`` and ``realtime`` in nanoseconds."""

    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


class IrqFd(Structure):
    """struct kvm_irqfd."""

    _fields_ = [
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class IoEventFd(Structure):
    """struct kvm_ioeventfd."""

    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class Msi(Structure):
    """struct kvm_msi."""

    _fields_ = [
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    ]


class RoutingEntry(Structure):
    """struct kvm_irq_routing_entry; ``u`` is (irqchip, pin) or (address_lo, address_hi, data)."""

    _fields_ = [
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", c_uint32 * 8),
    ]


class Routing(Structure):
    """The head of struct kvm_irq_routing; the entries follow."""

    _fields_ = [("nr", c_uint32), ("flags", c_uint32)]


class EnableCap(Structure):
    """struct kvm_enable_cap."""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class DeviceAttr(Structure):
    """struct kvm_device_attr; ``addr`` is where the value lies in our memory."""

    _fields_ = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]


class CpuidHead(Structure):
    """The head of struct kvm_cpuid2; the entries follow."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


class CpuidEntry(Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    ]


class MsrList(Structure):
    """The head of struct kvm_msr_list; the indices follow."""

    _fields_ = [("nmsrs", c_uint32)]
