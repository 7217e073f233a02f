"""The guest's CPUID: hypervisor bit, topology, what is hidden; and whether a saved one fits a host."""

from __future__ import annotations

import pytest
from kvm_kit import needs_kvm

from posada.kvm import System
from posada.kvm.numbers import CPUID_INDEXED
from posada.kvm.structs import CpuidEntry
from posada.vmm.cpuid import guest_cpuid, missing_features

ONES = 0xFFFFFFFF


def leaf(function: int, index: int = 0, **registers: int) -> CpuidEntry:
    return CpuidEntry(function, index, CPUID_INDEXED if index else 0, **registers)


def generous() -> list[CpuidEntry]:
    """A host that offers everything."""
    full = {"eax": ONES, "ebx": ONES, "ecx": ONES, "edx": ONES}
    return [
        leaf(0, eax=0x1F),
        *(leaf(function, **full) for function in (1, 7, 0xA, 0x12, 0x14, 0x80000001, 0x80000007, 0x8000000A)),
        leaf(4, 0, eax=0x121),
        leaf(4, 3, eax=0xFC00C163),
        leaf(0xB, 0, edx=99),
        leaf(0xB, 1, edx=99),
        leaf(0x1F, 0, edx=99),
        leaf(0x80000008, ecx=0x7007),
        leaf(0x8000001D, 3, eax=0x1C163),
        leaf(0x8000001E, eax=99, ebx=99, ecx=99),
    ]


def by_leaf(entries: list[CpuidEntry]) -> dict[tuple[int, int], CpuidEntry]:
    found = {(entry.function, entry.index): entry for entry in entries}
    assert len(found) == len(entries), "a leaf is there twice"
    return found


def test_the_hypervisor_shows_itself_and_what_cannot_be_saved_is_hidden() -> None:
    leaves = by_leaf(guest_cpuid(generous(), 0, 1))
    assert leaves[1, 0].ecx >> 31 & 1
    assert not leaves[1, 0].ecx >> 5 & 1, "VMX"
    assert not leaves[1, 0].edx >> 28 & 1, "one core is not multi-threaded"
    assert not leaves[0x80000001, 0].ecx >> 2 & 1, "SVM"
    for hidden in ((0xA, 0), (0x12, 0), (0x14, 0), (0x8000000A, 0)):
        assert leaves[hidden].eax == leaves[hidden].ebx == 0
    assert not leaves[7, 0].ebx & (1 << 2 | 1 << 25)
    assert not leaves[0x80000007, 0].edx >> 8 & 1, "invariant TSC"
    assert leaves[1, 0].ecx >> 24 & 1
    assert by_leaf(guest_cpuid(generous(), 0, 1, nested=True))[1, 0].ecx >> 5 & 1
    bare = [leaf(0, eax=1), leaf(1)]
    assert by_leaf(guest_cpuid(bare, 0, 1, tsc_deadline=False))[1, 0].ecx == 1 << 31


@pytest.mark.parametrize(("index", "count", "bits"), [(0, 1, 0), (1, 2, 1), (2, 3, 2), (7, 8, 3), (254, 255, 8)])
def test_each_vcpu_is_a_core_of_one_socket(index: int, count: int, bits: int) -> None:
    leaves = by_leaf(guest_cpuid(generous(), index, count))
    assert leaves[1, 0].ebx >> 24 == index
    assert leaves[1, 0].ebx >> 16 & 0xFF == (1 << bits) & 0xFF
    for function in (0xB, 0x1F):
        threads, cores, end = (leaves[function, i] for i in range(3))
        assert (threads.eax, threads.ebx, threads.ecx) == (0, 1, 1 << 8)
        assert (cores.eax, cores.ebx, cores.ecx) == (bits, count, 1 | 2 << 8)
        assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
        assert {threads.edx, cores.edx, end.edx} == {index}
    assert (leaves[4, 0].eax >> 14 & 0xFFF, leaves[4, 3].eax >> 14 & 0xFFF) == (0, (1 << bits) - 1)
    assert leaves[4, 3].eax >> 26 == ((1 << bits) - 1) & 0x3F
    assert leaves[0x8000001D, 3].eax >> 14 & 0xFFF == (1 << bits) - 1
    assert leaves[0x8000001E, 0].eax == index
    assert leaves[0x80000008, 0].ecx == (count - 1) | bits << 12


def test_the_hosts_leaves_are_not_changed_and_bad_counts_are_refused() -> None:
    host = generous()
    before = [bytes(entry) for entry in host]
    guest_cpuid(host, 3, 4)
    assert [bytes(entry) for entry in host] == before
    for index, count in ((1, 1), (-1, 1), (0, 256)):
        with pytest.raises(ValueError, match="at most 255"):
            guest_cpuid(host, index, count)


def test_a_host_that_lacks_a_feature_is_named_by_its_bit() -> None:
    rich, poor = generous(), generous()
    for entry in poor:
        if entry.function == 7:
            entry.ebx &= ~(1 << 16)
        if entry.function == 1:
            entry.ecx &= ~(1 << 28 | 1 << 24)
    saved = guest_cpuid(rich, 1, 4)
    assert missing_features(saved, rich) == []
    assert missing_features(saved, poor) == ["0x1.ecx.28", "0x7.ebx.16"]
    assert missing_features(guest_cpuid(poor, 0, 2), rich) == []
    rich[0].ebx = 0x756E6547
    assert missing_features(saved, rich) == ["vendor"]


@needs_kvm
def test_the_real_hosts_policy_is_accepted_by_the_kernel() -> None:
    with System.open() as system, system.create_vm() as vm:
        vm.create_irqchip()
        for index in range(4):
            leaves = guest_cpuid(system.supported_cpuid(), index, 4)
            by_leaf(leaves)
            with vm.create_vcpu(index) as vcpu:
                vcpu.set_cpuid(leaves)
                assert len(vcpu.get_cpuid()) == len(leaves)
                assert missing_features(leaves, system.supported_cpuid()) == []
