"""The balloon: pages given back are really gone, statistics come when asked for, targets reach the guest."""

from __future__ import annotations

import struct

import pytest

from posada.errors import StateError
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.balloon import DEFLATE_ON_OOM, PAGE, REPORTING, STATS_VQ, Balloon
from posada.vmm.virtio.mmio import Register
from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.transport import VERSION_1

INFLATE, DEFLATE, STATISTICS, REPORT = 0, 1, 2, 3
FIRST = 2048  # pages: the upper half of 16 MiB, where the driver keeps nothing


@pytest.fixture
def balloon() -> Balloon:
    return Balloon()


@pytest.fixture
def driver(balloon: Balloon) -> FakeDriver:
    return FakeDriver(balloon)


def pfns(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def fill(memory: GuestMemory, first: int, count: int) -> None:
    memory.write(first * PAGE, b"\xaa" * (count * PAGE))


def filled(memory: GuestMemory, first: int, count: int) -> list[bool]:
    return [any(memory.read(page * PAGE, PAGE)) for page in range(first, first + count)]


def test_what_it_offers() -> None:
    assert Balloon.features == STATS_VQ | DEFLATE_ON_OOM | REPORTING


def test_inflated_pages_are_gone(driver: FakeDriver) -> None:
    fill(driver.memory, FIRST, 8)
    driver.send([pfns(FIRST + 6, FIRST + 1, FIRST + 2, FIRST + 1)])
    assert filled(driver.memory, FIRST, 8) == [True, False, False, True, True, True, False, True]
    assert driver.transport.metrics()["discarded_bytes"] == 3 * PAGE


def test_deflated_pages_can_be_used(driver: FakeDriver) -> None:
    driver.send([pfns(FIRST)])
    driver.send([pfns(FIRST)], queue=DEFLATE)
    fill(driver.memory, FIRST, 1)
    assert filled(driver.memory, FIRST, 1) == [True]


@pytest.mark.parametrize("page", [4096, 0xFFFF_FFFF])
def test_pages_that_are_not_there(driver: FakeDriver, page: int) -> None:
    driver.put([pfns(page)])
    driver.kick()
    assert driver.needs_reset
    assert "no guest memory" in driver.transport.reason


def test_a_list_without_end(driver: FakeDriver) -> None:
    driver.put([bytes(4 * 1024 + 4)])
    driver.kick()
    assert driver.needs_reset


def test_a_list_with_half_a_number(driver: FakeDriver) -> None:
    fill(driver.memory, FIRST, 1)
    driver.send([pfns(FIRST) + b"\xff\xff"])
    assert filled(driver.memory, FIRST, 1) == [False]


class TestTarget:
    def test_reaches_the_guest(self, balloon: Balloon, driver: FakeDriver) -> None:
        balloon.set_target(12 << 20)
        assert driver.interrupts == 1
        assert driver.read(Register.INTERRUPT_STATUS) == 2
        assert struct.unpack("<II", driver.config()) == (1024, 0)
        driver.transport.write(0x104, 4, 1000)  # as the driver reports what it did
        assert balloon.inflated == 1000 * PAGE

    def test_is_not_the_drivers_to_write(self, balloon: Balloon, driver: FakeDriver) -> None:
        driver.transport.write(0x100, 8, 0xFFFF_FFFF_FFFF_FFFF)
        assert struct.unpack("<II", driver.config()) == (0, 0xFFFF_FFFF)
        driver.transport.write(0x103, 2, 0)
        assert struct.unpack("<II", driver.config()) == (0, 0xFFFF_FF00)

    @pytest.mark.parametrize("size", [0, -1, (16 << 20) + 1])
    def test_has_bounds(self, balloon: Balloon, driver: FakeDriver, size: int) -> None:
        with pytest.raises(ValueError, match="cannot have"):
            balloon.set_target(size)


class TestReporting:
    def test_reported_pages_are_gone(self, driver: FakeDriver) -> None:
        fill(driver.memory, 0x100, 64)
        request = driver.put(writable=[16 * PAGE, 4 * PAGE], queue=REPORT)
        driver.kick(REPORT)
        (done,) = driver.collect(REPORT)
        assert done.written == 0
        for address, size in request.writable:
            assert not any(driver.memory.read(address, size))

    def test_dirty_tracking_hears_of_it(self, driver: FakeDriver) -> None:
        told: list[tuple[int, int]] = []
        for queue in driver.transport.queues:
            queue.written = lambda address, length: told.append((address, length))
        request = driver.put(writable=[PAGE], queue=REPORT)
        driver.kick(REPORT)
        assert request.writable[0] in told
        driver.send([pfns(FIRST)])
        assert (FIRST * PAGE, PAGE) in told

    def test_a_driver_without_statistics_counts_its_queues_differently(self) -> None:
        driver = FakeDriver(Balloon(), features=VERSION_1 | REPORTING)
        request = driver.put(writable=[PAGE], queue=2)
        driver.kick(2)
        assert len(driver.collect(2)) == 1
        assert not any(driver.memory.read(*request.writable[0]))
        driver.put(writable=[PAGE], queue=3)
        driver.kick(3)
        assert driver.collect(3) == []
        assert not driver.needs_reset


class TestStatistics:
    def test_asked_for_and_answered(self, balloon: Balloon, driver: FakeDriver) -> None:
        driver.put([struct.pack("<HQHQ", 4, 1 << 30, 5, 2 << 30)], queue=STATISTICS)
        driver.kick(STATISTICS)
        assert driver.collect(STATISTICS) == []  # we keep the buffer
        assert driver.transport.metrics()["free_memory"] == 1 << 30
        assert len(driver.collect(STATISTICS)) == 1  # whoever reads them asks for newer ones
        assert driver.interrupts == 1
        balloon.poll()  # no buffer, no question
        assert driver.interrupts == 1
        driver.put([struct.pack("<HQ", 4, 7)], queue=STATISTICS)
        driver.kick(STATISTICS)
        assert driver.transport.metrics()["free_memory"] == 7

    def test_unknown_tags_and_halves_are_skipped(self, driver: FakeDriver) -> None:
        driver.put([struct.pack("<HQHQ", 99, 1, 0, 2) + b"\1\0\1"], queue=STATISTICS)
        driver.kick(STATISTICS)
        assert driver.transport.metrics()["swap_in"] == 2
        assert len(driver.transport.metrics()) == 7

    def test_more_buffers_than_one(self, balloon: Balloon, driver: FakeDriver) -> None:
        for value in range(5):
            driver.put([struct.pack("<HQ", 0, value)], queue=STATISTICS)
        driver.kick(STATISTICS)
        assert len(driver.collect(STATISTICS)) == 4
        assert driver.transport.metrics()["swap_in"] == 4

    def test_the_buffer_survives_a_snapshot_of_a_machine_that_goes_on(
        self, balloon: Balloon, driver: FakeDriver
    ) -> None:
        driver.put([struct.pack("<HQ", 0, 9)], queue=STATISTICS)
        driver.kick(STATISTICS)
        balloon.quiesce()
        driver.transport.save()
        driver.spin()
        balloon.poll()
        assert len(driver.collect(STATISTICS)) == 1

    def test_the_buffer_survives_a_move(self, driver: FakeDriver) -> None:
        driver.put([struct.pack("<HQ", 0, 9)], queue=STATISTICS)
        driver.kick(STATISTICS)
        other = driver.moved(Balloon())
        assert other.transport.metrics()["swap_in"] == 9
        assert len(other.collect(STATISTICS)) == 1

    def test_the_buffer_does_not_survive_a_reset(self, balloon: Balloon, driver: FakeDriver) -> None:
        driver.put([struct.pack("<HQ", 0, 9)], queue=STATISTICS)
        driver.kick(STATISTICS)
        driver.start()
        balloon.poll()
        assert driver.memory.u16(driver.rings[STATISTICS].used + 2) == 0


class TestSavedState:
    def test_round_trip(self, balloon: Balloon, driver: FakeDriver) -> None:
        balloon.set_target(8 << 20)
        driver.transport.write(0x104, 4, 5)
        other = driver.moved(Balloon())
        assert struct.unpack("<II", other.config()) == (2048, 5)

    @pytest.mark.parametrize("forged", [{"target": 4097}, {"target": -1}, {"actual": 1 << 32}, {"actual": None}])
    def test_forged(self, balloon: Balloon, driver: FakeDriver, forged: dict[str, object]) -> None:
        with pytest.raises(StateError):
            balloon.load(balloon.save() | forged)
