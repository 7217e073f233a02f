"""Disks from outside: copied whole and sparse, or refused with the reason and nothing left."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from posada.errors import AlreadyExists, HostError, ImageError
from posada.model.units import GIB, MIB
from posada.storage import qcow2, sparse
from posada.storage.disks import export_disk, import_disk, in_thread

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def qemu_img(*args: str | Path) -> None:
    subprocess.run(["qemu-img", *args], check=True, capture_output=True)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """4 GiB and 100 bytes, of which less than a megabyte is there."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(4 * GIB + 100)
        file.seek(GIB)
        file.write(os.urandom(200_000))
        file.seek(4 * GIB)
        file.write(b"end")
    return path


async def test_a_raw_disk_is_copied_sparse_and_rounded_to_sectors(raw: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    seen: list[float | None] = []
    assert await import_disk(raw, target, progress=lambda f, _: seen.append(f)) == ("raw", 4 * GIB + 512)
    assert target.stat().st_size == 4 * GIB + 512
    assert target.stat().st_blocks * 512 < MIB
    await asyncio.sleep(0)  # reports come through the loop
    assert seen and all(f is not None and 0 < f <= 1 for f in seen)
    os.truncate(target, 4 * GIB + 100)
    assert digest(raw) == digest(target)


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return sparse.digest(file.fileno())


def test_the_digest_does_not_see_how_holes_lie(tmp_path: Path) -> None:
    data = bytes(300_000) + b"x" + bytes(100_000) + b"y" * 70_000
    holes, full = tmp_path / "holes", tmp_path / "full"
    full.write_bytes(data)
    with open(holes, "wb") as file:
        file.truncate(len(data))
        file.seek(300_000)
        file.write(b"x")
        file.seek(400_001)
        file.write(b"y" * 70_000)
    assert digest(holes) == digest(full)
    for changed in (data + b"\0", data[:-1] + b"z", b"\1" + data[1:], data[:300_001] + b"x" + data[300_002:]):
        full.write_bytes(changed)
        assert digest(holes) != digest(full)


@needs_qemu_img
@pytest.mark.parametrize("options", [[], ["-c"], ["-o", "compat=0.10"], ["-o", "cluster_size=512"]])
async def test_a_qcow2_disk_becomes_the_raw_disk_it_stands_for(tmp_path: Path, options: list[str]) -> None:
    raw, source, target = tmp_path / "raw", tmp_path / "source.qcow2", tmp_path / "target"
    raw.write_bytes(os.urandom(70_000).ljust(3 * MIB, b"\0") + os.urandom(MIB))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, source)
    assert await import_disk(source, target) == ("raw", 4 * MIB)
    assert target.read_bytes() == raw.read_bytes()


async def refused(source: Path, words: str, *, format: str | None = None) -> None:
    """The import fails with these words, and leaves nothing."""
    target = source.with_name("target")
    before = sorted(source.parent.iterdir())
    with pytest.raises(ImageError, match=words):
        await import_disk(source, target, format=format)
    assert sorted(source.parent.iterdir()) == before


async def test_a_backing_file_is_refused_and_not_opened(tmp_path: Path) -> None:
    source = tmp_path / "evil.qcow2"
    qcow2.create_overlay(source, size=MIB, backing=Path("/etc/shadow"), backing_format="raw")
    await refused(source, "backing file .*/etc/shadow")


@needs_qemu_img
async def test_a_data_file_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "evil.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'other'},data_file_raw=on", source, "1M")
    await refused(source, "another file")


async def test_an_encrypted_disk_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "secret.qcow2"
    qcow2.create_empty(source, size=MIB)
    patch(source, 32, struct.pack(">I", 2))  # crypt_method: LUKS
    await refused(source, "encrypted")


