"""The monitor's block layer, measured: ``python -m bench.block [--size MIB] [--dir PATH] [--seconds S] [--profile]``.

Disks (raw; an empty qcow2 overlay on it; one that is half written) are read and written through the disk itself, and
through virtio-blk with a driver in Python whose own work is not counted. Beside them, on the same files and from the
page cache too: ``qemu-img bench`` (QEMU's block layer, depth 64, strides instead of random places) and ``dd``.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from posada.storage.qcow2 import create_overlay
from posada.vmm.block.chain import open_chain
from posada.vmm.block.disk import Disk
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.testing import FakeDriver

MIB = 1 << 20
BATCH = 64
"""Requests of one kick: what a queue depth of 64 gives."""


def open_disk(*files: tuple[Path, str]) -> Disk:
    return open_chain([(os.open(path, os.O_RDWR | os.O_CLOEXEC), kind) for path, kind in files])


def direct(disk: Disk, length: int, offsets: Iterator[int], writing: bool, seconds: float) -> float:
    """Requests a second, without a device."""
    buffers = [memoryview(bytearray(os.urandom(length)))]
    call = disk.write if writing else disk.read
    end = time.perf_counter() + seconds
    began, count = time.perf_counter(), 0
    while time.perf_counter() < end:
        for _ in range(BATCH):
            call(next(offsets), buffers)
        count += BATCH
    return count / (time.perf_counter() - began)


def through_device(disk: Disk, length: int, offsets: Iterator[int], writing: bool, seconds: float) -> float:
    """Requests a second from kick to interrupt; data in pieces, as a guest has them."""
    driver = FakeDriver(Blk(disk, "bench"), memory_size=160 * MIB)
    device, spent, count = driver.device, 0.0, 0
    pieces = [min(length, 16384)] * max(1, length // 16384)
    batch = BATCH if length < MIB else 16
    data = [bytes(piece) for piece in pieces]
    while spent < seconds:
        for _ in range(batch):
            header = struct.pack("<IIQ", int(writing), 0, next(offsets) // 512)
            driver.put([header, *data] if writing else [header], [1] if writing else [*pieces, 1], indirect=True)
        began = time.perf_counter()
        device.notify(0)
        driver.spin()  # what did not fit into one turn
        spent += time.perf_counter() - began
        count += batch
        assert all(done.data[-1:] == b"\0" for done in driver.collect())
    return count / spent


def scattered(size: int, length: int) -> Iterator[int]:
    chance = random.Random(1)
    places = [chance.randrange(size // length) * length for _ in range(1 << 16)]
    while True:
        yield from places


def sequential(size: int, length: int) -> Iterator[int]:
    while True:
        yield from range(0, size - length + 1, length)


def qemu_img_bench(path: Path, kind: str, length: int, size: int, writing: bool, count: int) -> float | None:
    """Requests a second of QEMU's own block layer, process start not counted. None if it is not installed."""
    if shutil.which("qemu-img") is None:
        return None
    step = length if length >= MIB else 37 * length
    command = ["qemu-img", "bench", "-f", kind, "-t", "writeback", "-d", "64", "-s", str(length), "-S", str(step)]
    command += [
        "-c",
        str(min(count, size // length if length >= MIB else count)),
        *(["-w"] if writing else []),
        str(path),
    ]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = float(out.split("Run completed in ")[1].split(" ")[0])
    return int(command[command.index("-c") + 1]) / seconds


def dd(path: Path, length: int) -> float:
    """Reads a second of a plain program."""
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={length}"]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return path.stat().st_size / length / (time.perf_counter() - began)


def prepare(folder: Path, size: int) -> dict[str, tuple[tuple[Path, str], ...]]:
    """The disks, by what they are called in the table."""
    base = folder / "base.raw"
    with open(base, "wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    disks: dict[str, tuple[tuple[Path, str], ...]] = {"raw": ((base, "raw"),)}
    for name in ("overlay, empty", "overlay, half written"):
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.qcow2"
        create_overlay(path, size=size, backing=base, backing_format="raw")
        disks[name] = ((base, "raw"), (path, "qcow2"))
    disk = open_disk(*disks["overlay, half written"])
    for at in range(0, size, 128 << 10):
        disk.write(at, [memoryview(os.urandom(64 << 10))])
    disk.close()
    return disks


def measure(disks: dict[str, tuple[tuple[Path, str], ...]], size: int, seconds: float) -> None:
    print(f"{'disk':24}{'request':24}{'disk alone':>22}{'through virtio-blk':>22}{'qemu-img bench':>22}{'dd':>14}")
    for name, files in disks.items():
        path, kind = files[-1]
        cases: list[tuple[str, int, bool, Callable[[int, int], Iterator[int]]]] = [
            ("4 KiB random read", 4096, False, scattered),
            ("1 MiB sequential read", MIB, False, sequential),
        ]
        if name != "overlay, empty":  # it would not stay empty
            cases.append(("4 KiB random write", 4096, True, scattered))
            cases.append(("1 MiB sequential write", MIB, True, sequential))
        for what, length, writing, places in cases:
            rates: list[float | None] = []
            for take in (direct, through_device):
                disk = open_disk(*files)
                rates.append(take(disk, length, places(size, length), writing, seconds))
                disk.close()
            rates.append(qemu_img_bench(path, kind, length, size, writing, 50_000))
            rates.append(dd(path, length) if kind == "raw" and not writing and length >= MIB else None)
            cells = ["-" if rate is None else f"{rate:,.0f}/s {rate * length / MIB:,.0f} MiB/s" for rate in rates]
            print(f"{name:24}{what:24}{cells[0]:>22}{cells[1]:>22}{cells[2]:>22}{cells[3]:>22}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="of the disks, in MiB")
    parser.add_argument("--dir", help="where the files are (default: the temporary directory)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--profile", action="store_true", help="4 KiB random reads from the overlay, by function")
    arguments = parser.parse_args()
    size = arguments.size * MIB
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        disks = prepare(Path(folder), size)
        if not arguments.profile:
            measure(disks, size, arguments.seconds)
            return
        profile = cProfile.Profile()
        disk = open_disk(*disks["overlay, half written"])
        profile.runcall(through_device, disk, 4096, scattered(size, 4096), False, arguments.seconds)
        disk.close()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
