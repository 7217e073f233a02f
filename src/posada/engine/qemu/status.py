"""How a QEMU stands, and how it ended."""

from __future__ import annotations

from pathlib import Path

from posada.engine.base import Status
from posada.engine.common.process import alive, read_exit
from posada.model.records import Process

#: QEMU says this whenever a guest's balloon wants to punch a hole into sealed memory. It explains no end.
_REFUSED_HOLE = "ram_block_discard_range: Failed to fallocate"


def status_of(process: Process, runtime: Path) -> Status:
    """What /proc and the exit record say. No I/O with the process."""
    if alive(process):
        return Status(alive=True, paused=(runtime / "paused").exists())
    record = read_exit(runtime)
    if record is None:
        return Status(alive=False, ended="its process is gone, and no exit record was left", crashed=True)
    words = record.reason
    noise = (_REFUSED_HOLE, "warning:")
    said = [line for line in record.stderr.splitlines() if line.strip() and not any(word in line for word in noise)]
    if record.crashed and record.code and said:
        words += f": {said[-1].strip()[:300]}"
    return Status(alive=False, ended=words, crashed=record.crashed)
