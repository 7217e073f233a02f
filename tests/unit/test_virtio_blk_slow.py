"""A block device on a slow host: flushes that take long, reads of what is not in memory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.blk_kit import DISCARD, FLUSH, IN, IOERR, OK, OUT, drive, header, make_disk, segment
from tests.unit.block_kit import MIB, SIZE, check, open_disk, read

from posada.storage.qcow2 import create_overlay
from posada.vmm.block import file as file_module
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.testing import FakeDriver


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_disk(tmp_path)


@pytest.fixture
def driver(file: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return drive(file)


def answers(driver: FakeDriver, count: int) -> list[bytes]:
    """The statuses of the next ``count`` requests, once they are there."""
    done: list[bytes] = []

    def enough() -> bool:
        done.extend(one.data[-1:] for one in driver.collect())
        return len(done) >= count

    driver.until(enough)
    return done


class Gate:
    """An fdatasync that takes as long as a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.errors: list[OSError] = []
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        self.entered.set()
        assert self.open.wait(10)
        if self.errors:
            raise self.errors.pop()


@pytest.fixture
def gate(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The disk was found to be slow; a flush is under way, and does not end before the gate is opened."""
    gate = Gate(monkeypatch)
    monkeypatch.setattr(file_module, "SLOW", -1)
    driver.send([header(OUT), b"f" * 512], [1])
    driver.send([header(FLUSH)], [1])
    driver.send([header(OUT), b"s" * 512], [1])
    driver.put([header(FLUSH)], [1])
    driver.kick()
    assert gate.entered.wait(10)
    yield gate
    gate.open.set()
    driver.device.close()


def test_a_slow_flush_keeps_the_loop_free(driver: FakeDriver, gate: Gate) -> None:
    """What comes meanwhile waits for it: nothing changes under a flush."""
    driver.put([header(IN)], [512, 1])
    driver.kick()
    assert driver.collect() == []
    gate.open.set()
    assert answers(driver, 2) == [OK, OK]
    assert driver.send([header(IN)], [512, 1]) == b"s" * 512 + OK


def test_a_slow_flush_that_fails(driver: FakeDriver, gate: Gate) -> None:
    gate.errors.append(OSError(errno.EIO, os.strerror(errno.EIO)))
    gate.open.set()
    assert answers(driver, 1) == [IOERR]
    driver.put([header(FLUSH)], [1])
    driver.kick()
    assert answers(driver, 1) == [IOERR]  # what was lost stays lost


@pytest.mark.parametrize("how", ["quiesce", "freeze", "resize", "reset", "close"])
def test_whoever_wants_the_disk_waits_for_a_slow_flush(driver: FakeDriver, gate: Gate, how: str) -> None:
    device = driver.device
    assert isinstance(device, Blk)
    threading.Timer(0.01, gate.open.set).start()
    if how == "resize":
        device.resize(SIZE + MIB)
    elif how == "reset":
        driver.start()
        assert driver.collect() == []
        assert driver.send([header(IN)], [512, 1]) == b"s" * 512 + OK
        return
    else:
        getattr(device, how)()
    assert gate.open.is_set()
    assert answers(driver, 1) == [OK]


def test_a_slow_flush_of_a_qcow2_image(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its steps waits in the worker; requests between them find the device busy, and the image is whole."""
    monkeypatch.setattr(file_module, "SLOW", -1)
    top = tmp_path / "top.qcow2"
    create_overlay(top, size=SIZE, backing=file, backing_format="raw")
    driver = FakeDriver(Blk(open_disk(file, top), "root"))
    for n in range(20):
        driver.put([header(OUT, n * 300), bytes([n]) * 512], [1])
        driver.put([header(FLUSH)], [1])
    driver.put([header(DISCARD), segment(0, 2048)], [1])
    driver.put([header(FLUSH)], [1])
    driver.kick()
    assert answers(driver, 42) == [OK] * 42
    check(top)
    driver.device.close()
    check(top)
    disk = open_disk(file, top)
    assert read(disk, 19 * 300 * 512, 512) == bytes([19]) * 512
    disk.close()


def test_cold_reads_are_answered_last(driver: FakeDriver, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one kick are started together, and what is in memory does not wait for them."""
    real, prefetched = os.preadv, []

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags and offset < 4 * 512:
            raise BlockingIOError(errno.EAGAIN, "cold")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: prefetched.append((offset, length)))
    heads = [driver.put([header(IN, n)], [512, 1]).head for n in (0, 9, 1)]
    driver.kick()
    done = driver.collect()
    assert [one.head for one in done] == [heads[1], heads[0], heads[2]]
    whole = file.read_bytes()
    assert [one.data for one in done] == [whole[n * 512 : n * 512 + 512] + OK for n in (9, 0, 1)]
    assert prefetched == [(0, 512), (512, 512)]
    assert driver.interrupts == 1
