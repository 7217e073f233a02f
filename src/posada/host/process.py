"""Is that process still the one it was? By pid and start time, never by pid alone.

The start time is field 22 of ``/proc/PID/stat`` (proc(5)): clock ticks since boot. It says nothing across a reboot, so
the state holds the boot's id and `posada.host.recovery` buries every process of an earlier boot when it sees a new one.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from posada.model.records import Process

#: Stands for a process that is surely dead.
NOBODY = Process(0, 0)


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which it started; None when there is none or it is only a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    # comm (field 2) may hold spaces and parentheses: count from the last one.
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def alive(process: Process | None) -> bool:
    return process is not None and process.pid > 0 and start_time(process.pid) == process.start


def me() -> Process:
    """This process (also after a fork)."""
    return _process(os.getpid())


@functools.lru_cache(maxsize=2)
def _process(pid: int) -> Process:
    start = start_time(pid)
    return Process(pid, start if start is not None else 0)


def boot_id() -> str:
    """Random for each boot of the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""
