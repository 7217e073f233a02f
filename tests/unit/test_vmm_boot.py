"""Loading kernels: what lies where afterwards, and what is refused."""

from __future__ import annotations

import os
import struct

import pytest
from tests.unit.vmm_kernels import LOAD, bzimage, elf, file

from posada.errors import ImageError, PosadaError, SpecError
from posada.vmm import layout
from posada.vmm.boot.cpu import Entry, Mode
from posada.vmm.boot.load import load
from posada.vmm.memory import GIB, GuestMemory

MIB = 1 << 20
RSDP = 0xE0000


def boot(kernel: bytes, initrd: bytes = b"", line: str = "quiet", size: int = 16 * MIB) -> tuple[GuestMemory, Entry]:
    memory = GuestMemory.anonymous(size)
    fds = [file(kernel), file(initrd)]
    try:
        return memory, load(memory, fds[0], fds[1] if initrd else -1, line, RSDP)
    finally:
        for fd in fds:
            os.close(fd)


def test_pvh_start_info() -> None:
    memory, entry = boot(elf(b"\xf4" * 100, segments=[(0x20_0000, b"data")]), b"I" * 5000)
    assert entry == Entry(Mode.PVH, LOAD)
    assert memory.read(LOAD, 100) == b"\xf4" * 100
    assert memory.read(0x20_0000, 5) == b"data\0"
    info = struct.unpack("<IIIIQQQQII", memory.read(layout.START_INFO, 56))
    assert info == (0x336EC578, 1, 0, 1, layout.MODULE_LIST, layout.COMMAND_LINE, RSDP, layout.MEMORY_MAP, 3, 0)
    assert memory.read(layout.COMMAND_LINE, 6) == b"quiet\0"
    address, size, _, _ = struct.unpack("<QQQQ", memory.read(layout.MODULE_LIST, 32))
    assert (address, size) == (16 * MIB - 8192, 5000)
    assert memory.read(address, size) == b"I" * 5000
    ranges = list(struct.iter_unpack("<QQII", memory.read(layout.MEMORY_MAP, 72)))
    assert ranges == [(0, 0x9FC00, 1, 0), (0x9FC00, 0x60400, 2, 0), (MIB, 15 * MIB, 1, 0)]


def test_an_elf_kernel_without_the_note_starts_in_long_mode() -> None:
    memory, entry = boot(elf(b"\xf4" * 100, pvh=False, entry=LOAD + 16))
    assert entry == Entry(Mode.LINUX64, LOAD + 16)
    page = memory.read(layout.ZERO_PAGE, 4096)
    assert page[0x1FE:0x206] == b"\x55\xaa\0\0HdrS"
    assert struct.unpack_from("<Q", page, 0x70) == (RSDP,)
    assert struct.unpack_from("<I", page, 0x228) == (layout.COMMAND_LINE,)
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)
    assert page[0x1E8] == 3
    assert memory.u64(layout.PML4) == layout.PDPT | 3
    assert memory.u64(layout.PDPT + 24) == layout.PAGE_DIRECTORIES + 0x3000 | 3
    assert memory.u64(layout.PAGE_DIRECTORIES + 8 * 2047) == 2047 << 21 | 0x83


def test_bzimage() -> None:
    memory, entry = boot(bzimage(b"\xf4"), b"I" * 100)
    assert entry == Entry(Mode.LINUX64, LOAD + 0x200)
    assert memory.read(LOAD + 0x200, 2) == b"\xf4\0"
    page = memory.read(layout.ZERO_PAGE, 4096)
    assert page[0x202:0x206] == b"HdrS" and page[0x210] == 0xFF
    assert struct.unpack_from("<II", page, 0x218) == (16 * MIB - 4096, 100)


def test_memory_above_the_gap_is_in_the_map() -> None:
    memory, _ = boot(elf(b"\xf4"), b"I", size=4 * GIB)
    ranges = list(struct.iter_unpack("<QQII", memory.read(layout.MEMORY_MAP, 96)))
    assert ranges[2:] == [(MIB, 3 * GIB - MIB, 1, 0), (4 * GIB, GIB, 1, 0)]
    assert memory.u64(layout.MODULE_LIST) == 3 * GIB - 4096


def test_an_initrd_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ImageError, match="does not fit"):
        boot(elf(b"\xf4", memory_size=14 * MIB), b"I" * (2 * MIB))


def test_a_kernel_that_needs_more_memory_is_refused() -> None:
    with pytest.raises(ImageError, match="needs memory"):
        boot(elf(b"\xf4", memory_size=32 * MIB))
    with pytest.raises(ImageError, match="needs memory"):
        boot(bzimage(b"\xf4", init_size=32 * MIB))


@pytest.mark.parametrize("line", ["x" * 2048, "a\0b", "ü" * 1024])
def test_a_command_line_the_kernel_would_cut_is_refused(line: str) -> None:
    with pytest.raises(SpecError):
        boot(elf(b"\xf4"), line=line)
    boot(elf(b"\xf4"), line="x" * 2047)


@pytest.mark.parametrize(
    "kernel",
    [
        b"", b"MZ", b"\x7fELF", bytes(4096), elf(b"\xf4")[:100], elf(b"\xf4")[:-20],
        elf(b"\xf4", address=0x9000), elf(b"\xf4", entry=0x20_0000), elf(b"\xf4", pvh=False, entry=0),
        elf(b"\xf4", address=1 << 62, entry=1 << 62), elf(b"\xf4", segments=[((1 << 64) - 4, b"abcd")]),
        elf(b"\xf4").replace(b"\x7fELF\x02", b"\x7fELF\x01"), bzimage(b"\xf4", version=0x20B),
        bzimage(b"\xf4", flags=0), bzimage(b"\xf4")[:1100], bzimage(b"\xf4", address=0), bzimage(b"\xf4", address=1 << 63),
        bzimage(b"\xf4").replace(b"\xeb\x6a", b"\xeb\x10"),
    ],
)  # fmt: skip
def test_what_is_no_kernel_is_refused(kernel: bytes) -> None:
    with pytest.raises(ImageError):
        boot(kernel)


def test_every_refusal_is_one_of_ours() -> None:
    kernel = elf(b"\xf4")
    for at in range(0, len(kernel), 3):
        broken = bytearray(kernel)
        broken[at] ^= 0xFF
        try:
            boot(bytes(broken))
        except PosadaError:
            pass


def test_boot_structures_do_not_overlap() -> None:
    sizes = {
        layout.GDT: 48, layout.START_INFO: 4096, layout.ZERO_PAGE: 4096, layout.BOOT_STACK - 0xFF0: 4096,
        layout.PML4: 4096, layout.PDPT: 4096, layout.PAGE_DIRECTORIES: 4 * 4096,
        layout.COMMAND_LINE: layout.COMMAND_LINE_MAX, layout.LOW_RAM_END: 0,
        layout.ACPI_TABLES: layout.ACPI_TABLES_SIZE, layout.VMGENID: 4096, layout.RESET_VECTOR: 16,
    }  # fmt: skip
    places = sorted(sizes.items())
    assert all(at + size <= places[i + 1][0] for i, (at, size) in enumerate(places[:-1]))
    assert sum(places[-1]) <= layout.HIGH_RAM
    assert layout.MEMORY_MAP + 24 * 4 <= layout.MODULE_LIST <= layout.START_INFO + 4096 - 32
