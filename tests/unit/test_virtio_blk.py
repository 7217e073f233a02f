"""The block device: what virtio 1.2, section 5.2 says, and what no driver should send."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from tests.unit.blk_kit import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    drive,
    header,
    make_disk,
    segment,
)
from tests.unit.block_kit import MIB, SIZE, check, needs_qemu_img, open_disk, read

from posada.errors import StateError
from posada.storage.qcow2 import create_overlay
from posada.vmm.block import file as file_module
from posada.vmm.block.raw import RawDisk
from posada.vmm.virtio import blk
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.transport import EVENT_IDX


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_disk(tmp_path)


@pytest.fixture
def driver(file: Path) -> FakeDriver:
    return drive(file)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine that tests: flushes are answered at once, but where a test says otherwise."""
    monkeypatch.setattr(file_module, "SLOW", 1e9)


def field(driver: FakeDriver, format: str, at: int) -> int:
    (value,) = struct.unpack_from(format, driver.config(), at)
    assert isinstance(value, int)
    return value


def test_configuration(driver: FakeDriver) -> None:
    assert len(driver.config()) == 60
    assert field(driver, "<Q", 0) == SIZE // 512
    assert field(driver, "<I", 12) == 254  # seg_max
    assert field(driver, "<I", 20) == 512  # blk_size
    assert field(driver, "<B", 32) == 1  # writeback
    assert field(driver, "<I", 36) == blk.MAX_CLEAR
    assert field(driver, "<I", 40) == 16
    assert field(driver, "<I", 44) == 8
    assert field(driver, "<I", 48) == blk.MAX_CLEAR
    assert field(driver, "<B", 56) == 1  # may unmap


def test_read_and_write(driver: FakeDriver, file: Path) -> None:
    before = file.read_bytes()
    answer = driver.send([header(IN, 3)], [1024, 512, 1])
    assert answer == before[3 * 512 : 6 * 512] + OK
    assert driver.send([header(OUT, 1), b"a" * 512, b"b" * 1024], [1]) == OK
    assert file.read_bytes() == before[:512] + b"a" * 512 + b"b" * 1024 + before[2048:]
    assert driver.send([header(FLUSH)], [1]) == OK
    metrics = driver.device.metrics()
    assert (metrics["reads"], metrics["read_bytes"], metrics["writes"], metrics["flushes"]) == (1, 1536, 1, 1)


def test_descriptors_may_be_cut_anywhere(driver: FakeDriver, file: Path) -> None:
    """Section 2.7.4.2: no assumption about the layout of a request."""
    before = file.read_bytes()
    assert driver.send([header(IN, 1)], [513]) == before[512:1024] + OK
    whole = header(OUT, 2) + b"z" * 512
    assert driver.send([whole[:5], whole[5:16], whole[16:20], whole[20:]], [1]) == OK
    assert driver.send([whole], [1]) == OK
    assert file.read_bytes()[1024:1536] == b"z" * 512
    assert driver.send([header(IN, 2)[:9], header(IN, 2)[9:]], [100, 413]) == b"z" * 512 + OK


def test_identity(file: Path) -> None:
    driver = FakeDriver(Blk(RawDisk(os.open(file, os.O_RDWR)), "a-disk-with-a-very-long-name"))
    assert driver.send([header(GET_ID)], [20, 1]) == b"a-disk-with-a-very-l" + OK
    driver = FakeDriver(Blk(RawDisk(os.open(file, os.O_RDWR)), "root"))
    assert driver.send([header(GET_ID)], [20, 1]) == b"root".ljust(20, b"\0") + OK


def test_write_zeroes_and_discard(driver: FakeDriver, file: Path) -> None:
    before = file.read_bytes()
    assert driver.send([header(WRITE_ZEROES), segment(1, 2, 1) + segment(10, 1, 0)], [1]) == OK
    expected = bytearray(before)
    expected[512:1536] = bytes(1024)
    expected[5120:5632] = bytes(512)
    assert file.read_bytes() == expected
    blocks = file.stat().st_blocks
    assert driver.send([header(DISCARD), segment(2048, 4096)], [1]) == OK
    assert file.stat().st_blocks <= blocks - 2048
    assert file.read_bytes()[: 2048 * 512] == expected[: 2048 * 512]


