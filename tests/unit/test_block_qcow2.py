"""qcow2 disks against QEMU's own tools: they read what we write, and we read what they write."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest
from tests.unit.block_kit import (
    KIB,
    MIB,
    check,
    content,
    needs_qemu_img,
    open_disk,
    pattern,
    qemu_img,
    qemu_io,
    read,
    write,
)  # fmt: skip

from posada.errors import ImageError
from posada.model.machine import MAX_DISK
from posada.storage.qcow2 import create_empty, create_overlay
from posada.vmm.block.chain import overlay
from posada.vmm.block.qcow2 import disk as disk_module
from posada.vmm.block.qcow2.disk import Qcow2Disk
from posada.vmm.block.qcow2.image import MAX_SIZE

pytestmark = needs_qemu_img
SIZE = 4 * MIB
OPTIONS = [
    "cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M", "lazy_refcounts=on", "compat=0.10",
    "refcount_bits=1", "refcount_bits=2,cluster_size=512", "refcount_bits=8", "refcount_bits=32", "refcount_bits=64",
    "preallocation=metadata", "preallocation=full,cluster_size=4k",
]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Raw, and shorter than the disks above it."""
    path = tmp_path / "base.raw"
    path.write_bytes(pattern(3 * MIB, 1))
    return path


def create(path: Path, options: str = "cluster_size=64k", backing: Path | None = None, size: int = SIZE) -> Path:
    kind = "" if backing is None else "qcow2" if backing.suffix == ".qcow2" else "raw"
    below: list[str | Path] = [] if backing is None else ["-b", backing, "-F", kind]
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *below, path, str(size))
    return path


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


@pytest.mark.parametrize(("options", "size"), [("cluster_size=64k", 40 * 1024 * MIB), ("cluster_size=512", 300 * MIB)])
def test_growing(tmp_path: Path, base: Path, options: str, size: int) -> None:
    """A backing disk that is larger than the disk was does not come to light."""
    path = create(tmp_path / "disk.qcow2", options, base, 2 * MIB - 512)
    disk = open_disk(base, path)
    write(disk, 2 * MIB - 1024, b"e" * 512)
    disk.resize(size)
    assert disk.size == size
    expected = pattern(3 * MIB, 1)[: 2 * MIB - 1024] + b"e" * 512 + bytes(2 * MIB)
    assert read(disk, 0, len(expected)) == expected
    write(disk, size - 3, b"end")
    disk.resize(size + 512)
    for wrong in (size, size + 513):
        with pytest.raises(OSError):
            disk.resize(wrong)
    with pytest.raises(OSError) as caught:
        disk.resize(1 << 60)
    assert caught.value.errno == errno.EFBIG
    disk.close()
    check(path)
    disk = open_disk(base, path, size=size + 512)
    assert read(disk, 0, len(expected)) == expected
    assert read(disk, size - 3, 515) == b"end" + bytes(512)
    disk.close()


def test_the_refcount_table_grows(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "cluster_size=512,refcount_bits=64", size=16 * MIB)
    disk = open_disk(path)
    for n in range(16):
        write(disk, n * MIB, pattern(MIB, n))
    disk.close()
    check(path)
    assert content(path) == b"".join(pattern(MIB, n) for n in range(16))


def test_more_tables_than_the_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posada.vmm.block.qcow2 import refcounts, tables

    monkeypatch.setattr(tables, "_CACHE_BYTES", 4 * 512)
    monkeypatch.setattr(refcounts, "_CACHE_BYTES", 4 * 512)
    path = create(tmp_path / "disk.qcow2", "cluster_size=512")
    disk = open_disk(path)
    assert isinstance(disk, Qcow2Disk)
    for n in range(0, SIZE, 32 * KIB):
        write(disk, n, pattern(3000, n))
    assert len(disk.clusters.tables.cache) <= 5
    for n in range(0, SIZE, 32 * KIB):
        assert read(disk, n, 3000) == pattern(3000, n)
    disk.close()
    check(path)


