"""The exit record: how a machine ended, for whoever looks later. A contract between versions of posada.

JSON: ``reason`` (words), ``crashed``, ``code``, ``signal``, ``stderr`` (its tail), ``time`` (seconds since the epoch).
"""

from __future__ import annotations

import os
import time

#: What the kernel of a guest prints when it gives up.
_PANIC = b"Kernel panic - not syncing"

POWERED_OFF, REBOOTED, PANICKED, KILLED = "guest powered off", "guest rebooted", "guest panicked", "killed"


def panic_words(recent: bytes) -> str:
    """The line of a console's recent output that tells of a kernel panic; empty when there is none."""
    at = recent.rfind(_PANIC)
    return recent[at:].split(b"\n")[0].decode(errors="replace").strip() if at >= 0 else ""


def panic_reason(reason: str, panicked: bool, recent: bytes) -> str | None:
    """The words for an end by a guest kernel's panic, or None when it was none.

    A kernel that has no way to announce its panic resets the machine (``panic=-1``); its console still says why.
    """
    words = panic_words(recent)
    if not (panicked or reason == PANICKED or (reason == REBOOTED and words)):
        return None
    return f"{PANICKED}: {words}" if words else PANICKED


def record(
    reason: str, *, crashed: bool, code: int | None = None, signal: int | None = None, stderr: str = ""
) -> bytes:
    """The record, ending now."""
    import json  # 5 ms that no start should wait for

    fields = {"reason": reason, "crashed": crashed, "code": code, "signal": signal, "stderr": stderr}
    return json.dumps({**fields, "time": time.time()}).encode()


def write_path(path: str, data: bytes) -> None:
    """Whole or not at all. Does nothing when the directory is gone: the machine was deleted."""
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        pass


def write_descriptor(fd: int, data: bytes) -> None:
    """Into an empty file that was opened before. Its readers look once the process is dead, so it cannot be torn."""
    try:
        os.pwrite(fd, data, 0)
    except OSError:
        pass  # a full disk: the end is told without its reason
