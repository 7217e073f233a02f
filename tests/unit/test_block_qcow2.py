"""qcow2 disks against QEMU's own tools: they read what we write, and we read what they write."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.unit.block_kit import (
    KIB,
    MIB,
    SIZE,
    check,
    content,
    create,
    make_base,
    needs_qemu_img,
    open_disk,
    pattern,
    qemu_img,
    qemu_io,
    read,
    write,
)

from posada.errors import ImageError
from posada.storage.qcow2 import create_empty, create_overlay

pytestmark = needs_qemu_img
OPTIONS = [
    "cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M", "lazy_refcounts=on", "compat=0.10",
    "refcount_bits=1", "refcount_bits=2,cluster_size=512", "refcount_bits=8", "refcount_bits=32", "refcount_bits=64",
    "preallocation=metadata", "preallocation=full,cluster_size=4k",
]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path)


@pytest.mark.parametrize("options", OPTIONS)
def test_reading_and_writing_what_qemu_made(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", options)
    qemu_io(path, "write -P 1 1000000 300k", "write -z 1100000 64k", "write -P 2 4000000 1k", "discard 1M 64k")
    model = bytearray(content(path))
    disk = open_disk(path)
    assert read(disk, 0, SIZE, [1, 4095, 100_000]) == model
    for offset, length in ((0, 512), (999_000, 70_000), (1_100_000, 10), (SIZE - 5, 5), (2 * MIB, MIB)):
        write(disk, offset, pattern(length, offset), [length // 3])
        model[offset : offset + length] = pattern(length, offset)
    disk.flush()
    assert read(disk, 0, SIZE) == model
    disk.close()
    check(path)
    assert content(path) == model
    qemu_io(path, "read -P 2 4000000 1k")


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "compat=0.10"])
def test_a_backing_chain_of_three(tmp_path: Path, base: Path, options: str) -> None:
    middle = create(tmp_path / "middle.qcow2", options, base, 2 * MIB)
    qemu_io(middle, "write -P 5 100k 10k", "write -P 6 1999k 20k")
    top = create(tmp_path / "top.qcow2", options, middle)
    qemu_io(top, "write -P 7 105k 10k")
    model = bytearray(content(top))
    assert model[2 * MIB :] == bytes(SIZE - 2 * MIB)
    disk = open_disk(base, middle, top, size=SIZE)
    assert read(disk, 0, SIZE) == model
    for offset, length in ((50_000, 3), (104 * KIB, 2 * KIB), (2 * MIB - 5, 10), (3 * MIB, 1)):
        write(disk, offset, pattern(length, 3))
        model[offset : offset + length] = pattern(length, 3)
    before = middle.read_bytes()
    disk.close()
    for path in (middle, top):
        check(path)
    assert content(top) == model
    assert middle.read_bytes() == before
    assert base.read_bytes() == pattern(3 * MIB, 1)


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "compat=0.10"])
def test_compressed_clusters(tmp_path: Path, base: Path, options: str) -> None:
    """Read in part and as a whole; what is written to them is copied out, and their place is given back."""
    base.write_bytes(b"".join(bytes([n % 251]) * 4096 for n in range(768)))
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, base, path)
    model = bytearray(base.read_bytes())
    disk = open_disk(path)
    assert read(disk, 0, len(model), [70_000]) == model
    assert read(disk, 65_000, 1000) == model[65_000:66_000]
    write(disk, 65_530, b"across two clusters")
    model[65_530:65_549] = b"across two clusters"
    disk.write_zeroes(MIB, 128 * KIB, unmap=True)
    model[MIB : MIB + 128 * KIB] = bytes(128 * KIB)
    assert read(disk, 0, len(model)) == model
    disk.close()
    check(path)
    assert content(path) == model


def test_zstd_is_refused_in_words_or_read(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", base, path)
    try:
        disk = open_disk(path, readonly=True)
    except ImageError as error:
        assert "zstd" in str(error)
        assert "qemu-img convert" in str(error)
    else:
        assert read(disk, 0, 3 * MIB) == base.read_bytes()
        disk.close()


@pytest.mark.parametrize("options", ["extended_l2=on", "encryption"])
def test_kinds_that_are_refused_in_words(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    if options == "encryption":
        create_empty(path, size=MIB)
        with open(path, "r+b") as file:
            file.seek(35)
            file.write(b"\1")
    else:
        create(path, options)
    with pytest.raises(ImageError, match="qemu-img convert"):
        open_disk(path)


def test_internal_snapshots_keep_what_they_hold(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "cluster_size=4k")
    qemu_io(path, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 2 512k 8k")
    qemu_img("snapshot", "-c", "second", path)
    model = bytearray(content(path))
    disk = open_disk(path)
    assert read(disk, 0, SIZE) == model
    write(disk, 1000, b"x" * 9000)
    write(disk, 512 * KIB, b"y" * 4096)
    disk.discard(MIB - 64 * KIB, 32 * KIB)
    model[1000:10000] = b"x" * 9000
    model[512 * KIB : 516 * KIB] = b"y" * 4096
    model[MIB - 64 * KIB : MIB - 32 * KIB] = bytes(32 * KIB)
    with pytest.raises(OSError, match="internal snapshots"):
        disk.resize(2 * SIZE)
    disk.close()
    check(path)
    assert content(path) == model
    qemu_img("snapshot", "-a", "first", path)
    assert content(path)[: 2 * MIB] == b"\1" * MIB + bytes(MIB)
    for name in ("first", "second"):
        qemu_img("snapshot", "-d", name, path)
    check(path)


@pytest.mark.parametrize("backed", [True, False])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "compat=0.10"])
def test_clearing(tmp_path: Path, base: Path, options: str, backed: bool) -> None:
    path = create(tmp_path / "disk.qcow2", options, base if backed else None)
    disk = open_disk(base, path) if backed else open_disk(path)
    model = bytearray(base.read_bytes() if backed else b"").ljust(SIZE, b"\0")
    write(disk, MIB, pattern(2 * MIB, 8))
    model[MIB : 3 * MIB] = pattern(2 * MIB, 8)
    for offset, length, unmap in (
        (0, 70_000, True), (200_000, 100, False), (MIB + 5, 300_000, False), (2 * MIB, 300_001, True), (SIZE - 9, 9, True),
    ):  # fmt: skip
        disk.write_zeroes(offset, length, unmap)
        model[offset : offset + length] = bytes(length)
        assert read(disk, 0, SIZE) == model
    disk.flush()
    disk.discard(MIB, 2 * MIB)
    if options != "compat=0.10" or not backed:
        model[MIB : 3 * MIB] = bytes(2 * MIB)
    write(disk, MIB + 512, b"again")
    model[MIB + 512 : MIB + 517] = b"again"
    disk.close()
    check(path)
    assert content(path) == model


def test_discard_gives_space_back_and_it_is_used_again(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    disk = open_disk(path)
    write(disk, 0, pattern(SIZE, 1))
    disk.flush()
    length = path.stat().st_size
    assert path.stat().st_blocks * 512 >= SIZE
    for _ in range(3):
        disk.discard(0, SIZE)
        disk.flush()
        assert path.stat().st_blocks * 512 < MIB
        write(disk, 0, pattern(SIZE, 2))
    disk.close()
    assert path.stat().st_size == length
    check(path)


def test_a_small_write_to_an_empty_image_is_small(tmp_path: Path) -> None:
    """What lies around it is a hole in the file, not zeros written."""
    path = create(tmp_path / "disk.qcow2", size=64 * MIB)
    disk = open_disk(path)
    for n in range(40):
        write(disk, n * MIB + 70_000, b"x" * 4096)
    disk.close()
    assert path.stat().st_blocks * 512 < MIB
    check(path)


def test_overlays_are_made_in_no_time(tmp_path: Path, base: Path) -> None:
    paths = [tmp_path / f"{n}.qcow2" for n in range(20)]
    took = []
    for path in paths:
        before = time.perf_counter()
        create_overlay(path, size=SIZE, backing=base, backing_format="raw", durable=False)
        took.append(time.perf_counter() - before)
    assert sorted(took)[len(took) // 2] < 0.001
    disk = open_disk(base, paths[0])
    write(disk, 0, b"x")
    disk.close()
    check(paths[0])
