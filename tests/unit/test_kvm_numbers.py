"""Structures, numbers and exits of posada.kvm, against themselves and the system's <linux/kvm.h>. No /dev/kvm needed."""

from __future__ import annotations

import ctypes
import doctest
import re
import struct
from pathlib import Path

import pytest
from kvm_kit import needs_kvm

import posada.kvm
from posada.errors import KvmError
from posada.kvm import cpustructs, exits, structs
from posada.kvm.call import failure
from posada.kvm.dirty import ENTRY
from posada.kvm.numbers import Cap, Exit, Ioctl

HEADERS = [
    Path("/usr/include/linux/kvm.h"),
    Path("/usr/include/x86_64-linux-gnu/asm/kvm.h"),
    Path("/usr/include/asm/kvm.h"),
]
KERNEL_NAMES = {
    "kvm_msr_list": structs.MsrList,
    "kvm_cpuid2": structs.CpuidHead,
    "kvm_dirty_log": structs.DirtyLog,
    "kvm_clear_dirty_log": structs.ClearDirtyLog,
    "kvm_userspace_memory_region": structs.MemoryRegion,
    "kvm_irq_level": structs.IrqLevel,
    "kvm_irqchip": structs.IrqChip,
    "kvm_irq_routing": structs.Routing,
    "kvm_irqfd": structs.IrqFd,
    "kvm_pit_config": structs.PitConfig,
    "kvm_ioeventfd": structs.IoEventFd,
    "kvm_clock_data": structs.ClockData,
    "kvm_pit_state2": structs.PitState,
    "kvm_msi": structs.Msi,
    "kvm_enable_cap": structs.EnableCap,
    "kvm_device_attr": structs.DeviceAttr,
    "kvm_regs": cpustructs.Regs,
    "kvm_sregs": cpustructs.Sregs,
    "kvm_translation": cpustructs.Translation,
    "kvm_interrupt": cpustructs.Interrupt,
    "kvm_msrs": cpustructs.MsrHead,
    "kvm_fpu": cpustructs.Fpu,
    "kvm_lapic_state": cpustructs.Lapic,
    "kvm_mp_state": cpustructs.MpStateData,
    "kvm_guest_debug": cpustructs.GuestDebugData,
    "kvm_vcpu_events": cpustructs.VcpuEvents,
    "kvm_debugregs": cpustructs.DebugRegs,
    "kvm_xcrs": cpustructs.Xcrs,
}
ARGUMENT = {
    Ioctl.SET_IDENTITY_MAP_ADDR: ctypes.c_uint64,
    Ioctl.GET_XSAVE: ctypes.c_uint32 * 1024,
    Ioctl.SET_XSAVE: ctypes.c_uint32 * 1024,
    Ioctl.GET_XSAVE2: ctypes.c_uint32 * 1024,
}


def header() -> str:
    found = [path.read_text() for path in HEADERS if path.exists()]
    if not found:
        pytest.skip("this system has no <linux/kvm.h>")
    return re.sub(r"\\\n", " ", "\n".join(found))


def test_each_number_is_the_headers() -> None:
    """Serial number, direction and argument as the header's _IO macros say; the size as our structure's."""
    text = header()
    directions = {"_IO": 0, "_IOW": 1, "_IOR": 2, "_IOWR": 3}
    for request in Ioctl:
        found = re.search(rf"#define KVM_{request.name}\s+(_IO\w*)\(KVMIO,\s*(0x\w+)(?:,\s*([\w ]+?))?\)", text)
        assert found, f"KVM_{request.name} is not in the header"
        macro, serial, argument = found.groups()
        kind = ARGUMENT.get(request) or (KERNEL_NAMES[argument.removeprefix("struct ").strip()] if argument else None)
        size = ctypes.sizeof(kind) if kind else 0
        assert request == directions[macro] << 30 | size << 16 | 0xAE << 8 | int(serial, 16), request.name


def test_every_structure_is_as_long_as_a_number_says() -> None:
    sizes = {request >> 16 & 0x3FFF for request in Ioctl}
    for name, kind in KERNEL_NAMES.items():
        assert ctypes.sizeof(kind) in sizes, name
    assert ctypes.sizeof(structs.CpuidEntry) == 40
    assert ctypes.sizeof(cpustructs.MsrEntry) == 16
    assert ctypes.sizeof(structs.RoutingEntry) == 48
    assert ENTRY.size == 16


