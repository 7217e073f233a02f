"""qcow2 images with anything in their tables: read, written and closed, or refused; never a crash, a hang, or much memory."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import tempfile
import tracemalloc
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.block_kit import KIB, MIB, needs_qemu_img, open_disk, qemu_img, qemu_io, read, write

from posada.errors import ImageError
from posada.proto import qcow2 as codec
from posada.storage.qcow2 import create_empty
from posada.vmm.block.disk import Disk

pytestmark = needs_qemu_img
EXAMPLES = int(os.environ.get("POSADA_FUZZ_EXAMPLES", "400"))
SIZE = 256 * KIB
KINDS = [
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k",
    "compat=0.10,cluster_size=1k",
    "snapshot",
]


@cache
def sample(kind: str) -> bytes:
    """An image with data, holes, zero clusters, compressed clusters, and a snapshot perhaps."""
    with tempfile.TemporaryDirectory() as folder:
        path, raw = Path(folder) / "disk.qcow2", Path(folder) / "raw"
        raw.write_bytes(b"".join(bytes([n]) * 4096 for n in range(32)).ljust(SIZE, b"\0"))
        options = "cluster_size=1k" if kind == "snapshot" else kind
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        qemu_io(path, "write -P 9 20k 30k", "write -P 8 200k 20k", "discard 40k 4k")
        if "compat" not in kind:
            qemu_io(path, "write -z 60k 16k")
        if kind == "snapshot":
            qemu_img("snapshot", "-c", "one", path)
            qemu_io(path, "write -P 7 22k 3k")
        return path.read_bytes()


@cache
def places(kind: str) -> list[int]:
    """Offsets of whatever tells where something is: in the header, L1, L2, refcount table and blocks, snapshots."""
    image = sample(kind)
    info = codec.parse_header(image[: codec.HEAD], len(image), 1 << 40)
    cluster = 1 << info.cluster_bits
    out = [0, 4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104]
    out += range(info.l1_at, info.l1_at + 8 * info.l1_entries, 8)
    out += range(info.refcounts_at, info.refcounts_at + 64, 8)
    for (entry,) in struct.iter_unpack(">Q", image[info.l1_at : info.l1_at + 8 * info.l1_entries]):
        if at := entry & ((1 << 56) - 512):
            out += range(at, at + min(cluster, 512), 8)
    (block,) = struct.unpack_from(">Q", image, info.refcounts_at)
    out += range(block, block + min(cluster, 256), 8)
    if info.snapshots:
        out += range(info.snapshots_at, info.snapshots_at + 64, 4)
    return out


def numbers(chance: random.Random, image: bytes) -> int:
    """A value that may pass for an offset, an entry or a count."""
    flags = chance.choice([0, 0, 0, 1, 1 << 63, 1 << 62, 1 << 63 | 1, 3 << 62])
    return chance.choice([
        0, 1, (1 << 64) - 1, 1 << 62, chance.getrandbits(64), chance.getrandbits(64) & ~511,
        flags | chance.randrange(len(image)), flags | chance.randrange(len(image)) & ~511,
        flags | chance.randrange(0, len(image), 4096), flags | (1 << 40), flags | (len(image) + 511) & ~511,
        struct.unpack_from(">Q", image, chance.randrange(len(image) - 8))[0],
    ])  # fmt: skip


def use(disk: Disk, chance: random.Random) -> None:
    """Everything one can do with a disk; each part may fail, in one of two ways."""
    size = min(disk.size, SIZE)
    for _ in range(12):
        offset = chance.randrange(size)
        length = min(size - offset, chance.choice([1, 512, 5000, 100_000]))
        with suppress(ImageError, OSError):
            action = chance.randrange(8)
            if action < 3:
                assert len(read(disk, offset, length, [100])) == length
            elif action < 5:
                write(disk, offset, bytes([chance.randrange(256)]) * length)
            elif action == 5:
                disk.discard(offset, length)
            elif action == 6:
                disk.write_zeroes(offset, length, chance.random() < 0.5)
            else:
                disk.flush()
    with suppress(ImageError, OSError):
        disk.resize(disk.size + 512 * chance.randrange(1000))
    with suppress(ImageError, OSError):
        read(disk, 0, size)


@settings(max_examples=EXAMPLES, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1 << 32), readonly=st.booleans())
def test_mutated_images(kind: str, seed: int, readonly: bool) -> None:
    chance = random.Random(seed)
    image = bytearray(sample(kind))
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.choice(places(kind))
        width = chance.choice([">Q", ">Q", ">I", ">H", ">B"])
        value = numbers(chance, bytes(image)) & (1 << 8 * struct.calcsize(width)) - 1
        struct.pack_into(width, image, at, value)
    if chance.random() < 0.1:
        del image[chance.randrange(len(image)) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.qcow2"
        path.write_bytes(image)
        before = len(os.listdir("/proc/self/fd"))
        try:
            disk = open_disk(path, readonly=readonly)
        except ImageError:
            disk = None
        if disk is not None:
            use(disk, chance)
            with suppress(ImageError, OSError):
                disk.close()
        assert len(os.listdir("/proc/self/fd")) == before
        if readonly:
            assert path.read_bytes() == image
        assert path.stat().st_size < len(image) + 8 * MIB


@settings(max_examples=EXAMPLES // 8, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1 << 32))
def test_a_lie_never_spreads(kind: str, seed: int) -> None:
    """What QEMU calls whole is whole after our use. One changed field, so that it often still is."""
    chance = random.Random(seed)
    image = bytearray(sample(kind))
    struct.pack_into(">Q", image, chance.choice(places(kind)), numbers(chance, bytes(image)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.qcow2"
        path.write_bytes(image)
        command = ["qemu-img", "check", "-q", "-f", "qcow2", str(path)]
        if subprocess.run(command, check=False, capture_output=True).returncode not in (0, 3):
            return
        try:
            disk = open_disk(path)
        except ImageError:
            return
        use(disk, chance)
        disk.close()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ([(36, ">I", 524288), (24, ">Q", 1 << 40)], "an L1 table of 4 MiB, all of it holes"),
        ([(56, ">I", 128)], "a refcount table of 8 MiB"),
        ([(60, ">I", 65536), (64, ">Q", 1 << 30)], "65536 snapshots"),
    ],
)
def test_claims_of_size_cost_little(tmp_path: Path, fields: list[tuple[int, str, int]], what: str) -> None:
    """A file may be sparse, and as long as it likes."""
    path = tmp_path / "disk.qcow2"
    create_empty(path, size=1 << 40)
    with open(path, "r+b") as file:
        for at, width, value in fields:
            file.seek(at)
            file.write(struct.pack(width, value))
        file.truncate(1 << 42)
    tracemalloc.start()
    try:
        with suppress(ImageError):
            disk = open_disk(path)
            use(disk, random.Random(1))
            disk.close()
        assert tracemalloc.get_traced_memory()[1] < 48 * MIB, what
    finally:
        tracemalloc.stop()


def test_bombs_do_not_go_off(tmp_path: Path) -> None:
    """Compressed data that grows beyond its cluster, or never fills it, is damaged; that is one request's error."""
    import zlib

    path = tmp_path / "disk.qcow2"
    create_empty(path, size=MIB)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(64 * MIB)) + packer.flush()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    short = packer.compress(b"too short") + packer.flush()
    with open(path, "r+b") as file:
        table, at = 4 << 16, 5 << 16
        file.seek(3 << 16)
        file.write(struct.pack(">Q", table | 1 << 63))
        entries = []
        for number, data in enumerate((bomb[: 127 << 10], short, os.urandom(2000))):
            place = at + (number << 17)
            file.seek(place)
            file.write(data.ljust(512, b"\0"))
            entries.append(1 << 62 | (len(data) - 1) // 512 << 54 | place)
        file.seek(table)
        file.write(struct.pack(">3Q", *entries))
        file.truncate(1 << 20)
    disk = open_disk(path, readonly=True)
    tracemalloc.start()
    assert read(disk, 0, 100) == bytes(100)  # as QEMU: what does not fit is not looked at
    assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    tracemalloc.stop()
    for number in (1, 2):
        with pytest.raises(ImageError, match="damaged"):
            read(disk, number << 16, 100)
    assert read(disk, 3 << 16, 10) == bytes(10)
    disk.close()
