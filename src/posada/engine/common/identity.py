"""The user a machine's process runs under."""

from __future__ import annotations

import hashlib
import os

#: Each machine of a host that root runs has a uid of its own in this range, by its uuid: outside what distributions,
#: containers and systemd's dynamic users give out.
UID_BASE, UID_COUNT = 1_900_000_000, 90_000_000


def jail_uid(uuid: str) -> int | None:
    """The uid a machine runs under, or None when we may not change it (rootless)."""
    if os.geteuid():
        return None
    return UID_BASE + int.from_bytes(hashlib.sha256(uuid.encode()).digest()[:8]) % UID_COUNT
