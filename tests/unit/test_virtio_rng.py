"""The entropy device: random bytes, as many as asked for and no more than a kick may cost."""

from __future__ import annotations

from posada.vmm.virtio.device import BUDGET
from posada.vmm.virtio.rng import MAX_BYTES, Rng
from posada.vmm.virtio.testing import FakeDriver


def test_fills_what_it_is_given() -> None:
    driver = FakeDriver(Rng())
    first = driver.send(writable=[16, 3, 45])
    assert len(first) == 64
    assert first != bytes(64) and first != b"\xee" * 64
    assert driver.send(writable=[64]) != first
    assert driver.interrupts == 2
    assert driver.transport.metrics()["bytes"] == 128


def test_a_request_without_room_is_answered_with_nothing() -> None:
    assert FakeDriver(Rng()).send(readable=[b"x"]) == b""


def test_a_huge_request_is_cut_short() -> None:
    driver = FakeDriver(Rng())
    assert len(driver.send(writable=[1 << 20])) == MAX_BYTES


def test_many_requests_take_turns_with_the_rest_of_the_monitor() -> None:
    driver = FakeDriver(Rng(), size=64)
    for _ in range(BUDGET):
        driver.put(writable=[8])
    driver.transport.notify(0)
    assert driver.transport.pending  # the queue is looked at again only after the loop's other work
    driver.spin()
    assert len(driver.collect()) == BUDGET
    assert driver.interrupts == 1


def test_indirect() -> None:
    driver = FakeDriver(Rng())
    driver.put(writable=[8, 8], indirect=True)
    driver.kick()
    assert [done.written for done in driver.collect()] == [16]


def test_a_bad_buffer_stops_it_until_it_is_reset() -> None:
    driver = FakeDriver(Rng())
    driver.descriptor(0, 1 << 40, 8, 2, 0)
    driver.offer(0)
    driver.kick()
    assert driver.needs_reset
    assert "outside memory" in driver.transport.reason
    driver.start()
    assert len(driver.send(writable=[8])) == 8


def test_saved_and_loaded() -> None:
    driver = FakeDriver(Rng())
    driver.send(writable=[8])
    assert len(driver.moved(Rng()).send(writable=[8])) == 8
