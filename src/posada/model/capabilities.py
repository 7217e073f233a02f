"""What an engine can do on this host, as data. What it denies is refused with `Unsupported`, never ignored."""

from __future__ import annotations

import enum

import msgspec

from posada.errors import Unsupported


class Feature(str, enum.Enum):
    """One thing an engine may be able to do. The value is what people read."""

    DIRECT_BOOT = "direct kernel boot"
    BIOS = "BIOS firmware"
    UEFI = "UEFI firmware"
    CLOUD_INIT = "cloud-init"
    CONSOLE = "serial console"
    PAUSE = "pause and resume"
    SNAPSHOT_FULL = "snapshots with memory"
    SNAPSHOT_DISKS = "snapshots of disks only"
    RESTORE = "restore in place"
    FORK = "fork of a running machine"
    FORK_SNAPSHOT = "fork of a snapshot"
    USER_NETWORK = "user-mode network"
    PORTS = "port forwarding"
    MERGE_LAYERS = "merging disk layers of a running machine"
    FOLDERS = "folders of the host"
    ATTACH_DISK = "attaching disks to a running machine"
    BALLOON = "memory balloon"
    RESIZE_LIVE = "resizing a running machine"
    NESTED = "nested virtualisation"
    INSPECT = "registers and counters of a running machine"
    DEBUG = "debugging a guest with gdb"
    AARCH64 = "aarch64 guests"

    def __str__(self) -> str:
        return self.value


class Verdict(msgspec.Struct, frozen=True):
    """``ok`` or not; ``note`` is the caveat, or why not; ``hint`` is what would make it work."""

    ok: bool
    note: str = ""
    hint: str | None = None


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """Every feature has a verdict; a feature without one is denied."""

    engine: str
    accelerator: str = ""
    version: str = ""
    features: dict[Feature, Verdict]
    max_cpus: int = 1
    max_memory: int = 0

    def has(self, feature: Feature) -> bool:
        verdict = self.features.get(feature)
        return verdict is not None and verdict.ok

    def require(self, feature: Feature) -> None:
        """Raise Unsupported unless the engine can do it."""
        verdict = self.features.get(feature)
        if verdict is None or not verdict.ok:
            note = f" ({verdict.note})" if verdict and verdict.note else ""
            raise Unsupported(self.engine, f"{feature}{note}", hint=verdict.hint if verdict else None)