def test_a_full_disk_is_an_error_and_nothing_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "disk.qcow2", "cluster_size=4k")
    disk = open_disk(path)
    write(disk, 0, b"a" * 8192)
    whole = os.pwritev

    def full(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(fd, buffers, offset)

    limit = path.stat().st_size
    monkeypatch.setattr(os, "pwritev", full)
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            write(disk, MIB, b"b" * 100_000)
        assert caught.value.errno == errno.ENOSPC
    assert read(disk, 0, SIZE) == b"a" * 8192 + bytes(SIZE - 8192)
    write(disk, 4096, b"c" * 4096)
    disk.flush()
    limit = 0
    write_fails = pytest.raises(OSError, match="No space")
    monkeypatch.undo()
    write(disk, MIB, b"b" * 100_000)
    monkeypatch.setattr(os, "pwritev", full)
    with write_fails:
        disk.flush()
    monkeypatch.undo()
    disk.flush()
    disk.close()
    check(path)
    assert content(path)[MIB : MIB + 100_000] == b"b" * 100_000


def test_frozen_layers_below_two_machines(tmp_path: Path, base: Path) -> None:
    """As a fork uses it: parent and child go on above the same frozen disk, which others can open as well."""
    paths = [create(tmp_path / "0.qcow2", backing=base)]
    disk = open_disk(base, paths[0])
    write(disk, 1 * MIB, b"before" * 1000)
    write(disk, 0, pattern(128 * KIB, 5))
    disk.discard(0, 128 * KIB)
    disk.freeze()
    frozen = paths[0].read_bytes()
    check(paths[0])
    for call in (
        lambda: write(disk, 0, b"x"),
        lambda: disk.discard(0, MIB),
        lambda: disk.write_zeroes(0, 512, False),
        lambda: disk.resize(2 * SIZE),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EROFS
    paths += [create(tmp_path / f"{n}.qcow2", backing=paths[0]) for n in (1, 2)]
    child = os.fork()
    if not child:
        try:
            disk.reopen([os.open(base, os.O_RDONLY), os.open(paths[0], os.O_RDONLY)])
            disk = overlay(disk, os.open(paths[2], os.O_RDWR))
            assert read(disk, MIB, 6) == b"before"
            write(disk, MIB, b"child")
            disk.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    disk = overlay(disk, os.open(paths[1], os.O_RDWR))
    write(disk, MIB, b"parent")
    assert os.waitpid(child, 0)[1] == 0
    disk.flush()
    assert read(disk, MIB, 12) == b"parentbefore"
    disk.close()
    assert paths[0].read_bytes() == frozen
    for path, word in ((paths[1], b"parentbefore"), (paths[2], b"childebefore")):
        check(path)
        assert content(path)[MIB : MIB + 12] == word
        assert content(path)[: 128 * KIB] == bytes(128 * KIB)


def test_a_disk_that_was_never_closed_is_whole(tmp_path: Path, base: Path) -> None:
    path = create(tmp_path / "disk.qcow2", backing=base)
    disk = open_disk(base, path)
    write(disk, 100, b"flushed")
    disk.flush()
    write(disk, MIB, b"not")
    check(path, leaks=True)
    assert content(path)[100:107] == b"flushed"
    disk.close()
    assert content(path)[MIB : MIB + 3] == b"not"


def test_a_file_that_does_not_change_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "disk.qcow2")
    disk = open_disk(path)
    calls = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), real(fd)))
    disk.flush()
    assert len(calls) == 0
    write(disk, 0, b"x")
    disk.flush()
    assert len(calls) == 2  # data and the new L2 table; then what leads there
    write(disk, 1, b"y")
    disk.flush()
    assert len(calls) == 3
    disk.close()


def test_what_qemu_left_open_is_read_but_not_written(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "lazy_refcounts=on")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", "-c", "flush", "-c", "sigraise 9", path],
        check=False, capture_output=True,
    )  # fmt: skip
    disk = open_disk(path, readonly=True)
    assert read(disk, 0, 10) == b"\t" * 10
    disk.close()
    with pytest.raises(ImageError, match="not closed properly"):
        open_disk(path)
    qemu_img("check", "-q", "-r", "all", path)
    open_disk(path).close()


def test_bitmaps_of_others_are_marked_as_stale(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    qemu_img("bitmap", "--add", path, "b0")
    disk = open_disk(path)
    write(disk, 0, b"x")
    disk.close()
    assert path.read_bytes()[88:96] == bytes(8)
    check(path, leaks=True)


def test_sizes_that_do_not_end_with_a_cluster(tmp_path: Path, base: Path) -> None:
    size = 3 * MIB + 512 * 7
    path = create(tmp_path / "disk.qcow2", backing=base, size=size)
    disk = open_disk(base, path)
    write(disk, size - 1, b"!")
    disk.write_zeroes(3 * MIB, 512, unmap=True)
    assert read(disk, 3 * MIB, 512 * 7) == bytes(512 * 7 - 1) + b"!"
    disk.write_zeroes(3 * MIB - 64 * KIB, 64 * KIB + 512 * 7, unmap=True)
    disk.close()
    check(path)
    assert content(path) == pattern(3 * MIB, 1)[: 3 * MIB - 64 * KIB] + bytes(64 * KIB + 512 * 7)


def test_limits_agree() -> None:
    assert MAX_SIZE == MAX_DISK
    assert disk_module.File.__slots__


def test_the_largest_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_empty(path, size=MAX_DISK)
    disk = open_disk(path)
    write(disk, MAX_DISK - 5, b"there")
    assert read(disk, MAX_DISK - 10, 10) == bytes(5) + b"there"
    disk.discard(0, 1 << 40)
    disk.close()
    check(path)