@pytest.mark.parametrize(
    ("readable", "writable", "status"),
    [
        ([header(IN, SIZE // 512)], [512, 1], IOERR),
        ([header(IN, SIZE // 512 - 1)], [1024, 1], IOERR),
        ([header(IN, (1 << 64) - 1)], [512, 1], IOERR),
        ([header(IN, 1 << 55)], [512, 1], IOERR),
        ([header(IN)], [100, 1], IOERR),
        ([header(OUT, SIZE // 512), bytes(512)], [1], IOERR),
        ([header(OUT), bytes(511)], [1], IOERR),
        ([header(IN)], [1] * 256 + [256, 1], IOERR),
        ([header(2)], [1], UNSUPP),
        ([header(10)], [1], UNSUPP),
        ([header(14), segment(0, 8)], [1], UNSUPP),
        ([header(1 << 31)], [1], UNSUPP),
        ([header(DISCARD), segment(0, 8, 1)], [1], UNSUPP),
        ([header(WRITE_ZEROES), segment(0, 8, 2)], [1], UNSUPP),
        ([header(DISCARD), segment(SIZE // 512, 1)], [1], IOERR),
        ([header(DISCARD), segment((1 << 64) - 1, 2)], [1], IOERR),
        ([header(WRITE_ZEROES), segment(0, (1 << 32) - 1)], [1], IOERR),
        ([header(DISCARD), segment(0, 8)[:-1]], [1], IOERR),
        ([header(DISCARD), segment(0, 1) * 17], [1], IOERR),
        ([header(DISCARD)], [1], IOERR),
    ],
)
def test_what_makes_no_sense_is_refused(
    driver: FakeDriver, file: Path, readable: list[bytes], writable: list[int], status: bytes
) -> None:
    before = file.read_bytes()
    driver.put(readable, writable, indirect=len(writable) > 200)
    driver.kick()
    (done,) = driver.collect()
    assert done.data[-1:] == status
    assert done.written == sum(writable)
    assert file.read_bytes() == before
    assert not driver.needs_reset
    assert driver.send([header(IN)], [512, 1])[-1:] == OK


@pytest.mark.parametrize(("readable", "writable"), [([header(IN)[:12]], [512, 1]), ([], [512]), ([header(OUT)], [])])
def test_a_request_that_cannot_be_answered_stops_the_device(
    driver: FakeDriver, readable: list[bytes], writable: list[int]
) -> None:
    driver.put(readable, writable)
    driver.kick()
    assert driver.needs_reset
    assert "block request" in driver.transport.reason
    driver.start()
    assert driver.send([header(IN)], [512, 1])[-1:] == OK


def test_a_read_only_disk(file: Path) -> None:
    driver = FakeDriver(Blk(RawDisk(os.open(file, os.O_RDONLY), readonly=True), "ro"))
    assert driver.transport.acked & blk.F_RO
    assert not driver.transport.acked & (blk.F_DISCARD | blk.F_WRITE_ZEROES)
    assert driver.send([header(IN)], [512, 1])[-1:] == OK
    for request in ([header(OUT), bytes(512)], [header(DISCARD), segment(0, 8)], [header(WRITE_ZEROES), segment(0, 8)]):
        assert driver.send(request, [1]) == IOERR
    assert driver.send([header(FLUSH)], [1]) == OK


def test_a_kick_brings_one_interrupt(driver: FakeDriver, file: Path) -> None:
    for n in range(40):
        driver.put([header(IN, n)], [512, 1], indirect=True)
    driver.kick()
    done = driver.collect()
    assert b"".join(d.data[:-1] for d in done) == file.read_bytes()[: 40 * 512]
    assert driver.interrupts == 1


def test_a_long_queue_is_served_in_turns(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk, "MAX_TURN", 1 << 20)
    driver.features = ~EVENT_IDX & (1 << 64) - 1
    driver.start()
    for _ in range(5):
        driver.put([header(IN)], [1 << 20, 1])
    driver.kick()
    assert [d.data[-1:] for d in driver.collect()] == [OK] * 5
    assert driver.interrupts > 1


def test_write_through(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that turns the cache off, or cannot flush, finds each write durable once it is answered."""
    flushes = []
    monkeypatch.setattr(os, "fdatasync", flushes.append)
    driver.send([header(OUT), bytes(512)], [1])
    assert flushes == []
    driver.transport.write(0x100 + 32, 1, 0)
    assert len(flushes) == 1
    assert field(driver, "<B", 32) == 0
    for request in ([header(OUT), bytes(512)], [header(WRITE_ZEROES), segment(0, 1)], [header(DISCARD), segment(0, 8)]):
        driver.send(request, [1])
    assert len(flushes) == 4
    driver.features = ~(blk.F_FLUSH | blk.F_CONFIG_WCE) & (1 << 64) - 1
    driver.start()
    driver.send([header(OUT), bytes(512)], [1])
    assert len(flushes) == 5


def test_an_error_of_the_host_is_one_request_s_error(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    for _ in range(30):
        assert driver.send([header(OUT), bytes(512)], [1]) == IOERR
    monkeypatch.undo()
    assert driver.send([header(OUT), bytes(512)], [1]) == OK
    assert driver.device.metrics()["errors"] == 30
    words = capfd.readouterr().err
    assert "No space left" in words
    assert words.count("\n") == blk.MAX_REPORTS


def test_growing(driver: FakeDriver, file: Path) -> None:
    device = driver.device
    assert isinstance(device, Blk)
    device.resize(SIZE + MIB)
    assert driver.interrupts == 1
    assert field(driver, "<Q", 0) == (SIZE + MIB) // 512
    assert driver.send([header(OUT, SIZE // 512), b"n" * 512], [1]) == OK
    assert driver.send([header(IN, SIZE // 512)], [1024, 1]) == b"n" * 512 + bytes(512) + OK
    with pytest.raises(OSError):
        device.resize(SIZE)


def test_save_and_load(driver: FakeDriver, file: Path) -> None:
    driver.transport.write(0x100 + 32, 1, 0)
    other = driver.moved(Blk(RawDisk(os.open(file, os.O_RDWR)), "root"))
    assert other.config() == driver.config()
    assert other.send([header(IN, 7)], [512, 1]) == file.read_bytes()[7 * 512 : 8 * 512] + OK
    with pytest.raises(StateError, match="smaller"):
        driver.moved(Blk(RawDisk(os.open(file, os.O_RDWR), SIZE // 2), "root"))


@needs_qemu_img
def test_switching_to_an_overlay(driver: FakeDriver, file: Path, tmp_path: Path) -> None:
    """As at a snapshot or fork: what was there stays in the old file, what comes goes to the new one."""
    device = driver.device
    assert isinstance(device, Blk)
    assert driver.send([header(OUT), b"1" * 512], [1]) == OK
    before = file.read_bytes()
    tops = [tmp_path / f"top{n}.qcow2" for n in range(2)]
    for top in tops:
        create_overlay(top, size=SIZE, backing=file, backing_format="raw")
    device.freeze()
    assert driver.send([header(OUT), b"2" * 512], [1]) == IOERR
    child = os.fork()
    if not child:  # no test machinery in here: only an exit status gets out
        try:
            device.reopen({"layers": [os.open(file, os.O_RDONLY)], "overlay": os.open(tops[1], os.O_RDWR)})
            assert driver.send([header(OUT), b"c" * 512], [1]) == OK
            assert driver.send([header(IN)], [1024, 1]) == b"c" * 512 + before[512:1024] + OK
            device.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    device.switch(os.open(tops[0], os.O_RDWR))
    assert driver.send([header(OUT, 1), b"p" * 512], [1]) == OK
    assert os.waitpid(child, 0)[1] == 0
    assert driver.send([header(IN)], [1024, 1]) == b"1" * 512 + b"p" * 512 + OK
    device.close()
    assert file.read_bytes() == before
    for top, expected in zip(tops, (b"1" * 512 + b"p" * 512, b"c" * 512 + before[512:1024]), strict=True):
        check(top)
        disk = open_disk(file, top, readonly=True)
        assert read(disk, 0, 1024) == expected
        disk.close()
