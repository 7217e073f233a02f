"""Kernel modules: which ones a guest loads before its root is there, and in which order.

Dependencies come from ``modules.dep`` where depmod has made one (depmod(8)), else from the ``depends=`` entry each
module carries in its ``.modinfo`` section: so a kernel package that was only unpacked will do.
"""

from __future__ import annotations

import gzip
import importlib
import lzma
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from posada.errors import ImageError

#: What every boot needs. Console and disk come first: the agent answers, and the root is mounted, while the rest loads.
#: tcp_diag is loaded only by forks that have inherited connections to destroy; the agent leaves it out at boot.
#: What the machine has no device for is left out by the agent (`conditions`).
BOOT = (
    "virtio_pci", "virtio_mmio", "virtio_console", "vmw_vsock_virtio_transport", "virtio_blk", "virtio_net", "virtio_rng",
    "virtio_balloon", "virtiofs", "tcp_diag",
)  # fmt: skip

_PLUGGED = ("virtio_blk", "virtio_net")
_DEVICES = ("virtio:", "pci:", "acpi", "of:")
"""What aliases of devices begin with, as far as the agent knows the bus."""

MAX_MODULE = 64 << 20
_SUFFIXES = ("", ".xz", ".gz", ".zst")


def module_name(path: str) -> str:
    """``kernel/drivers/net/virtio-net.ko.xz`` → ``virtio_net``: names use underscores whatever the file is called."""
    return PurePosixPath(path).name.split(".ko", 1)[0].replace("-", "_")


def is_module(path: str) -> bool:
    return any(path.endswith(".ko" + suffix) for suffix in _SUFFIXES)


def load_order(wanted: Sequence[str], depends: Callable[[str], Sequence[str] | None]) -> list[str]:
    """Module names so that each comes after those it depends on; ``depends`` returns None for one that is built in."""
    order: list[str] = []
    visiting: set[str] = set()

    def visit(name: str) -> None:
        if name in order or name in visiting:
            return
        needs = depends(name)
        if needs is None:
            return
        visiting.add(name)
        for need in needs:
            visit(need)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def parse_modules_dep(text: str) -> dict[str, list[str]]:
    """``modules.dep`` as {module name: names it depends on}."""
    out = {}
    for line in text.splitlines():
        path, colon, rest = line.partition(":")
        if colon:
            out[module_name(path)] = [module_name(p) for p in rest.split()]
    return out


def boot_modules(
    files: Mapping[str, Callable[[], bytes]], *, wanted: Sequence[str] = BOOT, dep: str = ""
) -> list[tuple[str, bytes]]:
    """(file name, uncompressed ELF) of the wanted modules and what they need, in load order.

    ``files`` maps paths below ``/lib/modules/VERSION`` to what reads them; ``dep`` is the text of ``modules.dep`` or
    empty. A wanted module that is not there is taken to be built into the kernel. Raises ImageError for a corrupt one.
    """
    paths = {module_name(path): path for path in files if is_module(path)}
    listed = parse_modules_dep(dep)
    contents: dict[str, bytes] = {}

    def depends(name: str) -> Sequence[str] | None:
        if name not in paths:
            return None
        contents[name] = decompress_module(files[paths[name]](), paths[name])
        return listed[name] if name in listed else modinfo_depends(contents[name])

    return [(f"{name}.ko", contents[name]) for name in load_order(wanted, depends)]


def decompress_module(data: bytes, path: str) -> bytes:
    """The ELF inside a ``.ko``, ``.ko.xz``, ``.ko.gz`` or ``.ko.zst``. Raises ImageError."""
    try:
        if path.endswith(".xz"):
            data = lzma.LZMADecompressor().decompress(data, MAX_MODULE)
        elif path.endswith(".gz"):
            data = gzip.decompress(data)
        elif path.endswith(".zst"):
            zstandard: Any = importlib.import_module("zstandard")
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_MODULE)
    except ImportError:
        raise ImageError(f"{path} is compressed with zstd", hint="pip install zstandard") from None
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise ImageError(f"{path} is corrupt: {error}") from error
    if data[:4] != b"\x7fELF":
        raise ImageError(f"{path} is not a kernel module")
    return data


def modinfo_depends(elf: bytes) -> list[str]:
    """The modules a module names in its ``depends=``. Raises ImageError for a corrupt one."""
    return [d.replace("-", "_") for text in modinfo(elf, "depends") for d in text.split(",") if d]


def modinfo(elf: bytes, key: str) -> list[str]:
    """The entries ``key=`` of a module's ``.modinfo`` section (ELF64, little-endian). Raises ImageError."""
    try:
        (sections,) = struct.unpack_from("<Q", elf, 40)
        size, count, names_index = struct.unpack_from("<HHH", elf, 58)

        def section(index: int) -> tuple[int, bytes]:
            name, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", elf, sections + index * size)
            return name, elf[offset : offset + length]

        names = section(names_index)[1]
        prefix = f"{key}=".encode()
        for i in range(count):
            name, data = section(i)
            if names[name : name + 9] == b".modinfo\0":
                entries = [entry for entry in data.split(b"\0") if entry.startswith(prefix)]
                return [entry[len(prefix) :].decode("ascii", "replace") for entry in entries]
    except (struct.error, IndexError) as error:
        raise ImageError(f"a kernel module is corrupt: {error}") from error
    return []


def conditions(modules: Sequence[tuple[str, bytes]]) -> list[list[str]]:
    """For each of ``modules`` (file name, ELF; in load order) the aliases of devices it is of use for; none: always.

    What only serves others is wanted for the devices of any of those. Drivers of devices that may be plugged into a
    running machine are always wanted: nobody in the guest would load them later.
    """
    wanted: dict[str, list[str] | None] = {}
    for name, elf in reversed(modules):
        module = module_name(name)
        try:
            own, needs = [a for a in modinfo(elf, "alias") if a.startswith(_DEVICES)], modinfo_depends(elf)
        except ImageError:
            own, needs = [], []  # the guest's kernel will say what is wrong with it
        served = wanted.get(module, [])
        if module in _PLUGGED or served is None or not (own or served):
            mine = None
        else:
            mine = list(dict.fromkeys([*served, *own]))
        wanted[module] = mine
        for need in needs:
            others = wanted.get(need, [])
            wanted[need] = None if mine is None or others is None else list(dict.fromkeys([*others, *mine]))
    return [wanted[module_name(name)] or [] for name, _ in modules]