@needs_qemu_img
async def test_a_truncated_qcow2_is_refused_even_when_its_header_is_whole(tmp_path: Path) -> None:
    raw, source = tmp_path / "raw", tmp_path / "source.qcow2"
    raw.write_bytes(os.urandom(2 * MIB))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, source)
    os.truncate(source, MIB)
    await refused(source, "truncated or corrupt")


@needs_qemu_img
async def test_tables_that_point_outside_are_refused(tmp_path: Path) -> None:
    raw, source = tmp_path / "raw", tmp_path / "source.qcow2"
    raw.write_bytes(os.urandom(MIB))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, source)
    (l1,) = struct.unpack_from(">Q", source.read_bytes(), 40)
    patch(source, l1, struct.pack(">Q", (1 << 63) | (1 << 40)))
    await refused(source, "truncated or corrupt")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"KDMV", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"<<< Oracle VM", "VDI"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"LUKS\xba\xbe", "LUKS"),
    ],
)
async def test_other_formats_are_named(tmp_path: Path, head: bytes, words: str) -> None:
    source = tmp_path / "disk"
    source.write_bytes(head.ljust(2 * MIB, b"\0"))
    await refused(source, words)


@pytest.mark.parametrize("size", [0, 1000])
async def test_absurdly_small_disks_are_refused(tmp_path: Path, size: int) -> None:
    source = tmp_path / "disk"
    source.write_bytes(b"x" * size)
    await refused(source, "is a disk of")


async def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    await refused(tmp_path / "pipe", "neither a file nor a block device")
    with pytest.raises(HostError, match="No such file"):
        await import_disk(tmp_path / "nothing", tmp_path / "target")


async def test_a_format_that_is_named_is_believed(tmp_path: Path) -> None:
    """A raw disk whose guest wrote a qcow2 header into its first sector stays the raw disk it is."""
    source, target = tmp_path / "disk", tmp_path / "target"
    qcow2.create_overlay(source, size=MIB, backing=Path("/etc/shadow"), backing_format="raw")
    os.truncate(source, 2 * MIB)
    assert await import_disk(source, target, format="raw") == ("raw", 2 * MIB)
    assert target.read_bytes() == source.read_bytes()


async def test_an_existing_target_is_left_alone(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(AlreadyExists):
        await import_disk(raw, tmp_path / "target")
    with pytest.raises(AlreadyExists):
        await export_disk(raw, tmp_path / "target", format="raw")
    assert (tmp_path / "target").read_text() == "mine"


@needs_qemu_img
@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_export_and_import_again_is_the_same_disk(raw: Path, tmp_path: Path, format: str) -> None:
    os.truncate(raw, 4 * GIB + 512)
    await export_disk(raw, tmp_path / "out", format=format)
    await import_disk(tmp_path / "out", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(raw)
    assert (tmp_path / "out").stat().st_blocks * 512 < 2 * MIB
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "disk.raw", "out"]


async def test_export_to_an_unknown_format_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="vmdk"):
        await export_disk(raw, tmp_path / "out", format="vmdk")
    assert not (tmp_path / "out").exists()


async def test_cancelling_an_import_leaves_nothing_and_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "disk", tmp_path / "target"
    source.write_bytes(os.urandom(2 * MIB))
    copying = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless(*_: object, stop: threading.Event, done: object = None) -> None:
        loop.call_soon_threadsafe(copying.set)
        stop.wait(20)
        raise sparse.Stopped

    monkeypatch.setattr(sparse, "copy", endless)
    task = asyncio.create_task(import_disk(source, target))
    await copying.wait()
    assert target.exists()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not target.exists()


async def test_in_thread_waits_for_its_thread_however_often_it_is_cancelled() -> None:
    started, ended = asyncio.Event(), False
    loop = asyncio.get_running_loop()
    release = threading.Event()

    def work(stop: threading.Event) -> None:
        nonlocal ended
        loop.call_soon_threadsafe(started.set)
        stop.wait(20)
        release.wait(20)
        ended = True

    task = asyncio.create_task(in_thread(work))
    await started.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended
