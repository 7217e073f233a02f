"""The guest's physical address map and interrupt numbers. One place, so that nothing collides.

::

    0x0000_0500            boot structures (page tables, GDT, start info, command line), free once the kernel runs
    0x0009_FC00            end of low RAM; ACPI tables at 0xE_0000
    0x0010_0000            RAM, up to 3 GiB
    0xD000_0000            virtio-mmio transports, 4 KiB each
    0xFEC0_0000            IOAPIC; 0xFEE0_0000 local APICs
    0xFFFB_C000            identity map page and TSS of KVM on older Intel processors
    0x1_0000_0000          the rest of RAM
"""

from __future__ import annotations

# Boot structures: all below 0x9_FC00, none overlapping. The kernel is never loaded below HIGH_RAM.
GDT = 0x500
START_INFO = 0x1000
MEMORY_MAP = 0x1100
"""PVH: the map's entries; up to START_INFO + 4 KiB."""
MODULE_LIST = 0x1F00
ZERO_PAGE = 0x7000
PML4 = 0x9000
PDPT = 0xA000
PAGE_DIRECTORIES = 0xB000
"""Four pages: 4 GiB mapped by 2 MiB pages."""
BOOT_STACK = 0x8FF0
COMMAND_LINE = 0x2_0000
COMMAND_LINE_MAX = 0x1_0000
LOW_RAM_END = 0x9_FC00
HIGH_RAM = 0x10_0000
LAST_LOW_BYTE = 0xBFFF_FFFF
"""Nothing is RAM from here to 4 GiB: see `posada.vmm.memory`."""

ACPI_TABLES = 0xE_0000
"""Where the RSDP lies: in the range that kernels search on a PC, and told to them besides."""
ACPI_TABLES_SIZE = 0x1_0000
VMGENID = 0xF_0000
"""The page of RAM that holds the VM generation ID."""

RESET_VECTOR = 0xF_FFF0
"""Where a PC starts after a reset; here, code that asks for one."""

VIRTIO_MMIO = 0xD000_0000
VIRTIO_MMIO_SIZE = 0x1000
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
IDENTITY_MAP = 0xFFFB_C000
TSS = 0xFFFB_D000

COM1_PORT = 0x3F8
RTC_PORT = 0x70
POST_PORT = 0x80
KEYBOARD_PORT = 0x64
"""The i8042's command port: guests reset a PC through it."""
EVENT_PORT = 0x600
"""`posada.vmm.legacy.acpi`: events, sleep and reset registers."""

COM1_GSI = 4
RTC_GSI = 8
EVENT_GSI = 9
VIRTIO_GSIS = (5, 6, 7, *range(10, 24))
"""Edge-triggered and shareable: the device in slot n takes number n modulo their count."""
