"""In-place reset on toy guests and the host's own /dev/kvm; the arithmetic of dirty pages without one."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from kvm_kit import CODE, needs_kvm
from machine_kit import COUNTER, MIB, Machine, counter, spin, tidy, toy
from test_vmm_snapshot import save

from posada.kvm import Exit
from posada.vmm import memfile
from posada.vmm.dirty import DirtyPages, as_runs, set_bits
from posada.vmm.memory import PAGE, GuestMemory
from posada.vmm.pagemap import PageMap
from posada.vmm.reset import Point

DIRTY_50 = bytes.fromhex(
    "b9 32 00"  # mov cx, 50
    "bb 00 10"  # mov bx, 0x1000
    "8e c3"  # next: mov es, bx
    "26 ff 06 00 00"  # inc word [es:0]
    "81 c3 00 01"  # add bx, 0x100: a page further
    "e2 f3"  # loop next
    "66 ff 06 00 20"  # inc dword [0x2000]
    "66 a1 00 20"  # mov eax, [0x2000]
    "66 e7 10"  # out 0x10, eax
    "eb df"  # jmp to the start
)


def content(machine: Machine) -> bytes:
    return bytes(memfile.linear(machine.memory)[0])


def step(machine: Machine, until: int = Exit.IO) -> None:
    """One exit of the first vcpu, on this thread, and the access completed."""
    vcpu = machine.vcpus.threads[0].vcpu
    assert vcpu.run() == until
    vcpu.immediate_exit = 1
    vcpu.run()
    vcpu.immediate_exit = 0


@needs_kvm
def test_memory_registers_and_devices_go_back() -> None:
    machine, _ = toy(DIRTY_50)
    step(machine)
    point = Point(machine, PageMap.open())
    before = content(machine), machine.save()
    for _ in range(5):
        step(machine)
        machine.rtc.write(0, 1, 5)
        machine.slots["rng"].transport.write(0x70, 4, 1)
        machine.memory.write(3 * MIB, b"a device's write")
        assert content(machine) != before[0]
        pages = point.put_back()
        assert 50 <= pages <= 60
        assert content(machine) == before[0]
        after = machine.save()
        for key in ("rtc", "serial", "power", "virtio"):
            assert after[key] == before[1][key]
        for key in ("regs", "sregs", "events", "mp_state", "lapic"):
            assert after["cpus"][0][key] == before[1]["cpus"][0][key]
    point.close()
    point.close()
    step(machine)
    machine.close()


@needs_kvm
def test_a_machine_on_memory_files_goes_back(tmp_path: Path) -> None:
    """Pages of the file come back by forgetting, own ones from the copy."""
    machine, _ = toy(DIRTY_50)
    machine.memory.write(8 * MIB, b"in the file")
    saved = save_built(machine, tmp_path)
    again, _ = saved.restore()
    again.memory.write(9 * MIB, b"own")
    point = Point(again, PageMap.open())
    before = content(again)
    for _ in range(3):
        step(again)
        again.memory.write(8 * MIB, b"changed")
        again.memory.write(9 * MIB, b"changed")
        point.put_back()
        assert content(again) == before
    point.close()
    again.close()


def save_built(machine: Machine, tmp_path: Path) -> Any:
    machine.start()
    spin(machine, lambda: counter(machine) > 2)
    saved = save(machine, tmp_path)
    machine.close()
    return saved


@needs_kvm
def test_a_running_machine_is_reset_again_and_again() -> None:
    machine, probe = toy()
    machine.start()
    spin(machine, lambda: counter(machine) > 10)
    point = Point(machine, PageMap.open())
    at = int.from_bytes(point._copy[COUNTER : COUNTER + 4], "little")
    for _ in range(20):
        with machine.loop.lock:
            point.reset()
            probe.values.clear()
        spin(machine, lambda: len(probe.values) > 3)
        assert probe.values[0] in (at, at + 1) and probe.values[1] == probe.values[0] + 1
    point.close()
    start = counter(machine)
    spin(machine, lambda: counter(machine) > start + 10)
    machine.close()


@needs_kvm
def test_what_the_balloon_gave_back_comes_back() -> None:
    machine, _ = toy()
    machine.memory.write(5 * MIB, b"needed at the point")
    point = Point(machine, PageMap.open())
    machine.memory.discard(5 * MIB, PAGE)
    assert machine.memory.read(5 * MIB, 4) == bytes(4)
    assert point.put_back() == 1
    assert machine.memory.read(5 * MIB, 6) == b"needed"
    point.close()
    machine.close()


@needs_kvm
def test_dirty_pages_are_told_once() -> None:
    machine, _ = toy(DIRTY_50, memory=GuestMemory.anonymous(16 * MIB))
    dirty = DirtyPages(machine)
    step(machine)
    pages = dirty.collect()
    assert [page for page in pages if page >= 16] == [0x10 + n for n in range(50)]
    assert COUNTER // PAGE in pages and CODE // PAGE not in pages
    assert dirty.collect() == []
    dirty.mark(MIB - 1, 2)
    assert dirty.collect() == [255, 256]
    step(machine)
    assert dirty.collect() == pages
    dirty.close()
    machine.close()


def test_bits_and_runs() -> None:
    rng = random.Random(5)
    for _ in range(50):
        wanted = sorted(rng.sample(range(4096), rng.randrange(60)))
        bitmap = bytearray(512)
        for bit in wanted:
            bitmap[bit // 8] |= 1 << bit % 8
        assert set_bits(bitmap, 7) == [7 + bit for bit in wanted]
        again = [at // PAGE for offset, length in as_runs(wanted) for at in range(offset, offset + length, PAGE)]
        assert again == wanted
    assert as_runs([]) == []
    assert as_runs([3, 4, 9]) == [(3 * PAGE, 2 * PAGE), (9 * PAGE, PAGE)]


@needs_kvm
def test_a_disk_that_was_written_to_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("posada.vmm.virtio.blk")
    from posada.errors import EngineError
    from posada.vmm.config import DiskConfig

    disk = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    os.ftruncate(disk, MIB)
    machine, _ = toy(disks=(DiskConfig("root", MIB, ((disk, "raw"),)),))
    point = Point(machine, PageMap.open())
    point.put_back()
    machine.slots["disk:root"].transport.device._counters["writes"] += 1
    with pytest.raises(EngineError, match="written"):
        point.put_back()
    machine.close()


assert tidy  # a fixture for every test here
