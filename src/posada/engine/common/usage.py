"""What a process uses of the host, by /proc."""

from __future__ import annotations

import contextlib
import os

from posada.engine.base import Usage
from posada.engine.common.process import stat_fields
from posada.model.records import Process


def usage_of(process: Process) -> Usage:
    """Nothing when it is gone."""
    try:
        fields = stat_fields(process.pid)
    except OSError:
        return Usage(cpu_seconds=0.0, rss=0)
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    rss = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return Usage(cpu_seconds=seconds, rss=rss, pss=_pss(process.pid))


def _pss(pid: int) -> int | None:
    """Bytes, each shared page counted in parts; None where the kernel does not tell us."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return None
