"""What a process uses of the host, by /proc."""

from __future__ import annotations

import contextlib
import os
import time

from posada.engine.base import Usage
from posada.engine.common.process import stat_fields
from posada.model.records import Process

#: include/linux/posix-timers_types.h: what the scheduler accounted to the process.
_CPUCLOCK_SCHED = 2


def usage_of(process: Process) -> Usage:
    """Nothing when it is gone."""
    try:
        seconds = time.clock_gettime(_cpu_clock(process.pid))
        fields = stat_fields(process.pid)
    except OSError:
        return Usage(cpu_seconds=0.0, rss=0)
    if int(fields[19]) != process.start:
        return Usage(cpu_seconds=0.0, rss=0)
    rss = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return Usage(cpu_seconds=seconds, rss=rss, pss=_pss(process.pid))


def _cpu_clock(pid: int) -> int:
    """clock_getcpuclockid(3): nanoseconds, where /proc/PID/stat counts ticks of 10 ms."""
    return (~pid << 3) | _CPUCLOCK_SCHED


def _pss(pid: int) -> int | None:
    """Bytes, each shared page counted in parts; None where the kernel does not tell us."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return None
