"""A kernel file, an initrd and a command line into guest memory. Files are untrusted: every size is checked.

An ELF kernel with a PVH note starts through it; one without, and a bzImage, through Linux's 64-bit protocol.
"""

from __future__ import annotations

import os

from posada.errors import ImageError, SpecError
from posada.vmm import layout
from posada.vmm.boot import bzimage, cpu, elf, params
from posada.vmm.boot.cpu import Entry, Mode
from posada.vmm.memory import PAGE, BadAddress, GuestMemory

MAX_KERNEL = 256 << 20
"""Bytes of a kernel file."""
COMMAND_LINE_MAX = 2047
"""Linux on x86 keeps 2048 bytes (COMMAND_LINE_SIZE), the last one a NUL; it would cut the rest off silently."""


def load(memory: GuestMemory, kernel: int, initrd: int, command_line: str, rsdp: int) -> Entry:
    """Fill fresh guest memory from the open files ``kernel`` and ``initrd`` (-1: none); returns where to start.

    Raises ImageError for a kernel or initrd that is damaged or does not fit, SpecError for the command line.
    """
    size = os.fstat(kernel).st_size
    if size > MAX_KERNEL:
        raise ImageError(f"the kernel is larger than {MAX_KERNEL >> 20} MiB")
    cpu.write_tables(memory)
    if os.pread(kernel, 4, 0) == b"\x7fELF":
        return _load_elf(memory, kernel, size, initrd, command_line, rsdp)
    return _load_bzimage(memory, kernel, size, initrd, command_line, rsdp)


def _load_elf(memory: GuestMemory, fd: int, size: int, initrd: int, command_line: str, rsdp: int) -> Entry:
    kernel = elf.parse(fd, size)
    if kernel.start < layout.HIGH_RAM:
        raise ImageError(f"the kernel wants to be loaded at {kernel.start:#x}, below 1 MiB")
    for segment in kernel.segments:
        _read_into(fd, segment.offset, _room(memory, segment.address, segment.size)[: segment.file_size])
    _write_command_line(memory, command_line, COMMAND_LINE_MAX)
    given = params.Given(_map(memory), _load_initrd(memory, initrd, kernel.end, layout.LAST_LOW_BYTE), rsdp)
    if kernel.pvh_entry is not None:
        memory.write(layout.START_INFO, params.start_info(given))
        return Entry(Mode.PVH, kernel.pvh_entry)
    memory.write(layout.ZERO_PAGE, params.zero_page(given, b""))
    return Entry(Mode.LINUX64, kernel.entry)


def _load_bzimage(memory: GuestMemory, fd: int, size: int, initrd: int, command_line: str, rsdp: int) -> Entry:
    kernel = bzimage.parse(fd, size)
    if kernel.address < layout.HIGH_RAM:
        raise ImageError(f"the kernel wants to be loaded at {kernel.address:#x}, below 1 MiB")
    _read_into(fd, kernel.offset, _room(memory, kernel.address, kernel.room)[: kernel.size])
    _write_command_line(memory, command_line, min(COMMAND_LINE_MAX, kernel.command_line_max))
    given = params.Given(
        _map(memory), _load_initrd(memory, initrd, kernel.address + kernel.room, kernel.initrd_max), rsdp
    )
    memory.write(layout.ZERO_PAGE, params.zero_page(given, kernel.header))
    return Entry(Mode.LINUX64, kernel.entry)


def _load_initrd(memory: GuestMemory, fd: int, kernel_end: int, last: int) -> tuple[int, int] | None:
    """Put it as high as it may be, so that it is out of the unpacking kernel's way. Returns (address, size)."""
    if fd < 0:
        return None
    size = os.fstat(fd).st_size
    if size == 0:
        return None
    top = min(memory.regions[0].size, last + 1)
    address = (top - size) // PAGE * PAGE
    if address < kernel_end:
        raise ImageError(
            f"the initrd ({size} bytes) does not fit between the kernel and {top:#x}", hint="give the vm more memory"
        )
    _read_into(fd, 0, memory.view(address, size))
    return address, size


def _write_command_line(memory: GuestMemory, text: str, limit: int) -> None:
    line = text.encode()
    if len(line) > limit or b"\0" in line:
        raise SpecError("append", f"the kernel's command line is {len(line)} bytes long, and may be {limit}, no NUL")
    memory.write(layout.COMMAND_LINE, line + b"\0")


def _map(memory: GuestMemory) -> tuple[params.Range, ...]:
    return params.memory_map([(region.base, region.size) for region in memory.regions])


def _room(memory: GuestMemory, address: int, size: int) -> memoryview:
    try:
        return memory.view(address, size)
    except BadAddress:
        raise ImageError(
            f"the kernel needs memory from {address:#x} to {address + size:#x}", hint="give the vm more memory"
        ) from None


def _read_into(fd: int, offset: int, target: memoryview) -> None:
    """Straight from the page cache into guest memory. A file that shrinks meanwhile is an error, not a gap."""
    while target:
        count = os.preadv(fd, [target], offset)
        if count == 0:
            raise ImageError("a boot file ended before its headers said")
        target = target[count:]
        offset += count
