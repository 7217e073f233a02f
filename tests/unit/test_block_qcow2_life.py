"""qcow2 disks over time: they grow, fill up, freeze below others, are left open, are opened after others."""

from __future__ import annotations

import errno
import os
import subprocess
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
    read,
    write,
)

from posada.errors import ImageError
from posada.model.machine import MAX_DISK
from posada.storage.qcow2 import create_empty
from posada.vmm.block.chain import overlay, reopen
from posada.vmm.block.qcow2.disk import Qcow2Disk
from posada.vmm.block.qcow2.image import MAX_SIZE

pytestmark = needs_qemu_img


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path)


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


def test_each_layer_takes_its_own_file(tmp_path: Path, base: Path) -> None:
    """Another file's descriptor would put that file's bytes under the tables of this one."""
    top, stranger = tmp_path / "top.qcow2", tmp_path / "stranger.qcow2"
    for path in (top, stranger):
        create(path, backing=base)
    disk = open_disk(base, top)
    given = [os.open(path, os.O_RDONLY) for path in (stranger, top, base)]
    reopen(disk, given)
    assert disk.descriptors() == [given[2], given[1]]
    with pytest.raises(OSError):
        os.fstat(given[0])
    with pytest.raises(OSError, match="no descriptor"):
        reopen(disk, [os.open(path, os.O_RDONLY) for path in (base, stranger)])
    disk.close()


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
            reopen(disk, [os.open(paths[0], os.O_RDONLY), os.open(base, os.O_RDONLY)])
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


def test_the_largest_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_empty(path, size=MAX_DISK)
    disk = open_disk(path)
    write(disk, MAX_DISK - 5, b"there")
    assert read(disk, MAX_DISK - 10, 10) == bytes(5) + b"there"
    disk.discard(0, 1 << 40)
    disk.close()
    check(path)
