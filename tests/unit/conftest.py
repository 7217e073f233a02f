"""What several files of unit tests start from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvm_engine_kit import Kit
from virtio_kit import Probe

from posada.engine.kvm.probe import SLOW
from posada.vmm.virtio.testing import FakeDriver


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    """For toy machines of the kvm engine."""
    monkeypatch.setenv(SLOW, "1")
    with tempfile.TemporaryDirectory(prefix="pk-") as folder:  # a short path: sockets are in it
        yield Kit(Path(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One to share with a guest, beside something that it must not see."""
    (tmp_path / "secret").write_text("not yours")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "hello").write_text("hello, guest")
    return folder


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
