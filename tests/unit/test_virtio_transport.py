"""What a transport shows its guest in the page of its registers, and its saved state."""

from __future__ import annotations

import ctypes

import pytest
from virtio_kit import ALL, Probe

from posada.errors import StateError
from posada.vmm.loop import Loop
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.mmio import MmioTransport, Register
from posada.vmm.virtio.pages import RegisterPages
from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.transport import GENERAL_FEATURES, VERSION_1, Status


class TestPage:
    """What the guest reads without an exit is what `read` gives, whoever changes it."""

    def page(self, driver: FakeDriver) -> bytes:
        return bytes(driver.transport._page)

    def word(self, driver: FakeDriver, register: Register) -> int:
        return int.from_bytes(self.page(driver)[register : register + 4], "little")

    def test_an_interrupt_stands_in_it_before_it_is_raised(self, probe: Probe) -> None:
        seen: list[int] = []
        page = memoryview(bytearray(4096))
        transport = MmioTransport(
            probe, GuestMemory.anonymous(1 << 20), lambda: seen.append(page[Register.INTERRUPT_STATUS]), Loop(), page
        )
        transport.interrupt_used()
        assert seen == [1]

    def test_a_failure(self, driver: FakeDriver, probe: Probe) -> None:
        probe.fail("broken")
        assert self.word(driver, Register.STATUS) == ALL | Status.NEEDS_RESET
        assert self.word(driver, Register.INTERRUPT_STATUS) == 2

    def test_the_configuration(self, driver: FakeDriver, probe: Probe) -> None:
        probe.space[:] = b"somewhat"
        probe.config_changed()
        assert self.page(driver)[0x100:0x108] == b"somewhat"

    def test_after_a_load(self, driver: FakeDriver) -> None:
        page = memoryview(bytearray(4096))
        other = MmioTransport(Probe(), driver.memory, lambda: None, Loop(), page)
        other.load(driver.transport.save())
        assert bytes(page) == self.page(driver)
        with pytest.raises(StateError):
            other.load({})
        assert page[Register.STATUS] == 0

    def test_pages_lie_one_behind_the_other(self) -> None:
        pages = RegisterPages(3)
        pages.page(1)[:4] = b"here"
        assert not any(pages.page(0)) and not any(pages.page(2))
        # SAFETY: 4 bytes of the second of three pages that `pages` maps.
        assert ctypes.string_at(pages.address + 4096, 4) == b"here"


class TestSavedState:
    def test_a_running_device_goes_on(self, driver: FakeDriver) -> None:
        assert driver.send(writable=[1]) == b"\0"
        driver.put(writable=[1])  # its kick is lost with the old monitor
        other = driver.moved(Probe())
        assert other.device.calls[:2] == ["reset", "activate"]  # type: ignore[attr-defined]
        assert [done.data for done in other.collect()] == [b"\1"]
        assert other.transport.acked == driver.transport.acked
        assert other.send(writable=[1]) == b"\2"

    def test_an_interrupt_under_way_is_raised_again(self, driver: FakeDriver) -> None:
        driver.send(writable=[1])
        other = driver.moved(Probe())
        assert other.read(Register.INTERRUPT_STATUS) == 1
        assert other.interrupts >= 1

    @pytest.mark.parametrize("steps", range(5))
    def test_in_every_state(self, probe: Probe, steps: int) -> None:
        driver = FakeDriver(probe, start=False)
        if steps >= 1:
            driver.add_status(Status.ACKNOWLEDGE)
        if steps >= 2:
            driver.negotiate()
        if steps >= 3:
            driver.make_queues()
        if steps >= 4:
            driver.add_status(Status.DRIVER_OK)
        other = MmioTransport(Probe(), driver.memory, lambda: None, Loop())
        other.load(driver.transport.save())
        assert other.save() == driver.transport.save()

    def test_half_written_registers_come_along(self, fresh: FakeDriver) -> None:
        fresh.negotiate()
        fresh.write(Register.QUEUE_SEL, 1)
        fresh.write(Register.QUEUE_DESC_LOW, 0x5000)
        other = FakeDriver(Probe(), memory=fresh.memory, start=False)
        other.transport.load(fresh.transport.save())
        other.write(Register.QUEUE_DESC_HIGH, 1)
        assert other.transport.queues[1].desc == 0x1_0000_5000

    @pytest.mark.parametrize(
        "forged",
        [
            {"kind": 41}, {"status": 4}, {"status": 0x1F}, {"status": -1}, {"status": "15"}, {"status": 8},
            {"features": GENERAL_FEATURES | 1}, {"acked": VERSION_1 | 1 << 50}, {"acked": 0}, {"queues": []},
            {"queues": [{}, {}]}, {"queues": None}, {"interrupt_status": 4}, {"generation": 1 << 32},
            {"device": None}, {"device": {"answers": "forged"}}, {"queue_sel": -1}, {"driver_sel": None},
        ],
    )  # fmt: skip
    def test_forged(self, driver: FakeDriver, forged: dict[str, object]) -> None:
        transport = MmioTransport(Probe(), driver.memory, lambda: None, Loop())
        with pytest.raises(StateError):
            transport.load(driver.transport.save() | forged)
        assert transport.status == Status.RESET
        assert not transport.active
        assert not any(queue.ready for queue in transport.queues)

    def test_fewer_features_than_today(self, driver: FakeDriver) -> None:
        """A machine saved by an older posada keeps what it was offered."""
        document = driver.transport.save()
        document["features"] = document["acked"] = VERSION_1
        transport = MmioTransport(Probe(), driver.memory, lambda: None, Loop())
        transport.load(document)
        assert transport.features == VERSION_1
