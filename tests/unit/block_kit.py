"""What tests of disks share: images made by qemu-img, disks opened as the monitor does, and QEMU's word on the result."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from posada.vmm.block.chain import open_chain
from posada.vmm.block.disk import Disk

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
"""Of the disks of most tests."""


def qemu_img(*args: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True, text=True).stdout


def qemu_io(path: Path, *commands: str, format: str = "qcow2") -> None:
    args = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", format, *args, str(path)], check=True, capture_output=True, text=True)
    assert "failed" not in done.stdout, done.stdout


def check(path: Path, *, leaks: bool = False) -> None:
    """qemu-img check finds nothing; or leaks, where these are all right."""
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0 or (leaks and done.returncode == 3), done.stdout + done.stderr


def open_disk(*paths: Path, size: int | None = None, readonly: bool = False) -> Disk:
    """The chain of these files, the lowest first; raw unless it is named .qcow2."""
    chain = []
    for number, path in enumerate(paths):
        writable = number == len(paths) - 1 and not readonly
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        chain.append((fd, "qcow2" if path.suffix == ".qcow2" else "raw"))
    return open_chain(chain, size, readonly)


def read(disk: Disk, offset: int, length: int, pieces: Sequence[int] = ()) -> bytes:
    """What the disk holds, read into pieces of these sizes (and the rest)."""
    out = bytearray(b"\xee" * length)
    disk.read(offset, split(memoryview(out), pieces))
    return bytes(out)


def write(disk: Disk, offset: int, data: bytes, pieces: Sequence[int] = ()) -> None:
    disk.write(offset, split(memoryview(data), pieces))


def split(view: memoryview, pieces: Sequence[int]) -> list[memoryview]:
    out = []
    for piece in pieces:
        if piece < len(view):
            out.append(view[:piece])
            view = view[piece:]
    return [*out, view]


def content(path: Path) -> bytes:
    """The whole disk, as QEMU reads it."""
    plain = path.with_suffix(".plain")
    qemu_img("convert", "-f", "qcow2" if path.suffix == ".qcow2" else "raw", "-O", "raw", path, plain)
    data = plain.read_bytes()
    plain.unlink()
    return data


@cache
def pattern(length: int, seed: int) -> bytes:
    """Bytes that differ from place to place and from seed to seed."""
    return b"".join((seed << 32 | n).to_bytes(8, "little") for n in range(-(-length // 8)))[:length]


def make_base(folder: Path) -> Path:
    """A raw disk, shorter than the disks that stand on it."""
    path = folder / "base.raw"
    path.write_bytes(pattern(3 * MIB, 1))
    return path


def create(path: Path, options: str = "cluster_size=64k", backing: Path | None = None, size: int = SIZE) -> Path:
    kind = "" if backing is None else "qcow2" if backing.suffix == ".qcow2" else "raw"
    below: list[str | Path] = [] if backing is None else ["-b", backing, "-F", kind]
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *below, path, str(size))
    return path
