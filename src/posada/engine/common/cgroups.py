"""Limits by cgroup, v1 and v2, where the hierarchy is writable; where it is not, a machine runs without them.

``posada/<uuid>`` below each controller's root (v1) or below the root of the unified hierarchy (v2).
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_PERIOD = 100_000


@functools.cache
def hierarchy() -> tuple[int, Path | None]:
    """(1 or 2, where v2 is) of this host; (0, None) if nothing is writable."""
    if not os.access(ROOT, os.W_OK) and os.geteuid():
        return 0, None
    controllers = ROOT / "cgroup.controllers"
    if controllers.exists():
        wanted = {"memory", "cpu", "pids"}
        return (2, ROOT) if wanted & set(controllers.read_text().split()) else (0, None)
    return (1, None) if (ROOT / "memory").is_dir() else (0, None)


def _limits_v1(cpus: int, memory: int, threads: int) -> dict[str, dict[str, str]]:
    return {
        "memory": {"memory.limit_in_bytes": str(memory)},
        "cpu": {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": str((cpus + 1) * _PERIOD)},
        "pids": {"pids.max": str(threads)},
    }


def directories(uuid: str) -> list[Path]:
    """Where a machine's cgroups are, or would be."""
    version, root = hierarchy()
    if version == 2 and root is not None:
        return [root / "posada" / uuid]
    if version == 1:
        return [ROOT / name / "posada" / uuid for name in ("memory", "cpu", "pids")]
    return []


def create(uuid: str, *, cpus: int, memory: int, threads: int) -> list[Path]:
    """Make them and set their limits: ``memory`` in bytes, all of the machine's; one cpu more than the guest's.

    Returns those that are there, and never raises OSError.
    """
    made: list[Path] = []
    for path in directories(uuid):
        version = hierarchy()[0]
        try:
            path.mkdir(parents=True, exist_ok=True)
            made.append(path)
            if version == 1:
                values = _limits_v1(cpus, memory, threads)[path.parent.parent.name]
            else:
                for parent in (ROOT, path.parent):
                    with contextlib.suppress(OSError):
                        (parent / "cgroup.subtree_control").write_text("+memory +cpu +pids")
                values = {
                    "memory.max": str(memory),
                    "cpu.max": f"{(cpus + 1) * _PERIOD} {_PERIOD}",
                    "pids.max": str(threads),
                }
            for name, value in values.items():
                with contextlib.suppress(OSError):
                    (path / name).write_text(value)
        except OSError:
            continue
    return [path for path in made if os.access(path / "cgroup.procs", os.W_OK)]


def join(paths: Sequence[Path], pid: int) -> None:
    """Move a process there. The first move waits for an RCU grace period (12 ms): do it where nobody waits."""
    for path in paths:
        with contextlib.suppress(OSError):
            (path / "cgroup.procs").write_text(str(pid))


def remove(uuid: str) -> None:
    """Idempotent. A group that still has a process in it stays."""
    for path in directories(uuid):
        for _ in range(20):
            try:
                path.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.001)  # Linux 6.18 takes a dead process out a moment after it has told of its death
