"""A guest's page tables, walked by hand: tables of every kind, hostile ones, and what KVM_TRANSLATE does not show."""

from __future__ import annotations

import pytest
from kvm_kit import CODE, PAGE_TABLES, Memory, Toy, needs_kvm, write_table

from posada.errors import KvmError
from posada.kvm import System
from posada.kvm.paging import translate, walk

TABLES = 0x10_000
NX = 1 << 63
KERNEL = 0xFFFF_8000_0000_0000


@pytest.fixture
def memory() -> Memory:
    """Four levels: at 0 a page of 4 KiB, at 2 MiB one of 2 MiB, at 1 GiB one of 1 GiB; all of it again from KERNEL on."""
    found = Memory(1 << 20)
    write_table(found, TABLES, {0: TABLES + 0x1000 | 7, 256: TABLES + 0x1000 | 3})
    write_table(found, TABLES + 0x1000, {0: TABLES + 0x2000 | 7, 1: 3 << 30 | 0x87, 2: 0xF_0000_0000 | 7})
    write_table(found, TABLES + 0x2000, {0: TABLES + 0x3000 | 7, 1: 5 << 21 | 0x87})
    write_table(found, TABLES + 0x3000, {0: 0x7000 | 5 | NX, 1: 0x8000})
    return found


@pytest.mark.parametrize(
    ("linear", "physical"),
    [
        (0x123, 0x7123),
        (0x1000, None),  # not present
        (0x20_0456, (5 << 21) + 0x456),
        (0x3F_FFFF, (5 << 21) + 0x1F_FFFF),
        (0x4000_0789, (3 << 30) + 0x789),
        (0x40_0000, None),
        (0x8000_0000, None),  # its table is no memory
        (1 << 39, None),
        (KERNEL + 0x123, 0x7123),
        (1 << 47, None),  # not canonical
        (KERNEL ^ 1 << 62, None),
        ((1 << 64) - 1, None),
    ],
)
def test_four_levels(memory: Memory, linear: int, physical: int | None) -> None:
    assert walk(memory, TABLES | 0x18, 4, linear) == physical


def test_five_levels(memory: Memory) -> None:
    write_table(memory, 0x20_000, {0: TABLES | 7, 511: TABLES | 7})
    assert walk(memory, 0x20_000, 5, 0x20_0456) == (5 << 21) + 0x456
    assert walk(memory, 0x20_000, 5, 0xFFFF_0000_0020_0456) == (5 << 21) + 0x456
    assert walk(memory, 0x20_000, 5, 0x00FF_0000_0020_0456) is None
    assert walk(memory, 0x20_000, 5, 1 << 56) is None


def test_tables_that_lead_to_themselves_end(memory: Memory) -> None:
    write_table(memory, 0x30_000, dict.fromkeys(range(512), 0x30_000 | 7))
    assert walk(memory, 0x30_000, 4, 0x1234_5678) == 0x30_678
    assert walk(memory, 1 << 51, 4, 0) is None


@needs_kvm
def test_a_programs_page_is_seen_where_the_kernel_may_not_look() -> None:
    with System.open() as system:
        toy = Toy(system, b"\xf4", long_mode=True)  # its pages are all a program's
        sregs = toy.vcpu.get_sregs()
        sregs.cr4 |= 1 << 21  # SMAP
        try:
            toy.vcpu.set_sregs(sregs)
        except KvmError:
            pytest.skip("this processor has no SMAP")
        assert translate(toy.vcpu, toy.memory, CODE + 1) == CODE + 1
        assert translate(toy.vcpu, toy.memory, PAGE_TABLES) == PAGE_TABLES
        assert translate(toy.vcpu, toy.memory, 1 << 40) is None
        toy.close()
