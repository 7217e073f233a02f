"""What tests of the block device share: requests, and a driver of a raw disk."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from tests.unit.block_kit import SIZE, pattern

from posada.vmm.block.raw import RawDisk
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.testing import FakeDriver

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def make_disk(folder: Path) -> Path:
    path = folder / "disk.raw"
    path.write_bytes(pattern(SIZE, 1))
    return path


def drive(file: Path) -> FakeDriver:
    return FakeDriver(Blk(RawDisk(os.open(file, os.O_RDWR)), "root"))
