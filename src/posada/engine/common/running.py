"""The record of a running machine in its runtime directory.

By it a machine is found whose start was cut short, and it holds what changes while a machine runs (ports, attached disks).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from posada.model.records import Running


def read_running(runtime: Path) -> Running | None:
    """What start, restore or fork wrote before it let go of the machine; None when it was cut short."""
    try:
        return msgspec.json.decode((runtime / "running.json").read_bytes(), type=Running)
    except (OSError, msgspec.MsgspecError):
        return None


def write_running(runtime: Path, running: Running) -> None:
    """Replaces it in one step."""
    temporary = runtime / ".running.json"
    temporary.write_bytes(msgspec.json.encode(running))
    os.replace(temporary, runtime / "running.json")


def current(running: Running) -> Running:
    """As it is now: the record in the runtime directory, when it is the same process's."""
    stored = read_running(Path(running.runtime))
    return stored if stored is not None and stored.process == running.process else running


def new_cid() -> int:
    """A guest's vsock address: 32 bits, 0–2 and all ones reserved. The kernel refuses a collision where it sees one."""
    return secrets.randbelow((1 << 32) - 16) + 3
