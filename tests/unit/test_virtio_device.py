"""What every device inherits: `serve`, `guarded`, `fail`."""

from __future__ import annotations

import pytest

from posada.vmm.virtio.device import BUDGET, Device
from posada.vmm.virtio.queue import Chain, QueueError
from posada.vmm.virtio.testing import FakeDriver


class Echo(Device):
    """Answers with what it was sent, while ``ready``; ``turns`` counts how often it was notified."""

    kind = 42
    name = "echo"
    queue_sizes = (256,)

    def __init__(self) -> None:
        self.ready = True
        self.turns = 0

    def notify(self, index: int) -> None:
        self.turns += 1
        self.serve(self.queues[index], self.answer)

    def answer(self, request: Chain) -> int | None:
        return request.write(request.read_all(100)) if self.ready else None


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def driver(echo: Echo) -> FakeDriver:
    driver = FakeDriver(echo)
    echo.turns = 0
    return driver


def test_all_that_is_queued(driver: FakeDriver) -> None:
    for text in (b"one", b"two"):
        driver.put([text], [8])
    driver.kick()
    assert [done.data for done in driver.collect()] == [b"one", b"two"]
    assert driver.interrupts == 1
    assert driver.kick_wanted()


def test_after_its_budget_the_loop_gets_a_turn(echo: Echo, driver: FakeDriver) -> None:
    for _ in range(BUDGET + 1):
        driver.put([b"x"], [1])
    driver.transport.notify(0)
    assert len(driver.collect()) == BUDGET
    assert not driver.kick_wanted()
    driver.transport.notify(0)  # a kick meanwhile changes nothing: the loop comes anyway
    assert echo.turns == 1
    driver.spin()
    assert len(driver.collect()) == 1
    assert driver.kick_wanted()


@pytest.mark.parametrize("event_idx", [True, False])
def test_not_now(echo: Echo, event_idx: bool) -> None:
    driver = FakeDriver(echo, features=(1 << 64) - 1 if event_idx else ~(1 << 29))
    echo.ready = False
    driver.put([b"a"], [1])
    driver.put([b"b"], [1])
    driver.kick()
    assert driver.collect() == []
    assert not driver.kick_wanted()
    echo.ready = True
    echo.notify(0)
    assert [done.data for done in driver.collect()] == [b"a", b"b"]
    assert driver.kick_wanted()


def test_a_request_that_comes_at_the_last_moment(echo: Echo, driver: FakeDriver) -> None:
    """After the queue was found empty, before the driver was asked for a kick: no kick comes for it."""
    queue = echo.queues[0]
    enable = queue.enable_notify

    def late() -> bool:
        queue.enable_notify = enable  # type: ignore[method-assign]
        driver.put([b"late"], [4])
        return enable()

    queue.enable_notify = late  # type: ignore[method-assign]
    driver.kick()
    assert [done.data for done in driver.collect()] == [b"late"]


def test_no_queue_works_in_a_device_that_failed(echo: Echo, driver: FakeDriver) -> None:
    driver.put([b"x"], [1])
    held = echo.queues[0].pop()
    assert held is not None
    driver.put([b"x"], [1])
    echo.fail("because")
    echo.fail("another reason")
    assert driver.transport.reason == "because"
    assert echo.queues[0].pop() is None
    echo.queues[0].push(held, 1)
    assert driver.collect() == []
    driver.start()
    assert driver.send([b"y"], [1]) == b"y"


def test_guarded_callbacks_make_the_device_fail(echo: Echo, driver: FakeDriver) -> None:
    def raises(reason: str) -> None:
        raise QueueError(reason)

    echo.guarded(raises)("too bad")
    assert driver.needs_reset
    assert driver.transport.reason == "too bad"
