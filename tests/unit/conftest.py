"""What several files of unit tests start from."""

from __future__ import annotations

import pytest
from virtio_kit import Probe

from posada.vmm.virtio.testing import FakeDriver


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def driver(probe: Probe) -> FakeDriver:
    driver = FakeDriver(probe)
    probe.calls.clear()
    return driver


@pytest.fixture
def fresh(probe: Probe) -> FakeDriver:
    """A driver that has done nothing yet."""
    return FakeDriver(probe, start=False)
