"""What was measured of a host, remembered in the runtime directory: a probe costs a tenth of a second.

Facts hold for a key (boot, binary, user …), which they carry. They are only believed from a directory that nobody else
can write to: they say what is run.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TypeVar

import msgspec


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The base of an engine's facts."""

    key: str
    """What these facts hold for."""


F = TypeVar("F", bound=Facts)


def default_runtime() -> Path:
    """Where the cache is when nobody says: as the host's own runtime directory."""
    given = os.environ.get("POSADA_RUNTIME")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/posada")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "posada" if base else Path(f"/tmp/posada-{os.geteuid()}")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def recall(cache: Path, key: str, kind: type[F]) -> F | None:
    """None when there are none, they are damaged, for another key, or not to be believed."""
    if not _private(cache.parent):
        return None
    try:
        found = msgspec.json.decode(cache.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.key == key else None


def remember(cache: Path, facts: Facts) -> None:
    """Best effort."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _private(cache.parent):
            temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
            temporary.write_bytes(msgspec.json.encode(facts))
            os.replace(temporary, cache)


def _private(directory: Path) -> bool:
    """Only we can write there."""
    try:
        info = os.stat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022
