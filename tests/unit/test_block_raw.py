"""Raw disks, the file under every disk, and chains of layers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.unit.block_kit import KIB, MIB, open_disk, pattern, read, split, write

from posada.errors import ImageError
from posada.storage.qcow2 import create_empty, create_overlay
from posada.vmm.block import file as file_module
from posada.vmm.block.chain import MAX_LAYERS, open_chain
from posada.vmm.block.disk import Cursor, total
from posada.vmm.block.file import File
from posada.vmm.block.raw import RawDisk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(pattern(MIB, 1))
    return path


def fd(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def test_a_raw_disk_is_its_file(path: Path) -> None:
    disk = RawDisk(fd(path))
    assert disk.size == MIB
    assert read(disk, 1000, 5000, [1, 2, 3000]) == pattern(MIB, 1)[1000:6000]
    write(disk, 77, b"x" * 3000, [100])
    disk.flush()
    expected = pattern(MIB, 1)[:77] + b"x" * 3000 + pattern(MIB, 1)[3077:]
    assert path.read_bytes() == expected
    disk.close()
    disk.close()


def test_more_buffers_than_one_call_takes(path: Path) -> None:
    disk = RawDisk(fd(path))
    assert read(disk, 512, 4000, [1] * 3000) == pattern(MIB, 1)[512:4512]
    write(disk, 0, pattern(4000, 2), [1] * 3000)
    assert read(disk, 0, 4000) == pattern(4000, 2)
    disk.close()


def test_short_transfers_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals and full devices cut transfers anywhere."""
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda f, b, o, *_: preadv(f, [b[0][:7]], o))
    monkeypatch.setattr(os, "pwritev", lambda f, b, o: pwritev(f, [b[0][:7]], o))
    disk = RawDisk(fd(path))
    assert read(disk, 3, 300, [100, 50]) == pattern(MIB, 1)[3:303]
    write(disk, 5, pattern(200, 9), [33])
    assert read(disk, 5, 200) == pattern(200, 9)
    monkeypatch.setattr(os, "pwritev", lambda f, b, o: 0)
    with pytest.raises(OSError, match="No space left") as caught:
        write(disk, 0, b"x")
    assert caught.value.errno == errno.ENOSPC
    disk.close()


def test_a_file_that_ends_early_reads_as_zeros(path: Path) -> None:
    disk = RawDisk(fd(path), 2 * MIB)
    assert read(disk, MIB - 10, 30, [5, 10]) == pattern(MIB, 1)[-10:] + bytes(20)
    assert read(disk, 2 * MIB - 10, 10) == bytes(10)
    write(disk, 2 * MIB - 1, b"!")
    assert path.stat().st_size == 2 * MIB
    disk.close()


@pytest.mark.parametrize(("offset", "length"), [(MIB, 1), (MIB - 1, 2), (-1, 1), (1 << 70, 1)])
def test_beyond_the_end(path: Path, offset: int, length: int) -> None:
    disk = RawDisk(fd(path))
    for call in (
        lambda: read(disk, offset, length),
        lambda: write(disk, offset, bytes(length)),
        lambda: disk.discard(offset, length),
        lambda: disk.write_zeroes(offset, length, True),
    ):
        with pytest.raises(OSError, match="beyond the end"):
            call()
    assert path.stat().st_size == MIB
    disk.close()


