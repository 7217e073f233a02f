"""Fill the directory of an image in the making: from Debian's packages, or from files somebody has."""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from posada.errors import HostError, ImageError, SpecError
from posada.images.debian import DEFAULT_SIZE, DebianFiles, build_debian
from posada.images.initrd import pack_modules
from posada.images.kernel import MAX_KERNEL, extract_vmlinux, is_bzimage
from posada.images.manifest import MODULES, FileEntry, Manifest, measure
from posada.images.modules import MAX_MODULE, boot_modules, is_module
from posada.images.partial import Partial
from posada.model.progress import Progress
from posada.storage.disks import disk_errors, from_thread, import_disk, in_thread

DISK, KERNEL, INITRD = "disk.raw", "kernel", "initrd"
MAX_INITRD = 1 << 30
_VMLINUZ, _ALL_MODULES = "vmlinuz", "all-modules.tar"


async def fill_debian(
    partial: Partial, suite: str, *, packages: Sequence[str], size: int | None, arch: str, progress: Progress
) -> Manifest:
    """A Debian root disk, its kernel, and the modules its initramfs needs. Raises as `build_debian`."""
    scratch = partial.scratch()
    folder = partial.path
    made = DebianFiles(disk=folder / DISK, kernel=folder / _VMLINUZ, modules=folder / _ALL_MODULES)
    try:
        await build_debian(
            suite, made, scratch=scratch, packages=packages, size=size or DEFAULT_SIZE, arch=arch, progress=progress
        )
    finally:
        await in_thread(lambda stop: partial.drop_scratch())
    report = from_thread(progress)

    def finish(stop: threading.Event) -> Manifest:
        with disk_errors(folder):
            report(0.92, "preparing the kernel")
            (folder / KERNEL).write_bytes(bootable(made.kernel.read_bytes()))
            (folder / MODULES).write_bytes(pack_modules(_boot_modules(made.modules)))
            made.kernel.unlink()
            made.modules.unlink()
            files = _measure(folder, [DISK, KERNEL, MODULES], stop, report, 0.95)
        return Manifest(arch=arch, files=files, disk=DISK, kernel=KERNEL, modules=MODULES, agent=True)

    return await in_thread(finish)


async def fill_imported(
    partial: Partial, *, disk: Path | None, kernel: Path | None, initrd: Path | None, append: str, progress: Progress
) -> Manifest:
    """Copies of somebody's disk, kernel and initrd, as far as they are given.

    Raises ImageError (refused, and why), HostError (cannot be read; disk full), SpecError (they do not go together).
    """
    if disk is None and kernel is None:
        raise SpecError("disk", "is missing", hint="an image needs a disk, a kernel, or both")
    if kernel is None and (initrd is not None or append):
        raise SpecError("kernel", "is missing", hint="an initrd and a command line belong to a kernel")
    if len(append) > 2048 or any(ord(c) < 32 or ord(c) > 126 for c in append):
        raise SpecError("append", "is not a kernel command line", hint="one line of at most 2048 ASCII characters")
    folder = partial.path
    names = []
    arch = "x86_64"
    if kernel is not None:
        image = await in_thread(lambda stop: read_bounded(kernel, MAX_KERNEL))
        arch = kernel_arch(image, kernel)
        await in_thread(lambda stop: _write(folder / KERNEL, bootable(image)))
        names.append(KERNEL)
    if initrd is not None:
        await in_thread(lambda stop: _write(folder / INITRD, read_bounded(initrd, MAX_INITRD)))
        names.append(INITRD)
    if disk is not None:
        await import_disk(disk, folder / DISK, progress=lambda f, m: progress(f if f is None else f * 0.8, m))
        names.append(DISK)
    report = from_thread(progress)
    files = await in_thread(lambda stop: _measure(folder, names, stop, report, 0.8))
    return Manifest(
        arch=arch, files=files, append=append, disk=DISK if disk else None,
        kernel=KERNEL if kernel else None, initrd=INITRD if initrd else None,
    )  # fmt: skip


def bootable(kernel: bytes) -> bytes:
    """The vmlinux inside, which boots sooner, or the kernel as it is where that cannot be had."""
    try:
        return extract_vmlinux(kernel)
    except ImageError:
        return kernel


def kernel_arch(kernel: bytes, path: Path) -> str:
    """``x86_64`` or ``aarch64``. Raises ImageError for a file that is not a kernel QEMU could boot."""
    if kernel[:4] == b"\x7fELF":
        machine = int.from_bytes(kernel[18:20], "little")
        if machine not in (62, 183):  # EM_X86_64, EM_AARCH64
            raise ImageError(f"{path} is for another architecture (ELF machine {machine})")
        if machine == 62:
            extract_vmlinux(kernel)
        return "x86_64" if machine == 62 else "aarch64"
    if is_bzimage(kernel):
        return "x86_64"
    # arm64's Image header: magic at 56; EFI zboot: MZ, then zimg at 4; and either may come gzipped.
    if kernel[56:60] == b"ARM\x64" or kernel[:2] == b"\x1f\x8b" or kernel[4:8] == b"zimg":
        return "aarch64"
    raise ImageError(f"{path} is not a kernel: neither a bzImage, nor a vmlinux, nor an arm64 Image")


def read_bounded(path: Path, limit: int) -> bytes:
    """A whole regular file. Raises HostError, ImageError when it is empty or larger than ``limit`` bytes."""
    with disk_errors(path), open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        data = file.read(limit + 1)
    if not 0 < len(data) <= limit:
        raise ImageError(f"{path} is {'empty' if not data else f'larger than {limit >> 20} MiB'}")
    return data


def _write(path: Path, data: bytes) -> None:
    with disk_errors(path):
        path.write_bytes(data)


def _boot_modules(archive: Path) -> list[tuple[str, bytes]]:
    try:
        with tarfile.open(archive, mode="r:") as tar:
            members = {m.name.removeprefix("./"): m for m in tar if m.isfile() and m.size <= MAX_MODULE}

            def reader(member: tarfile.TarInfo) -> Callable[[], bytes]:
                def read() -> bytes:
                    file = tar.extractfile(member)
                    return file.read() if file is not None else b""

                return read

            files = {name: reader(member) for name, member in members.items()}
            dep = files["modules.dep"]().decode("utf-8", "replace") if "modules.dep" in files else ""
            modules = boot_modules({name: read for name, read in files.items() if is_module(name)}, dep=dep)
    except (tarfile.TarError, EOFError) as error:
        raise HostError(f"the kernel's modules cannot be read: {error}") from error
    return modules


def _measure(
    folder: Path, names: list[str], stop: threading.Event, report: Progress, fraction: float
) -> dict[str, FileEntry]:
    report(fraction, "hashing")
    with disk_errors(folder):
        return measure(folder, names, stop=stop, done=lambda _: None)
