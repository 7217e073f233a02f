"""Forks through the public API, of a toy guest on the host's own /dev/kvm: one series of `bench.kvm`. Prints JSON.

The guest says one letter and halts: it costs no processor time beside what is measured, and has no agent, so its forks
keep its identity. Without network; without a disk, and with one.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

LOAD = 0x10_0000
CODE = bytes.fromhex("66baf803 b054 ee f4 ebfd")  # mov dx, 0x3f8; mov al, 'T'; out dx, al; hlt; jmp to the hlt
MEMORY = "256MiB"
WARM = 3


def kernel() -> bytes:
    """An ELF that begins as PVH does: one segment, and the note that says where."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", LOAD)
    headers = 64 + 2 * 56
    at = headers + len(note)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, at, LOAD, LOAD, len(CODE), len(CODE), 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, headers, 0, 0, len(note), len(note), 4)
    return header + load + notes + note + CODE


def forks(scratch: Path, runs: int, disk: bool) -> dict[str, list[float]]:
    """Milliseconds from the call of `VM.fork` to its return, and of this process's processor time meanwhile."""
    import posada

    disks: list[dict[str, Any]] = []
    if disk:
        (scratch / "disk.raw").write_bytes(bytes(1 << 20))
        disks.append({"name": "root", "source": str(scratch / "disk.raw")})
    boot = {"kernel": str(scratch / "kernel")}
    took: list[float] = []
    spent: list[float] = []
    with posada.connect() as host, host.run(engine="kvm", boot=boot, disks=disks, nics=[], memory=MEMORY) as vm:
        for _ in range(WARM + runs):
            begun, before = time.perf_counter(), time.process_time()
            (child,) = vm.fork(same_identity=True)
            took.append((time.perf_counter() - begun) * 1e3)
            spent.append((time.process_time() - before) * 1e3)
            child.delete()
    return {"took": took[WARM:], "spent": spent[WARM:]}


def main(runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="posada-bench-") as folder:
        scratch = Path(folder)
        os.environ |= {"POSADA_HOME": f"{folder}/home", "POSADA_RUNTIME": f"{folder}/run", "POSADA_KVM_SLOW": "1"}
        (scratch / "kernel").write_bytes(kernel())
        return {"plain": forks(scratch, runs, False), "disk": forks(scratch, runs, True)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[2]))))