def test_a_read_only_disk_is_not_written_to(path: Path) -> None:
    disk = RawDisk(fd(path), readonly=True)
    for call in (
        lambda: write(disk, 0, b"x"),
        lambda: disk.discard(0, 512),
        lambda: disk.write_zeroes(0, 512, False),
        lambda: disk.resize(2 * MIB),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EROFS
    disk.flush()
    disk.close()


@pytest.mark.parametrize("able", [True, False])
def test_clearing(path: Path, monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    if not able:
        monkeypatch.setattr(File, "_allocate", lambda *_: False)
    disk = RawDisk(fd(path))
    disk.write_zeroes(100, 1000, unmap=False)
    disk.write_zeroes(8192, 65536, unmap=True)
    expected = bytearray(pattern(MIB, 1))
    expected[100:1100] = bytes(1000)
    expected[8192 : 8192 + 65536] = bytes(65536)
    assert read(disk, 0, MIB) == expected
    disk.discard(512 * KIB, 256 * KIB)
    assert read(disk, 0, 512 * KIB) == expected[: 512 * KIB]
    if able:
        assert path.stat().st_blocks * 512 <= MIB - 256 * KIB
    disk.write_zeroes(0, 0, unmap=True)
    disk.discard(0, 0)
    assert path.stat().st_size == MIB
    disk.close()


def test_growing(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"nobody's")
    disk = RawDisk(fd(path), MIB)
    disk.resize(2 * MIB)
    assert read(disk, MIB, MIB) == bytes(MIB)
    for size in (MIB, 2 * MIB + 1):
        with pytest.raises(OSError):
            disk.resize(size)
    disk.close()


def test_after_a_failed_flush_none_succeeds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel drops what it could not write and forgets: a second fdatasync would say that all is well."""
    disk = RawDisk(fd(path))
    write(disk, 0, b"x")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError):
        disk.flush()
    monkeypatch.undo()
    with pytest.raises(OSError, match="data was lost"):
        disk.flush()
    with pytest.raises(OSError, match="data was lost"):
        disk.close()
    assert disk.file.fd == -1


def test_a_flush_with_nothing_to_do_costs_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    disk = RawDisk(fd(path))
    disk.flush()
    assert calls == []
    write(disk, 0, b"x")
    disk.flush()
    disk.flush()
    assert len(calls) == 1
    disk.close()


def test_what_is_no_file_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        RawDisk(reader)
    os.close(reader)
    os.close(writer)


def test_punching_reports_what_cannot_be(path: Path) -> None:
    file = File(fd(path, os.O_RDONLY))
    with pytest.raises(OSError):
        file.punch(0, 512)
    file.close()
    assert file_module._KEEP_SIZE == 1


def test_a_chain_is_opened_as_told(tmp_path: Path, path: Path) -> None:
    names = [tmp_path / f"{n}.qcow2" for n in range(3)]
    below, kind = path, "raw"
    for name in names:
        create_overlay(name, size=MIB, backing=below, backing_format=kind)
        below, kind = name, "qcow2"
    for number in range(3):
        disk = open_disk(path, *names[: number + 1])
        write(disk, number * 4096, bytes([65 + number]) * 4096)
        disk.close()
    disk = open_disk(path, *names, size=MIB)
    assert read(disk, 0, MIB) == b"A" * 4096 + b"B" * 4096 + b"C" * 4096 + pattern(MIB, 1)[12288:]
    descriptors = disk.descriptors()
    assert len(descriptors) == 4
    disk.close()
    for number in descriptors:
        with pytest.raises(OSError):
            os.fstat(number)


def test_a_chain_that_makes_no_sense_is_refused_and_closed(tmp_path: Path, path: Path) -> None:
    plain, over = tmp_path / "plain.qcow2", tmp_path / "over.qcow2"
    create_empty(plain, size=MIB)
    create_overlay(over, size=MIB, backing=path, backing_format="raw")
    cases = [
        ([(over, "qcow2")], None, "layer 0 of 1: .* exactly if it names one"),
        ([(path, "raw"), (plain, "qcow2")], None, "layer 1 of 2: .* exactly if it names one"),
        ([(path, "raw"), (path, "raw")], None, "layer 1 of 2: a raw file cannot be an overlay"),
        ([(path, "raw"), (over, "vmdk")], None, "'vmdk' is not a format"),
        ([(path, "raw"), (path, "qcow2")], None, "not a qcow2 file"),
        ([(path, "raw"), (over, "qcow2")], 2 * MIB, "a disk of 1048576 bytes, not of 2097152"),
        ([], None, "1 to 64 layers"),
        ([(path, "raw")] * (MAX_LAYERS + 1), None, "1 to 64 layers"),
    ]
    before = len(os.listdir("/proc/self/fd"))
    for files, size, words in cases:
        with pytest.raises(ImageError, match=words):
            open_chain([(fd(name), kind) for name, kind in files], size)
        assert len(os.listdir("/proc/self/fd")) == before


def test_cursor() -> None:
    data = memoryview(bytes(range(100)))
    cursor = Cursor(split(data, [10, 20, 30]))
    taken = [cursor.take(n) for n in (5, 5, 25, 0, 65)]
    assert [total(part) for part in taken] == [5, 5, 25, 0, 65]
    assert b"".join(b"".join(part) for part in taken) == bytes(data)
