"""Guest memory's one door: what it lets through, and where two regions part."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posada.vmm.memory import GAP_END, GAP_START, GIB, PAGE, BadAddress, GuestMemory

MIB = 1 << 20


def test_small_memory_is_one_region_from_zero() -> None:
    memory = GuestMemory.anonymous(16 * MIB)
    assert [(r.base, r.size) for r in memory.regions] == [(0, 16 * MIB)]
    assert memory.regions[0].address % (2 * MIB) == 0


def test_memory_beyond_the_gap_goes_on_at_four_gib() -> None:
    memory = GuestMemory.anonymous(5 * GIB)
    assert [(r.base, r.size) for r in memory.regions] == [(0, 3 * GIB), (4 * GIB, 2 * GIB)]
    assert memory.regions[1].address == memory.regions[0].address + 3 * GIB
    memory.write(GAP_END, b"high")
    assert memory.read(GAP_END, 4) == b"high"
    assert memory.read(0, 4) == bytes(4)
    for address, length in ((GAP_START, 1), (GAP_START - 1, 2), (GAP_END - 1, 1), (6 * GIB, 1), (6 * GIB - 1, 2)):
        with pytest.raises(BadAddress):
            memory.view(address, length)


@given(st.integers(-(1 << 65), 1 << 65), st.integers(-(1 << 65), 1 << 65))
def test_no_address_leads_out(address: int, length: int) -> None:
    memory = GuestMemory.anonymous(16 * PAGE)
    inside = length >= 0 and address >= 0 and address + length <= 16 * PAGE
    try:
        view = memory.view(address, length)
    except BadAddress:
        assert not inside
    else:
        assert inside and len(view) == length


def test_numbers_are_little_endian_and_whole() -> None:
    memory = GuestMemory.anonymous(PAGE)
    memory.put_u64(0, 0x1122334455667788)
    assert memory.read(0, 8) == bytes.fromhex("8877665544332211")
    memory.put_u32(1, 0xAABBCCDD)
    memory.put_u16(6, 0x0102)
    assert (memory.u32(1), memory.u16(6), memory.u64(0)) == (0xAABBCCDD, 0x0102, 0x010233AABBCCDD88)
    with pytest.raises(BadAddress):
        memory.u64(PAGE - 7)


def test_a_write_is_whole_or_not_at_all() -> None:
    memory = GuestMemory.anonymous(PAGE)
    with pytest.raises(BadAddress):
        memory.write(PAGE - 2, b"abc")
    assert memory.read(PAGE - 2, 2) == bytes(2)


def test_a_file_is_read_but_never_written(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "memory")
    with open(path, "wb") as file:
        file.write(b"x" * 4 * PAGE)
    fd = os.open(path, os.O_RDONLY)
    memory = GuestMemory.from_file(fd, 4 * PAGE)
    os.close(fd)
    assert memory.read(PAGE, 2) == b"xx"
    memory.write(PAGE, b"changed")
    memory.discard(PAGE, PAGE)
    assert memory.read(PAGE, 7) == b"x" * 7
    with open(path, "rb") as file:
        assert file.read() == b"x" * 4 * PAGE


def test_a_file_that_is_too_short_is_refused(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "memory")
    with open(path, "wb") as file:
        file.write(b"x" * PAGE)
    with open(path, "rb") as file, pytest.raises(ValueError):
        GuestMemory.from_file(file.fileno(), 2 * PAGE)


def test_discard_gives_back_whole_pages_only() -> None:
    memory = GuestMemory.anonymous(8 * PAGE)
    memory.write(0, b"a" * 8 * PAGE)
    memory.discard(PAGE + 1, 2 * PAGE)
    assert memory.read(0, 8 * PAGE) == b"a" * 2 * PAGE + bytes(PAGE) + b"a" * 5 * PAGE
    memory.discard(0, 10)
    assert memory.read(0, 1) == b"a"
    memory.discard(8 * PAGE, 0)
    with pytest.raises(BadAddress):
        memory.discard(7 * PAGE, 2 * PAGE)


@pytest.mark.parametrize("size", [0, 1, PAGE + 1, -PAGE, (1 << 40) + PAGE])
def test_odd_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError):
        GuestMemory.anonymous(size)


def test_huge_pages_on_request() -> None:
    memory = GuestMemory.anonymous(8 * MIB, hugepages=True)
    memory.write(2 * MIB, b"a" * 2 * MIB)
    with open("/proc/self/smaps") as file:
        maps = file.read().split("VmFlags:")
    address = memory.regions[0].address - memory.regions[0].offset
    mine = next(text for text in maps if f"{address:x}-" in text)
    assert " hg" in maps[maps.index(mine) + 1].split("\n")[0]  # madvise(MADV_HUGEPAGE)
