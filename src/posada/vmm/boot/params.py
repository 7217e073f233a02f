"""What a kernel is told at its entry: ``struct boot_params`` (64-bit protocol) or ``hvm_start_info`` (PVH). Pure.

Sources: Linux, Documentation/arch/x86/{boot,zero-page}.rst; Xen, public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from posada.vmm import layout
from posada.vmm.boot.bzimage import HEADER_AT


class RangeType(enum.IntEnum):
    """E820 types; PVH's memory map uses the same numbers."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


@dataclass(frozen=True, slots=True)
class Range:
    base: int
    size: int
    type: RangeType


@dataclass(frozen=True, slots=True)
class Given:
    """What both protocols pass on. ``initrd``: (address, size). ``rsdp``: 0 for none."""

    map: tuple[Range, ...]
    initrd: tuple[int, int] | None
    rsdp: int


def memory_map(regions: Sequence[tuple[int, int]]) -> tuple[Range, ...]:
    """The memory map of a PC whose RAM is ``regions`` (base, size), the first from 0 on and larger than 1 MiB."""
    (_, low), *others = regions
    return (
        Range(0, layout.LOW_RAM_END, RangeType.RAM),
        Range(layout.LOW_RAM_END, layout.HIGH_RAM - layout.LOW_RAM_END, RangeType.RESERVED),
        Range(layout.HIGH_RAM, low - layout.HIGH_RAM, RangeType.RAM),
        *(Range(base, size, RangeType.RAM) for base, size in others),
    )


def zero_page(given: Given, header: bytes) -> bytes:
    """``struct boot_params``, 4 KiB. ``header``: a bzImage's setup header, or empty for an ELF kernel."""
    page = bytearray(4096)
    page[HEADER_AT : HEADER_AT + len(header)] = header
    if not header:
        struct.pack_into("<H", page, 0x1FE, 0xAA55)  # boot_flag
        struct.pack_into("<4sH", page, 0x202, b"HdrS", 0x20C)
        struct.pack_into("<I", page, 0x230, 0x100_0000)  # kernel_alignment
    struct.pack_into("<Q", page, 0x70, given.rsdp)  # acpi_rsdp_addr
    page[0x210] = 0xFF  # type_of_loader: one without a number
    page[0x211] = (header[0x211 - HEADER_AT] if header else 1) & ~0x80  # loadflags: no heap offered
    struct.pack_into("<I", page, 0x228, layout.COMMAND_LINE)  # cmd_line_ptr
    if given.initrd:
        struct.pack_into("<II", page, 0x218, *given.initrd)  # ramdisk_image, ramdisk_size
    page[0x1E8] = len(given.map)  # e820_entries
    for i, entry in enumerate(given.map):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * i, entry.base, entry.size, entry.type)
    return bytes(page)


def start_info(given: Given) -> bytes:
    """``struct hvm_start_info`` version 1, its module list and memory map, to be written to START_INFO."""
    page = bytearray(4096)
    modules = 1 if given.initrd else 0
    struct.pack_into(
        "<IIIIQQQQII", page, 0,
        0x336E_C578, 1, 0, modules,
        layout.MODULE_LIST if modules else 0, layout.COMMAND_LINE, given.rsdp, layout.MEMORY_MAP, len(given.map), 0,
    )  # fmt: skip
    for i, entry in enumerate(given.map):
        at = layout.MEMORY_MAP - layout.START_INFO + 24 * i
        struct.pack_into("<QQII", page, at, entry.base, entry.size, entry.type, 0)
    if given.initrd:
        struct.pack_into("<QQQQ", page, layout.MODULE_LIST - layout.START_INFO, *given.initrd, 0, 0)
    return bytes(page)
