"""RSDP → XSDT → FADT, MADT; FADT → DSDT, laid out one after the other at ACPI_TABLES. Pure.

Hardware-reduced ACPI (6.5, 3.11.1): no PM timer, no SCI, no legacy interrupt controller. Source: ACPI 6.5, chapter 5.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from posada.vmm import layout
from posada.vmm.acpi import dsdt
from posada.vmm.legacy import power

_OEM = b"POSADA"
_HEADER_SIZE = 36
_FADT_SIZE = 276
_WBINVD, _CONTROL_BUTTONS, _RESET_SUPPORTED, _HARDWARE_REDUCED = 1, 0x30, 1 << 10, 1 << 20
_NO_VGA, _NO_MSI, _NO_ASPM = 4, 8, 16
"""IAPC_BOOT_ARCH. Not set: legacy devices, 8042. So a guest does not look for them."""
_ENABLED = 1


def build(cpus: int, transports: Sequence[dsdt.Transport]) -> bytes:
    """Everything, the RSDP first, to be written to ACPI_TABLES; the RSDP's address is ACPI_TABLES."""
    tables = bytearray(64)  # the RSDP's place: it is known last

    def place(table: bytes) -> int:
        tables.extend(bytes(-len(tables) % 64))
        address = layout.ACPI_TABLES + len(tables)
        tables.extend(table)
        return address

    dsdt_at = place(_table(b"DSDT", 2, dsdt.body(cpus, transports)))
    entries = (place(_fadt(dsdt_at)), place(_madt(cpus)))
    xsdt_at = place(_table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    rsdp = _rsdp(xsdt_at)
    tables[: len(rsdp)] = rsdp
    if len(tables) > layout.ACPI_TABLES_SIZE:
        raise ValueError(f"the ACPI tables take {len(tables)} bytes")
    return bytes(tables)


def generation_bytes(generation_id: str) -> bytes:
    """A VM generation ID as it lies in memory: a GUID, first three fields little-endian. Empty text: all zero."""
    digits = bytes.fromhex(generation_id.replace("-", "")) if generation_id else bytes(16)
    if len(digits) != 16:
        raise ValueError(f"{generation_id!r} is no generation id")
    return digits[3::-1] + digits[5:3:-1] + digits[7:5:-1] + digits[8:]


def _rsdp(xsdt: int) -> bytes:
    """ACPI 2.0 and later; two checksums (5.2.5.3)."""
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF
    rsdp[32] = -sum(rsdp) & 0xFF
    return bytes(rsdp)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """The common header (5.2.6) with its checksum, and the body."""
    size = _HEADER_SIZE + len(body)
    header = struct.pack("<4sIBB6s8sI4sI", signature, size, revision, 0, _OEM, b"POSADAVM", 1, b"PSDA", 1)
    table = bytearray(header + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _io_register(port: int) -> bytes:
    """Generic address structure: one byte of I/O space (5.2.3.2)."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def _fadt(dsdt_at: int) -> bytes:
    """5.2.9. Offsets count from the table's start, as the specification's table does."""
    table = bytearray(_FADT_SIZE)
    struct.pack_into("<H", table, 109, _NO_VGA | _NO_MSI | _NO_ASPM)
    struct.pack_into("<I", table, 112, _WBINVD | _CONTROL_BUTTONS | _RESET_SUPPORTED | _HARDWARE_REDUCED)
    table[116:128] = _io_register(layout.EVENT_PORT + power.RESET)
    table[128] = power.RESET_VALUE
    table[131] = 5  # minor version
    struct.pack_into("<Q", table, 140, dsdt_at)
    table[244:256] = _io_register(layout.EVENT_PORT + power.SLEEP_CONTROL)
    table[256:268] = _io_register(layout.EVENT_PORT + power.SLEEP_STATUS)
    table[268:276] = b"POSADA\0\0"  # hypervisor vendor
    return _table(b"FACP", 6, bytes(table[_HEADER_SIZE:]))


def _madt(cpus: int) -> bytes:
    """5.2.12. APIC ids count from 0, as the vcpus do. Flags 0: there is no 8259."""
    entries = [struct.pack("<BBBBI", 0, 8, index, index, _ENABLED) for index in range(cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0))
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI at LINT1 of every processor
    return _table(b"APIC", 5, struct.pack("<II", layout.LAPIC, 0) + b"".join(entries))
