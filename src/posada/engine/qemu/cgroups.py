"""`posada.engine.common.cgroups` with what QEMU needs beside the guest's memory."""

from __future__ import annotations

from pathlib import Path

from posada.engine.common import cgroups
from posada.engine.common.cgroups import directories, remove
from posada.model.units import MIB

__all__ = ["create", "directories", "remove"]

#: Its own heap and translated code; page cache of its disks is reclaimable.
OVERHEAD = 512 * MIB
#: QEMU's own threads, and its I/O pool of 64.
THREADS = 96


def create(uuid: str, *, cpus: int, memory: int) -> list[Path]:
    """See `posada.engine.common.cgroups.create`."""
    return cgroups.create(uuid, cpus=cpus, memory=memory + OVERHEAD, threads=THREADS + cpus)
