"""Memory files: RAM on disk, sparse, one file or a stack of them.

The lowest file of a stack holds all of RAM, each further one only some runs of pages, at the same offsets, laid over
those below. A hole in an upper file says nothing: its runs do, and they are in the state document that goes with it.
A machine maps all of them privately, so nothing is read that is not touched, machines on the same files share their
pages, and no file is ever written to. Offsets count RAM without the gap below 4 GiB.

The files must stay as they are while a machine stands on them: one that is cut short kills it (SIGBUS).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posada.errors import StateError
from posada.vmm.memory import PAGE, GuestMemory
from posada.vmm.pagemap import Run

MAX_LAYERS = 16
MAX_RUNS = 1024
"""Of one upper file. Each becomes up to two mappings of every machine on it, which fork(2) copies and the kernel bounds
(vm.max_map_count)."""
_WRITE = 16 << 20
_RUN = struct.Struct("<QQ")
_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


@dataclass(frozen=True)
class Layer:
    """One file of a stack. ``runs`` None: all of RAM."""

    fd: int
    runs: tuple[Run, ...] | None = None


def write(fd: int, memory: GuestMemory, some: Sequence[Run], between: Callable[[], object] = lambda: None) -> None:
    """Put these runs of RAM into an empty file, at their offsets, without a copy in between. Not durable yet.

    ``between`` is called every 16 MiB. Raises OSError.
    """
    os.ftruncate(fd, memory.size)
    ram, _ = linear(memory)
    for offset, length in some:
        at, end = offset, offset + length
        while at < end:
            between()
            at += os.pwrite(fd, ram[at : min(at + _WRITE, end)], at)


def linear(memory: GuestMemory) -> tuple[memoryview, int]:
    """All of RAM without the gap, and its address in this process."""
    first = memory.regions[0]
    return memoryview(memory.mapping)[first.offset : first.offset + memory.size], first.address


def open_stack(layers: Sequence[Layer], size: int) -> GuestMemory:
    """RAM of ``size`` bytes whose first content is that of the files, lowest first. The descriptors may be closed then.

    Raises StateError if the files cannot be a machine's memory, OSError if they cannot be mapped.
    """
    if (
        not 1 <= len(layers) <= MAX_LAYERS
        or layers[0].runs is not None
        or any(layer.runs is None for layer in layers[1:])
    ):
        raise StateError(f"{len(layers)} memory files are no stack")
    for layer in layers:
        status = os.fstat(layer.fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size < size:
            raise StateError(f"a memory file of {status.st_size} bytes, and the machine has {size}")
    memory = GuestMemory.from_file(layers[0].fd, size)
    for layer in layers[1:]:
        lay(memory, layer)
    return memory


def lay(memory: GuestMemory, layer: Layer) -> None:
    """Map the runs of ``layer`` privately over RAM: what was there is forgotten. Raises OSError."""
    _, address = linear(memory)
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    for offset, length in check_runs(layer.runs or (), memory.size):
        # SAFETY: the range lies within RAM (checked), which `memory.mapping` owns and unmaps as one when it dies.
        if _libc.mmap(address + offset, length, protection, flags, layer.fd, offset) != address + offset:
            number = ctypes.get_errno()
            raise OSError(number, f"mmap of a memory file: {os.strerror(number)}")


def check_runs(some: Sequence[Run], size: int) -> Sequence[Run]:
    """Whole pages within ``size`` bytes, ascending, not overlapping, not too many. Raises StateError."""
    end = 0
    for offset, length in some:
        if offset < end or length <= 0 or offset % PAGE or length % PAGE or offset + length > size:
            raise StateError(f"pages {offset:#x}+{length:#x} of {size:#x} bytes of memory")
        end = offset + length
    if len(some) > MAX_RUNS:
        raise StateError(f"{len(some)} runs of pages; at most {MAX_RUNS}")
    return some


def pack_runs(some: Sequence[Run]) -> bytes:
    return b"".join(_RUN.pack(*run) for run in some)


def unpack_runs(data: bytes, size: int) -> tuple[Run, ...]:
    """Raises StateError."""
    if len(data) % _RUN.size:
        raise StateError("the runs of a memory file are cut short")
    found = tuple((offset, length) for offset, length in _RUN.iter_unpack(data))
    check_runs(found, size)
    return found
