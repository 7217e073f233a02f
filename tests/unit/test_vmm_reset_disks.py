"""In-place reset of machines that write to their disks: a driver of the machine's own device, real files below."""

from __future__ import annotations

import copy
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvm_kit import needs_kvm
from machine_kit import MIB, Machine, tidy, toy
from tests.unit.blk_kit import DISCARD, FLUSH, IN, OK, OUT, WRITE_ZEROES, header, segment
from tests.unit.block_kit import SIZE, check, needs_qemu_img, pattern, read, write

from posada.errors import EngineError, ImageError
from posada.storage import qcow2
from posada.vmm import memfile
from posada.vmm.block.chain import overlay
from posada.vmm.block.raw import RawDisk
from posada.vmm.block.throwaway import Throwaway
from posada.vmm.config import DiskConfig
from posada.vmm.pagemap import PageMap
from posada.vmm.reset import Point
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.testing import FakeDriver

pytestmark = needs_kvm
HEAP = 4 * MIB
"""Where the driver's rings and buffers are: the toy guest is below."""


class Driver(FakeDriver):
    """Of a device that is in a machine, behind the machine's own transport."""

    def __init__(self, machine: Machine, name: str) -> None:
        slot = machine.slots[name]
        self.device, self.transport = slot.transport.device, slot.transport  # type: ignore[assignment]
        self.memory, self.loop = machine.memory, machine.loop
        self.interrupts, self.size, self.features, self.rings = 0, 16, (1 << 64) - 1, []
        self.start()

    def allocate(self, size: int) -> int:
        return super().allocate(size) + HEAP

    def ask(self, readable: list[bytes], writable: list[int]) -> bytes:
        """`send`, of what may take a while: a flush waits for the host's disk."""
        self.put(readable, writable)
        self.kick()
        found: list[bytes] = []

        def came() -> bool:
            found.extend(done.data for done in self.collect())
            return bool(found)

        self.until(came)
        return found[0]

    def driver_state(self) -> Any:
        return copy.deepcopy((self.rings, self._free, self._heap))

    def back(self, state: Any) -> None:
        """What the guest knows is in its memory, and goes back with it."""
        self.rings, self._free, self._heap = copy.deepcopy(state)

    def write(self, *args: Any) -> None:  # type: ignore[override]
        """A register, or (bytes) a part of the disk."""
        if isinstance(args[1], bytes):
            assert self.send([header(OUT, args[0] // 512), args[1]], [1]) == OK
        else:
            super().write(*args)

    def read_disk(self, offset: int, length: int) -> bytes:
        data = self.send([header(IN, offset // 512)], [length, 1])
        assert data[-1:] == OK
        return data[:-1]


class World:
    """A toy machine with a disk, raw or qcow2, its driver, and empty layers."""

    def __init__(self, folder: Path, format: str) -> None:
        self.folder, self.made = folder, 0
        self.path = folder / f"disk.{format}"
        if format == "raw":
            self.path.write_bytes(pattern(SIZE, 1))
        else:
            qcow2.create_empty(self.path, size=SIZE)
        fd = os.open(self.path, os.O_RDWR)
        self.machine, _ = toy(disks=(DiskConfig("root", SIZE, ((fd, format),)),))
        self.driver = Driver(self.machine, "disk:root")
        device = self.driver.device
        assert isinstance(device, Blk)
        self.blk = device
        if format == "qcow2":
            write(self.blk.disk, 0, pattern(SIZE, 1))

    def layer(self, size: int = SIZE) -> int:
        self.made += 1
        self.top = self.folder / f"top{self.made}.qcow2"
        qcow2.create_overlay(self.top, size=size, backing=self.path, backing_format=self.path.suffix[1:])
        return os.open(self.top, os.O_RDWR)

    def reset(self, point: Point, state: Any) -> None:
        """``state``: the driver's, at the point. A guest's own writes are in KVM's log; the driver's are not."""
        point._dirty.mark(HEAP, 2 * MIB)
        point.put_back()
        self.driver.back(state)

    def point(self, fd: int | None = None) -> Point:
        fd = self.layer() if fd is None else fd
        try:
            return Point(self.machine, PageMap.open(), {"root": fd})
        finally:
            os.close(fd)


@pytest.fixture(params=["raw", "qcow2"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(tmp_path, request.param)
    yield world
    world.machine.close()


@needs_qemu_img
def test_what_was_written_is_gone_each_time(world: World) -> None:
    driver, machine = world.driver, world.machine
    driver.write(MIB, b"before the point".ljust(512))
    point, state = world.point(), driver.driver_state()
    before = bytes(memfile.linear(machine.memory)[0])
    at_point = bytearray(pattern(SIZE, 1))
    at_point[MIB : MIB + 512] = b"before the point".ljust(512)
    below = world.path.read_bytes()
    for turn in range(4):
        driver.write(0, bytes([turn]) * 69_632)
        driver.write(3 * MIB + 512, bytes([turn]) * 200_192)
        assert driver.send([header(DISCARD), segment(2048, 256)], [1]) == OK
        assert driver.send([header(WRITE_ZEROES), segment(4096, 256)], [1]) == OK
        assert driver.ask([header(FLUSH)], [1]) == OK
        assert driver.read_disk(0, 512) == bytes([turn]) * 512
        world.reset(point, state)
        assert bytes(memfile.linear(machine.memory)[0]) == before
        assert read(world.blk.disk, 0, SIZE) == at_point
        check(world.top)
        assert driver.read_disk(MIB, 512) == b"before the point".ljust(512)
        world.reset(point, state)
    assert world.path.read_bytes() == below
    point.close()
    driver.write(0, b"it goes on".ljust(512))
    assert driver.ask([header(FLUSH)], [1]) == OK
    machine.close()
    check(world.top)
    assert world.path.read_bytes() == below


@pytest.mark.parametrize("world", ["raw"], indirect=True)
def test_a_flush_under_way_is_waited_for_first(world: World) -> None:
    """Its answer would come into memory that is put back already."""
    driver, machine = world.driver, world.machine
    point, state = world.point(), driver.driver_state()
    before = bytes(memfile.linear(machine.memory)[0])
    driver.write(0, b"x" * 512)
    world.blk.disk.file.slow = True  # type: ignore[attr-defined]
    driver.put([header(FLUSH)], [1])
    driver.transport.notify(0)
    assert world.blk._flushing or world.blk._worker._pending == 0
    world.reset(point, state)
    assert not world.blk._flushing
    assert bytes(memfile.linear(machine.memory)[0]) == before
    assert driver.read_disk(0, 512) == pattern(SIZE, 1)[:512]
    point.close()


@pytest.mark.parametrize("world", ["raw"], indirect=True)
def test_an_interrupt_that_was_raised_is_raised_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the interrupt controllers' own state, which may be from before it came."""
    world.driver.write(0, b"x" * 512)
    transport = world.driver.transport
    assert transport.interrupt_status, "the driver has not looked yet"
    point, happened = world.point(), []
    put_back = point._replay.put_back
    monkeypatch.setattr(point._replay, "put_back", lambda: (happened.append("kvm"), put_back()))
    monkeypatch.setattr(transport, "_interrupt", lambda: happened.append("interrupt"))
    point.put_back()
    assert happened == ["kvm", "interrupt"]
    assert transport.pending, "and what may have been asked for is looked at"
    point.close()


def test_without_a_layer_it_is_refused(world: World) -> None:
    point = Point(world.machine, PageMap.open())
    point.put_back()
    world.driver.write(0, b"x" * 512)
    with pytest.raises(EngineError, match="written to since"):
        point.put_back()
    point.close()


def _other_layer(world: World) -> None:
    world.blk.freeze()
    world.blk.disk = overlay(world.blk.disk, world.layer())


@pytest.mark.parametrize(
    "change", [_other_layer, lambda world: world.blk.resize(2 * SIZE)], ids=["switched", "resized"]
)
def test_a_disk_that_is_another_one_is_refused(world: World, change: Callable[[World], object]) -> None:
    point = world.point()
    change(world)
    with pytest.raises(EngineError, match="not what it was"):
        point.put_back()
    point.close()


def _full(world: World) -> int:
    fd = world.layer()
    top = overlay(RawDisk(os.open(world.folder / "zeros", os.O_RDWR | os.O_CREAT), SIZE), os.dup(fd))
    write(top, 0, b"x" * 512)
    top.close()
    return fd


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda world: world.layer(2 * SIZE), "not of"),
        (_full, "holds something"),
        (lambda world: os.open(world.path.with_name("raw"), os.O_RDWR | os.O_CREAT), "qcow2"),
    ],
)
def test_layers_that_do_not_fit_change_nothing(world: World, make: Callable[[World], int], problem: str) -> None:
    before = world.blk.disk
    with pytest.raises(ImageError, match=problem):
        world.point(make(world))
    assert world.blk.disk is before and not before.readonly
    with pytest.raises(EngineError, match="no disk named"):
        Point(world.machine, PageMap.open(), {"data": 0})
    world.driver.write(0, b"x" * 512)


class Killed(Exception):
    pass


@needs_qemu_img
@pytest.mark.parametrize("survives", range(3))
def test_a_monitor_that_is_killed_in_the_middle_leaves_a_correct_image(
    tmp_path: Path, survives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below.raw").write_bytes(pattern(SIZE, 1))
    below = RawDisk(os.open(tmp_path / "below.raw", os.O_RDWR))
    qcow2.create_overlay(tmp_path / "top.qcow2", size=SIZE, backing=tmp_path / "below.raw", backing_format="raw")
    fd = os.open(tmp_path / "top.qcow2", os.O_RDWR)
    layer = Throwaway(below, fd)
    os.close(fd)
    disk = layer.put()
    write(disk, 0, pattern(MIB, 2))
    disk.flush()
    left = survives

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*args)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", mortal(os.pwritev))
        patch.setattr(os, "ftruncate", mortal(os.ftruncate))
        with pytest.raises(Killed):
            layer.renew()
    check(tmp_path / "top.qcow2", leaks=True)
    info = struct.unpack(">Q", (tmp_path / "top.qcow2").read_bytes()[3 << 16 : (3 << 16) + 8])
    assert (info[0] == 0) is (survives > 0)


assert tidy  # a fixture for every test here
