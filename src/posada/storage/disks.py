"""Disks that come from outside, and go there: copied in as sparse raw files, grown, exported.

A disk from outside is hostile: QEMU's own formats can name other files on the host (backing files, data files), claim
any size, or contradict themselves. Such a disk is refused before anything opens it but `posada.storage.qcow2`, its
format is never guessed by QEMU, and it is opened once, so that it cannot be exchanged between the look and the copy.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from posada.errors import AlreadyExists, HostError, ImageError, PosadaError
from posada.model.machine import MAX_DISK, MIN_DISK
from posada.model.progress import Progress, quiet
from posada.model.units import format_size
from posada.storage import sparse
from posada.storage.qcow2 import MAGIC, Qcow2Info, parse_header
from posada.storage.tools import ToolFailed, run_tool

T = TypeVar("T")

_SECTOR = 512
_LEAKED = 3
"""qemu-img check: clusters that nothing refers to; harmless."""
#: What other formats begin with, to say what a file is instead of booting rubbish.
_FOREIGN = {
    b"KDMV": "a VMDK", b"# Disk DescriptorFile": "a VMDK", b"vhdxfile": "a VHDX", b"conectix": "a VHD",
    b"<<< ": "a VDI", b"QED\0": "a QED", b"LUKS\xba\xbe": "an encrypted (LUKS)", b"\x1f\x8b": "a gzip-compressed",
    b"\xfd7zXZ\0": "an xz-compressed", b"BZh": "a bzip2-compressed", b"\x28\xb5\x2f\xfd": "a zstd-compressed",
    b"PK\x03\x04": "a zip-compressed", b"\x7fELF": "an ELF", b"WithoutFreeSpace": "a Parallels",
}  # fmt: skip


async def import_disk(
    source: Path, target: Path, *, format: str | None = None, progress: Progress = quiet
) -> tuple[str, int]:
    """Copy a raw or qcow2 disk to ``target``, which must not exist; returns (format of the target, its size in bytes).

    The target is raw and sparse: the fastest base for overlays. ``format`` None: by the file's first bytes. On failure
    or cancellation there is no target. Raises ImageError (refused, and why), HostError (cannot be read; disk full),
    AlreadyExists.
    """
    fd = _open(source)
    try:
        with create(target) as out:
            return await _import(fd, source, target, out.fd, format, from_thread(progress))
    finally:
        os.close(fd)


async def _import(
    fd: int, source: Path, target: Path, out: int, format: str | None, progress: Progress
) -> tuple[str, int]:
    head, length = os.pread(fd, 1 << 16, 0), os.lseek(fd, 0, os.SEEK_END)
    kind = detect(head) if format is None else format
    if kind not in ("raw", "qcow2"):
        raise ImageError(f"{source} is {kind} disk, not raw or qcow2", hint="qemu-img convert can make one of it")
    if kind == "raw":
        size = _check_size(-(-length // _SECTOR) * _SECTOR, source)
        # Room for a partial last sector: guests see whole ones.
        await in_thread(lambda stop: _copy_raw(fd, out, target, length, size, stop, progress))
        return "raw", size
    try:
        info = parse_header(head, length)
        _refuse(info)
    except ImageError as error:
        raise ImageError(f"{source}: {error.message}", hint=error.hint) from None
    size = _check_size(info.size, source)
    await _check(fd, source, progress)
    await _convert(fd, "qcow2", target, "raw", progress)
    if target.stat().st_size != size:
        raise ImageError(f"{source} claims to be a disk of {size} bytes but is one of {target.stat().st_size}")
    await in_thread(lambda stop: _sync(target))
    return "raw", size


def detect(head: bytes) -> str:
    """``qcow2``, ``raw``, or what else a file is, in words."""
    if head.startswith(MAGIC):
        # QEMU's first qcow has the same magic and another version; parse_header refuses it by name.
        return "qcow2"
    return next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), "raw")


def _refuse(info: Qcow2Info) -> None:
    """Raise ImageError for a disk that is not all in its one file, or cannot be read without a secret."""
    if info.backing is not None:
        hint = "merge the two first, where the backing file is: qemu-img convert -O qcow2 DISK MERGED"
        raise ImageError(
            f"it has a backing file ({info.backing!r}), which is refused: it could be any file here", hint=hint
        )
    if info.data_file:
        raise ImageError("its data is in another file, which is refused: it could be any file here")
    if info.encrypted:
        raise ImageError("it is encrypted", hint="decrypt it first: qemu-img convert")


def _check_size(size: int, source: Path) -> int:
    if not MIN_DISK <= size <= MAX_DISK:
        limits = f"{format_size(MIN_DISK)} to {format_size(MAX_DISK)}"
        raise ImageError(f"{source} is a disk of {format_size(size)}", hint=f"disks are {limits} large")
    return size


def _open(source: Path) -> int:
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(f"cannot read {source}: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise ImageError(f"{source} is neither a file nor a block device")
    return fd


def _copy_raw(
    fd: int, out: int, target: Path, length: int, size: int, stop: threading.Event, progress: Progress
) -> None:
    with disk_errors(target):
        sparse.copy(fd, out, length, stop=stop, done=lambda at: progress(at / size, "copying the disk"))
        os.ftruncate(out, size)
        os.fsync(out)


async def _check(fd: int, source: Path, progress: Progress) -> None:
    """Refuse a qcow2 file whose tables contradict each other or point beyond its end, where converting finds zeros."""
    progress(None, "checking the disk")
    try:
        await run_tool(
            ["qemu-img", "check", "-q", "-f", "qcow2", f"/dev/fd/{fd}"], package="qemu-utils", pass_fds=(fd,)
        )
    except ToolFailed as error:
        if error.status == _LEAKED:
            return
        reason = next((line for line in error.output.splitlines() if "ERROR" in line or "qemu-img" in line), "")
        reason = reason.replace(f"/dev/fd/{fd}", "the disk").removeprefix("qemu-img: ")
        raise ImageError(f"{source} is truncated or corrupt: {reason}") from error


async def _convert(fd: int, kind: str, target: Path, to: str, progress: Progress) -> None:
    """qemu-img convert from an open file; format named, so that nothing is probed."""
    progress(None, "converting the disk")
    # Inherited as a descriptor and opened by number: the file that was looked at, whatever its name means by now.
    source = f"/dev/fd/{fd}"
    try:
        await run_tool(
            ["qemu-img", "convert", "-f", kind, "-O", to, "-t", "writeback", source, str(target)],
            package="qemu-utils", pass_fds=(fd,),
        )  # fmt: skip
    except ToolFailed as error:
        detail = error.output.replace(source, "the disk").strip().removeprefix("qemu-img: ")
        raise ImageError(f"the disk is corrupt: {detail}") from error


async def export_disk(source: Path, target: Path, *, format: str, progress: Progress = quiet) -> None:
    """Write a raw disk of posada's to ``target``, which must not exist, as ``raw`` (sparse) or ``qcow2``.

    The target appears whole or not at all. Raises AlreadyExists, HostError, ImageError (no such format).
    """
    if format not in ("raw", "qcow2"):
        raise ImageError(f"{format!r} is not a format to export to", hint="use raw or qcow2")
    if target.exists():
        raise AlreadyExists("file", str(target))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    progress = from_thread(progress)
    fd = _open(source)
    try:
        with create(partial) as out:
            if format == "raw":
                size = os.fstat(fd).st_size
                await in_thread(lambda stop: _copy_raw(fd, out.fd, target, size, size, stop, progress))
            else:
                await _convert(fd, "raw", partial, "qcow2", progress)
                await in_thread(lambda stop: _sync(partial))
        with disk_errors(target):
            os.link(partial, target)  # unlike rename, refuses to replace what appeared meanwhile
    finally:
        partial.unlink(missing_ok=True)
        os.close(fd)


async def resize(path: Path, size: int, *, format: str) -> None:
    """Grow a disk file that no machine has open to ``size`` bytes. Raises ImageError for shrinking, HostError."""
    if format == "raw":
        with disk_errors(path):
            if size < path.stat().st_size:
                raise ImageError("a disk cannot shrink: its end may hold data")
            os.truncate(path, size)
        return
    try:
        # -U would allow it under a running machine, which must be told instead.
        await run_tool(["qemu-img", "resize", "-q", "-f", format, str(path), str(size)], package="qemu-utils")
    except ToolFailed as error:
        raise ImageError(f"cannot resize {path.name}: {error.output.strip()}") from error


class create:
    """A new file, open for writing while the block runs; gone again if it raises. Raises HostError, AlreadyExists."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> create:
        with disk_errors(self._path):
            self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        os.close(self.fd)
        if kind is not None:
            with suppress(OSError):
                self._path.unlink()


class disk_errors:
    """Turns OSError into HostError that names the file (a full disk says so), or AlreadyExists."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, PosadaError):
            return
        if isinstance(error, FileExistsError):
            raise AlreadyExists("file", str(self._path)) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostError(f"the disk is full: {self._path}", hint="free some space and try again") from error
        raise HostError(f"{self._path}: {error.strerror}") from error


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run blocking work in a thread, with an event that is set when the caller is cancelled.

    Does not return before the thread has ended: its files can be removed then.
    """
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        while not task.done():
            with suppress(asyncio.CancelledError, Exception):
                await asyncio.shield(task)
        raise


def from_thread(progress: Progress) -> Progress:
    """A `Progress` that may be called in any thread and reports in the running loop's."""
    loop = asyncio.get_running_loop()

    def report(fraction: float | None, message: str) -> None:
        loop.call_soon_threadsafe(progress, fraction, message)

    return report


def _sync(path: Path) -> None:
    with disk_errors(path), open(path, "rb") as file:
        os.fsync(file.fileno())
