"""qcow2 headers: what posada writes is what QEMU reads, and what others wrote is not believed."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from posada.errors import HostError, ImageError
from posada.model.machine import MAX_DISK
from posada.model.units import GIB, MIB, TIB
from posada.storage import qcow2
from posada.storage.disks import resize

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def qemu_img(*args: str | Path) -> str:
    return subprocess.run(["qemu-img", *args], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A raw disk of 8 MiB with data in two places."""
    path = tmp_path / "base.raw"
    with open(path, "wb") as file:
        file.truncate(8 * MIB)
        file.seek(3 * MIB)
        file.write(b"posada" * 1000)
        file.seek(8 * MIB - 5)
        file.write(b"the e")
    return path


@needs_qemu_img
def test_an_overlay_reads_as_its_base(base: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    qcow2.create_overlay(overlay, size=8 * MIB, backing=base, backing_format="raw")
    assert "No errors were found" in qemu_img("check", "-f", "qcow2", overlay)
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", overlay, base)


@needs_qemu_img
def test_an_overlay_larger_than_its_base_ends_in_zeros(base: Path, tmp_path: Path) -> None:
    overlay, plain = tmp_path / "overlay.qcow2", tmp_path / "plain.raw"
    qcow2.create_overlay(overlay, size=12 * MIB, backing=base, backing_format="raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, plain)
    assert plain.read_bytes() == base.read_bytes() + bytes(4 * MIB)


@needs_qemu_img
def test_an_overlay_keeps_what_is_written_to_it_and_leaves_its_base_alone(base: Path, tmp_path: Path) -> None:
    overlay, top, before = tmp_path / "overlay.qcow2", tmp_path / "top.qcow2", base.read_bytes()
    qcow2.create_overlay(overlay, size=8 * MIB, backing=base, backing_format="raw")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 3145728 4096", overlay], check=True, capture_output=True
    )
    qcow2.create_overlay(top, size=8 * MIB, backing=overlay, backing_format="qcow2")
    plain = tmp_path / "plain.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", top, plain)
    assert "No errors were found" in qemu_img("check", "-f", "qcow2", overlay)
    assert base.read_bytes() == before
    assert plain.read_bytes() == before[: 3 * MIB] + b"\7" * 4096 + before[3 * MIB + 4096 :]


@needs_qemu_img
@pytest.mark.parametrize("size", [512, MIB, 512 * MIB, 512 * MIB + 512, 10 * GIB, 4 * TIB, 4 * TIB + 512, MAX_DISK])
def test_an_empty_image_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "empty.qcow2"
    qcow2.create_empty(path, size=size)
    assert "No errors were found" in qemu_img("check", "-f", "qcow2", path)
    info = qcow2.inspect(path)
    assert (info.version, info.size, info.backing) == (3, size, None)
    assert path.stat().st_blocks * 512 < 64 << 10


@needs_qemu_img
async def test_resize_grows_both_formats(tmp_path: Path) -> None:
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    qcow2.create_empty(path, size=MIB)
    raw.write_bytes(bytes(MIB))
    await resize(path, 2 * GIB, format="qcow2")
    await resize(raw, 2 * GIB, format="raw")
    assert qcow2.inspect(path).size == raw.stat().st_size == 2 * GIB
    for which, format in ((path, "qcow2"), (raw, "raw")):
        with pytest.raises(ImageError):
            await resize(which, MIB, format=format)


def test_inspect_reports_the_backing_file(tmp_path: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    qcow2.create_overlay(path, size=MIB, backing=Path("/images/ä/base.raw"), backing_format="raw")
    info = qcow2.inspect(path)
    assert (info.backing, info.backing_format) == ("/images/ä/base.raw", "raw")


@pytest.mark.parametrize("size", [0, -512, 100, MAX_DISK + 512])
def test_sizes_that_are_no_disk_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ImageError, match="not the size of a disk"):
        qcow2.create_empty(tmp_path / "x", size=size)
    assert not (tmp_path / "x").exists()


def test_a_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="backing file of 1100 bytes"):
        qcow2.create_overlay(tmp_path / "x", size=MIB, backing=Path("b" * 1100), backing_format="raw")
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(HostError, match="File exists"):
        qcow2.create_empty(tmp_path / "x", size=MIB)
    assert (tmp_path / "x").read_text() == "mine"


