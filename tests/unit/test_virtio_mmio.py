"""The MMIO transport: registers, the status machine, interrupts, configuration space, saved state."""

from __future__ import annotations

import os

import pytest
from virtio_kit import ALL, Probe

from posada.vmm.loop import Loop
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.mmio import CONFIG, MAGIC, MmioTransport, Register
from posada.vmm.virtio.queue import QueueError
from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.transport import EVENT_IDX, GENERAL_FEATURES, INDIRECT_DESC, VERSION_1, Status


def test_who_it_is(fresh: FakeDriver) -> None:
    assert fresh.read(Register.MAGIC) == MAGIC == int.from_bytes(b"virt", "little")
    assert fresh.read(Register.VERSION) == 2
    assert fresh.read(Register.DEVICE_ID) == 42
    assert fresh.read(Register.VENDOR_ID) == int.from_bytes(b"POSA", "little")


def test_features_are_read_in_halves(fresh: FakeDriver) -> None:
    halves = []
    for select in (0, 1, 2, 0xFFFF_FFFF):
        fresh.write(Register.DEVICE_FEATURES_SEL, select)
        halves.append(fresh.read(Register.DEVICE_FEATURES))
    offered = Probe.features | GENERAL_FEATURES
    assert halves == [offered & 0xFFFF_FFFF, offered >> 32, 0, 0]


def test_no_shared_memory(fresh: FakeDriver) -> None:
    fresh.write(0x0AC, 3)
    for register in (0x0B0, 0x0B4, 0x0B8, 0x0BC):
        assert fresh.read(register) == 0xFFFF_FFFF


def test_no_queue_reset(fresh: FakeDriver) -> None:
    assert fresh.read(0x0C0) == 0


@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_are_written_in_32_bits(fresh: FakeDriver, size: int) -> None:
    fresh.transport.write(Register.STATUS, size, 1)
    assert fresh.transport.status == Status.RESET
    assert fresh.transport.refused == 1


def test_what_is_not_there_reads_as_zero(fresh: FakeDriver) -> None:
    known = {int(register) for register in Register}
    for offset in set(range(0, CONFIG, 4)) - known:
        assert fresh.read(offset) == 0
    for offset in (Register.QUEUE_NOTIFY, Register.QUEUE_DESC_LOW, Register.STATUS + 1):
        assert fresh.transport.read(offset, 4) == 0


class TestStatus:
    def test_step_by_step(self, fresh: FakeDriver, probe: Probe) -> None:
        fresh.start()
        assert fresh.read(Register.STATUS) == ALL
        assert fresh.transport.active
        assert probe.calls == ["reset", "activate", 0, 1]

    def test_several_steps_in_one_write(self, fresh: FakeDriver) -> None:
        fresh.write(Register.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        assert fresh.read(Register.STATUS) == 3

    @pytest.mark.parametrize("value", [2, 4, 8, 0xF & ~2, 0x10, 0x100, 0x20])
    def test_a_step_left_out(self, fresh: FakeDriver, value: int) -> None:
        fresh.write(Register.STATUS, value)
        assert not fresh.read(Register.STATUS) & ~Status.ACKNOWLEDGE

    def test_no_features_no_features_ok(self, fresh: FakeDriver) -> None:
        fresh.write(Register.STATUS, 3)
        fresh.write(Register.STATUS, 3 | Status.FEATURES_OK)  # VERSION_1 was not taken
        assert fresh.read(Register.STATUS) == 3
        fresh.write(Register.STATUS, int(ALL))
        assert fresh.read(Register.STATUS) == 3
        assert not fresh.transport.active

    def test_features_that_were_not_offered(self, fresh: FakeDriver) -> None:
        fresh.write(Register.STATUS, 3)
        fresh.write(Register.DRIVER_FEATURES, 1 << 4)
        fresh.write(Register.DRIVER_FEATURES_SEL, 1)
        fresh.write(Register.DRIVER_FEATURES, VERSION_1 >> 32)
        fresh.add_status(Status.FEATURES_OK)
        assert fresh.read(Register.STATUS) == 3

    def test_features_are_settled(self, driver: FakeDriver) -> None:
        before = driver.transport.acked
        driver.write(Register.DRIVER_FEATURES, 0)
        assert driver.transport.acked == before
        assert driver.transport.refused == 1

    def test_bits_are_never_cleared_one_by_one(self, driver: FakeDriver) -> None:
        driver.write(Register.STATUS, int(ALL & ~Status.DRIVER_OK))
        assert driver.read(Register.STATUS) == ALL
        assert driver.transport.active

    def test_failed(self, driver: FakeDriver, probe: Probe) -> None:
        driver.add_status(Status.FAILED)
        assert driver.read(Register.STATUS) == ALL | Status.FAILED
        driver.kick()
        assert probe.calls == []

    def test_reset(self, driver: FakeDriver, probe: Probe) -> None:
        driver.write(Register.STATUS, 0)
        assert driver.read(Register.STATUS) == 0
        assert driver.read(Register.QUEUE_READY) == 0
        assert driver.transport.acked == 0
        driver.kick()
        assert probe.calls == ["reset"]
        driver.start()
        assert driver.send(writable=[1]) == b"\0"

    def test_a_device_that_failed_needs_a_reset(self, driver: FakeDriver, probe: Probe) -> None:
        probe.error = QueueError("the ring is on fire")
        driver.kick()
        assert driver.read(Register.STATUS) == ALL | Status.NEEDS_RESET
        assert driver.transport.reason == "the ring is on fire"
        assert driver.read(Register.INTERRUPT_STATUS) == 2
        assert driver.interrupts == 1
        driver.kick()
        driver.add_status(Status.DRIVER_OK)  # as Linux writes: with the bit it has read
        assert probe.calls == [0]
        assert driver.needs_reset
        probe.error = None
        driver.start()
        assert driver.send(writable=[1]) == b"\0"

    def test_failures_do_not_fill_the_log(
        self, driver: FakeDriver, probe: Probe, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for _ in range(40):
            driver.start()
            probe.fail("again")
        assert capsys.readouterr().err.count("\n") == 16
        assert driver.transport.metrics()["failures"] == 40


def test_an_error_of_ours_stops_the_device_not_the_monitor(capsys: pytest.CaptureFixture[str]) -> None:
    probe = Probe()
    transport = MmioTransport(probe, GuestMemory.anonymous(1 << 20), lambda: None, Loop())
    transport.status = ALL
    transport.active = True
    probe.error = ZeroDivisionError("oh")
    transport.notify(0)
    assert transport.status & Status.NEEDS_RESET
    assert transport.reason == "an error of posada itself: ZeroDivisionError: oh"
    assert "Traceback" in capsys.readouterr().err


class TestQueues:
    def test_sizes(self, fresh: FakeDriver) -> None:
        found = []
        for index in (0, 1, 2, 0xFFFF_FFFF):
            fresh.write(Register.QUEUE_SEL, index)
            found.append(fresh.read(Register.QUEUE_SIZE_MAX))
        assert found == [64, 16, 0, 0]

    def test_only_between_features_ok_and_driver_ok(self, fresh: FakeDriver) -> None:
        fresh.write(Register.QUEUE_SIZE, 4)
        fresh.write(Register.QUEUE_DESC_LOW, 0x1000)
        fresh.write(Register.QUEUE_READY, 1)
        assert fresh.transport.refused == 3
        assert fresh.read(Register.QUEUE_READY) == 0
        fresh.start()
        fresh.write(Register.QUEUE_SEL, 0)
        fresh.write(Register.QUEUE_SIZE, 4)
        assert fresh.transport.queues[0].size == 64

    def test_64_bit_addresses(self, fresh: FakeDriver) -> None:
        fresh.negotiate()
        for register in (Register.QUEUE_DESC_LOW, Register.QUEUE_DRIVER_LOW, Register.QUEUE_DEVICE_LOW):
            fresh.write(register, 0xFFFF_0000)
            fresh.write(Register(register + 4), 0x8765_4321)
            fresh.write(register, 0x1000)
        queue = fresh.transport.queues[0]
        assert queue.desc == queue.avail == queue.used == 0x8765_4321_0000_1000

    def test_a_bad_configuration_stops_the_device(self, fresh: FakeDriver) -> None:
        fresh.negotiate()
        fresh.write(Register.QUEUE_SIZE, 7)
        fresh.write(Register.QUEUE_READY, 1)
        assert fresh.needs_reset
        assert "size 7" in fresh.transport.reason
        assert fresh.read(Register.QUEUE_READY) == 0

    def test_a_queue_that_is_not_there(self, fresh: FakeDriver) -> None:
        fresh.negotiate()
        fresh.write(Register.QUEUE_SEL, 2)
        fresh.write(Register.QUEUE_READY, 1)
        fresh.write(Register.QUEUE_READY, 0)
        assert not fresh.needs_reset

    def test_a_queue_is_stopped(self, driver: FakeDriver) -> None:
        driver.write(Register.QUEUE_SEL, 0)
        driver.write(Register.QUEUE_READY, 0)
        assert driver.read(Register.QUEUE_READY) == 0
        driver.put(writable=[1])
        driver.kick()
        assert driver.collect() == []

    @pytest.mark.parametrize(
        ("features", "expected"),
        [
            (VERSION_1, (False, False)),
            (VERSION_1 | EVENT_IDX, (True, False)),
            (VERSION_1 | INDIRECT_DESC, (False, True)),
        ],
    )
    def test_they_know_what_was_negotiated(self, probe: Probe, features: int, expected: tuple[bool, bool]) -> None:
        queue = FakeDriver(probe, features=features).transport.queues[0]
        assert (queue.event_idx, queue.indirect) == expected


class TestKicks:
    def test_by_register(self, driver: FakeDriver, probe: Probe) -> None:
        driver.put(writable=[1], queue=1)
        driver.write(Register.QUEUE_NOTIFY, 1)
        assert probe.calls == []  # on the loop's thread, not on this one
        driver.spin()
        assert probe.calls == [1]

    def test_of_a_queue_that_is_not_there(self, driver: FakeDriver, probe: Probe) -> None:
        driver.write(Register.QUEUE_NOTIFY, 2)
        driver.transport.notify(77)
        driver.spin()
        assert probe.calls == []

    def test_by_eventfd(self, driver: FakeDriver, probe: Probe) -> None:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        driver.transport.watch_kicks(1, fd)
        driver.put(writable=[1], queue=1)
        os.eventfd_write(fd, 1)
        os.eventfd_write(fd, 1)
        driver.spin()
        driver.spin()
        assert probe.calls == [1]
        assert len(driver.collect(1)) == 1
        driver.loop.unwatch(fd)
        os.close(fd)

    def test_before_driver_ok_is_not_lost(self, fresh: FakeDriver) -> None:
        fresh.negotiate()
        fresh.make_queues()
        fresh.put(writable=[1])
        fresh.kick()
        assert fresh.collect() == []
        fresh.add_status(Status.DRIVER_OK)
        fresh.spin()
        assert len(fresh.collect()) == 1


class TestInterrupts:
    def test_status_and_acknowledge(self, driver: FakeDriver, probe: Probe) -> None:
        driver.send(writable=[1])
        assert driver.read(Register.INTERRUPT_STATUS) == 1
        probe.config_changed()
        assert driver.read(Register.INTERRUPT_STATUS) == 3
        driver.write(Register.INTERRUPT_ACK, 1)
        assert driver.read(Register.INTERRUPT_STATUS) == 2
        driver.write(Register.INTERRUPT_ACK, 0xFFFF_FFFF)
        assert driver.read(Register.INTERRUPT_STATUS) == 0
        assert driver.interrupts == 2

    def test_one_per_batch(self, driver: FakeDriver) -> None:
        for _ in range(5):
            driver.put(writable=[1])
        driver.kick()
        assert len(driver.collect()) == 5
        assert driver.interrupts == 1

    def test_none_before_driver_ok(self, fresh: FakeDriver, probe: Probe) -> None:
        probe.config_changed()
        assert fresh.interrupts == 0


class TestConfig:
    @pytest.mark.parametrize("size", range(1, 9))
    def test_read_in_any_size(self, fresh: FakeDriver, size: int) -> None:
        for at in range(9 - size):
            expected = int.from_bytes(b"configur"[at : at + size], "little")
            assert fresh.transport.read(CONFIG + at, size) == expected

    def test_read_beyond_the_end(self, fresh: FakeDriver) -> None:
        assert fresh.transport.read(CONFIG + 6, 4) == int.from_bytes(b"ur", "little")
        assert fresh.transport.read(CONFIG + 8, 8) == 0
        assert fresh.transport.read(0xFFF, 1) == 0

    def test_write(self, fresh: FakeDriver, probe: Probe) -> None:
        fresh.transport.write(CONFIG + 2, 2, 0x4241)
        assert probe.space == b"coABigur"
        fresh.transport.write(CONFIG, 8, int.from_bytes(b"12345678", "little"))
        assert probe.space == b"12345678"

    def test_write_beyond_the_end(self, fresh: FakeDriver, probe: Probe) -> None:
        fresh.transport.write(CONFIG + 6, 4, 0)
        fresh.transport.write(0xFFF, 1, 0)
        assert probe.space == b"configur"
        assert fresh.transport.refused == 2

    def test_noticed_by_the_driver(self, driver: FakeDriver, probe: Probe) -> None:
        probe.calls.clear()
        driver.write(Register.INTERRUPT_ACK, 2)
        assert probe.calls == []
        probe.config_changed()
        driver.write(Register.INTERRUPT_ACK, 1)
        assert probe.calls == []
        driver.write(Register.INTERRUPT_ACK, 3)
        assert probe.calls == ["noticed"]

    def test_generation(self, driver: FakeDriver, probe: Probe) -> None:
        before = driver.read(Register.CONFIG_GENERATION)
        assert driver.read(Register.CONFIG_GENERATION) == before
        probe.config_changed()
        assert driver.read(Register.CONFIG_GENERATION) != before