@pytest.mark.parametrize(("kind", "prefix"), [(Cap, "KVM_CAP_"), (Exit, "KVM_EXIT_")])
def test_capabilities_and_exits_are_the_headers(kind: type[Cap] | type[Exit], prefix: str) -> None:
    text = header()
    for member in kind:
        found = re.search(rf"#define {prefix}{member.name}\s+(\d+)", text)
        assert found is None or int(found[1]) == member, member.name  # a newer kernel's may be missing
    assert re.search(rf"#define {prefix}\w+\s+\d+", text)


def test_an_error_names_the_request_the_errno_and_what_to_do() -> None:
    error = failure("CREATE_VM", PermissionError(13, "Permission denied"))
    assert isinstance(error, KvmError)
    assert (error.ioctl, error.errno) == ("KVM_CREATE_VM", 13)
    assert str(error) == (
        "KVM_CREATE_VM failed (EACCES): Permission denied (the user needs read and write access to /dev/kvm)"
    )


def run_page(reason: int, data: bytes) -> memoryview:
    page = bytearray(12288)
    struct.pack_into("<I", page, 8, reason)
    page[exits.UNION : exits.UNION + len(data)] = data
    return memoryview(page)


@pytest.mark.parametrize(
    ("reason", "data", "text"),
    [
        (Exit.SHUTDOWN, b"", "SHUTDOWN"),
        (Exit.DEBUG, struct.pack("<IIQQQ", 1, 0, 0x1234, 0x4000, 0x400), "DEBUG exception 1 at 0x1234, DR6 0x4000"),
        (Exit.FAIL_ENTRY, struct.pack("<QI", 0x80000021, 3), "FAIL_ENTRY, hardware reason 0x80000021 on host cpu 3"),
        (Exit.SYSTEM_EVENT, struct.pack("<IIQ", 2, 1, 7), "SYSTEM_EVENT RESET"),
        (Exit.SYSTEM_EVENT, struct.pack("<II", 99, 4000), "SYSTEM_EVENT 99"),
        (Exit.X86_WRMSR, struct.pack("<8xIIQ", 1, 0xC0010015, 5), "WRMSR 0xc0010015 = 0x5"),
        (Exit.UNKNOWN, struct.pack("<Q", 0x7B), "UNKNOWN, hardware reason 0x7b"),
        (77, b"", "77"),
        (
            Exit.INTERNAL_ERROR,
            struct.pack("<IIQB", 1, 3, 1, 2) + b"\x0f\x0b" + bytes(13),
            "INTERNAL_ERROR EMULATION, instruction 0f 0b, data ['0x1', '0xb0f02', '0x0']",
        ),
        (Exit.INTERNAL_ERROR, struct.pack("<II", 3, 0), "INTERNAL_ERROR DELIVERY_EV, data []"),
    ],
)
def test_exits_are_decoded(reason: int, data: bytes, text: str) -> None:
    assert str(exits.decode(run_page(reason, data))) == text


def test_io_and_mmio_exits_are_views_of_the_shared_page() -> None:
    page = run_page(Exit.IO, struct.pack("<BBHIQ", 0, 2, 0x1F0, 3, 4096))
    io = exits.decode(page)
    assert isinstance(io, exits.IoExit)
    assert io[:4] == (False, 0x1F0, 2, 3)
    io.data[:] = b"abcdef"
    assert page[4096:4102] == b"abcdef"
    mmio = exits.decode(run_page(Exit.MMIO, struct.pack("<Q8sIB", 0xD0000050, b"\x07" + bytes(7), 4, 1)))
    assert isinstance(mmio, exits.MmioExit)
    assert (mmio.write, mmio.address, bytes(mmio.data)) == (True, 0xD0000050, b"\x07\0\0\0")


@needs_kvm
def test_the_packages_example_runs() -> None:
    assert doctest.testmod(posada.kvm).failed == 0
    assert doctest.testmod(posada.kvm).attempted > 5