@needs_qemu_img
@pytest.mark.parametrize(
    "options", ["compat=0.10", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "refcount_bits=1"]
)
def test_inspect_reads_what_qemu_writes(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "64M")
    info = qcow2.inspect(path)
    assert info.size == 64 * MIB
    assert info.backing is None
    assert not info.encrypted
    assert not info.data_file
    assert info.version == (2 if options == "compat=0.10" else 3)


@needs_qemu_img
def test_inspect_reports_what_an_import_refuses(tmp_path: Path) -> None:
    data_file, encrypted = tmp_path / "data.qcow2", tmp_path / "encrypted.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'outside'}", data_file, "1M")
    qcow2.create_empty(encrypted, size=MIB)
    assert qcow2.inspect(data_file).data_file
    assert qcow2.inspect(header(encrypted, 32, ">I", 1)).encrypted


def header(path: Path, offset: int, format: str, value: int) -> Path:
    """Change one field of an image's header."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(format, value))
    return path


LIES = {
    "version": (4, ">I", 4, "version 4"),
    "qcow1": (4, ">I", 1, "version 1"),
    "tiny clusters": (20, ">I", 8, "cluster size"),
    "huge clusters": (20, ">I", 40, "cluster size"),
    "no size": (24, ">Q", 0, "claims to be a disk of 0B"),
    "absurd size": (24, ">Q", 1 << 62, "claims to be a disk of"),
    "more than its L1 table": (24, ">Q", 2 * TIB, "L1 table"),
    "crypt": (32, ">I", 9, "encryption method 9"),
    "huge L1 table": (36, ">I", 1 << 30, "L1 table"),
    "L1 table outside": (40, ">Q", 1 << 40, "L1 table lies outside"),
    "L1 table unaligned": (40, ">Q", 3 * 65536 + 8, "L1 table lies outside"),
    "refcount table outside": (48, ">Q", 1 << 40, "refcount table lies outside"),
    "no refcount table": (56, ">I", 0, "no refcount table"),
    "huge refcount table": (56, ">I", 4096, "refcount table of 256MiB"),
    "compression unannounced": (72, ">Q", 8, "compression type 0"),
    "too many snapshots": (60, ">I", 1 << 20, "1048576 snapshots"),
    "snapshots outside": (60, ">I", 5, "snapshot table"),
    "unknown feature": (72, ">Q", 1 << 20, "features that are not known"),
    "corrupt bit": (72, ">Q", 2, "marked as corrupt"),
    "refcount order": (96, ">I", 7, "refcounts"),
    "header length": (100, ">I", 1 << 20, "header of 1048576 bytes"),
    "short header": (100, ">I", 72, "header of 72 bytes"),
    "backing name outside": (8, ">Q", 1 << 20, "name of its backing file"),
    "backing name too long": (16, ">I", 5000, "name of its backing file"),
    "extension outside": (108, ">I", 1 << 31, "extension lies outside"),
}


@pytest.mark.parametrize(("offset", "format", "value", "words"), LIES.values(), ids=LIES)
def test_a_lying_header_is_refused(tmp_path: Path, offset: int, format: str, value: int, words: str) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2.create_overlay(path, size=MIB, backing=tmp_path / "base", backing_format="raw")
    qcow2.inspect(path)
    with pytest.raises(ImageError, match=words) as caught:
        qcow2.inspect(header(path, offset, format, value))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 60, 100, 65536, 131072, 3 * 65536])
def test_a_truncated_image_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2.create_empty(path, size=GIB)
    with open(path, "r+b") as file:
        file.truncate(length)
    with pytest.raises(ImageError):
        qcow2.inspect(path)


def test_an_overlay_may_be_made_durable_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for number, durable in enumerate((False, True)):
        path = tmp_path / str(number)
        qcow2.create_overlay(path, size=MIB, backing=tmp_path / "base", backing_format="raw", durable=durable)
        assert len(synced) == number
        assert qcow2.inspect(path).size == MIB


def test_a_missing_file_is_an_image_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="nothing-here"):
        qcow2.inspect(tmp_path / "nothing-here")
