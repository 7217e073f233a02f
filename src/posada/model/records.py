"""What posada remembers: the rows of state.db and the ``vm.json`` beside the disks. Plain data, no behaviour.

Paths in records are relative to the state directory, so that a state directory can be moved.
Times are seconds since the epoch; sizes are bytes.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from posada.model.machine import MachineSpec
from posada.model.states import State


class Process(msgspec.Struct, frozen=True):
    """A process by pid *and* start time (clock ticks since boot, field 22 of /proc/PID/stat): never pid alone."""

    pid: int
    start: int


class PortRecord(msgspec.Struct, frozen=True):
    guest: int
    host: int
    address: str
    protocol: str


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk as a chain of layers, lowest first; the last one is written to, all others are frozen.

    ``chain`` holds layer ids (`LayerRecord.id`); the lowest may instead be ``image:<digest>`` (an image's disk).
    """

    name: str
    size: int
    chain: tuple[str, ...]
    readonly: bool = False


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One disk file. Frozen for good once anything stands on it. Deleted when no vm and no snapshot names it."""

    id: str
    path: str
    format: str
    size: int
    frozen: bool
    created: float


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a machine that runs: enough for any later process to adopt it."""

    engine: str
    process: Process
    keeper: Process | None = None
    accelerator: str = ""
    started: float = 0.0
    runtime: str = ""
    """The runtime directory: sockets, exit record."""
    ports: tuple[PortRecord, ...] = ()
    private: dict[str, Any] = {}
    """The engine's own; opaque to everything above it."""


class VmRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One vm: spec + state + identity. The same data, less ``running``, is its ``vm.json``."""

    uuid: str
    name: str
    spec: MachineSpec
    state: State
    engine: str
    image: str | None = None
    """The image's digest."""
    disks: tuple[Disk, ...] = ()
    macs: tuple[str, ...] = ()
    created: float = 0.0
    generation: int = 0
    """Counts identities: 0 for a vm that was made, +1 for each fork between it and that one."""
    parent: str | None = None
    """The uuid it was forked or cloned from."""
    head: str | None = None
    """The snapshot the vm descends from: the parent of the next one."""
    owner: Process | None = None
    """For ephemeral vms: who it dies with."""
    identity_pending: bool = False
    """It never ran: its identity (machine-id, host keys …) is reset at its agent's first connection."""
    running: Running | None = None
    exit: str | None = None
    """How the last run ended, in words."""


class SnapshotKind(str, enum.Enum):
    FULL = "full"
    DISKS = "disks"

    def __str__(self) -> str:
        return self.value


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A point of one vm to return to. ``path`` holds memory, device state and ``snapshot.json`` for a full one."""

    id: str
    vm: str
    name: str
    kind: SnapshotKind
    spec: MachineSpec
    disks: tuple[Disk, ...]
    parent: str | None = None
    path: str = ""
    created: float = 0.0
    pause: float = 0.0
    """How long the machine stood still, in seconds."""
    memory_bytes: int = 0
    """Bytes the memory file holds (not its apparent size)."""
    engine: str = ""
    macs: tuple[str, ...] = ()
    private: dict[str, Any] = {}
    """``engine``: `Capture.private`; ``token``: hex of the fork.prepare it was taken in, or empty."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A read-only source. ``digest`` is sha256 over its manifest; ``path`` the directory that holds the files below."""

    digest: str
    names: tuple[str, ...]
    path: str
    arch: str
    created: float
    disk: str | None = None
    disk_format: str = "raw"
    disk_size: int = 0
    kernel: str | None = None
    """Bootable kernel (bzImage or vmlinux)."""
    initrd: str | None = None
    append: str = ""
    agent: bool = False
    """posada's agent is the guest's init or a service in it."""
    size: int = 0
    """Bytes on the host."""
    source: str = ""
    """Where it came from, in words: ``debian:12``, a file name."""


class OperationState(str, enum.Enum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


class OperationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A long-running action. ``intent`` is what recovery needs to finish it or roll it back."""

    id: str
    kind: str
    target: str
    state: OperationState
    owner: Process
    created: float
    updated: float
    progress: float = 0.0
    message: str = ""
    error: str | None = None
    intent: dict[str, Any] = {}
    result: dict[str, Any] = {}


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. ``id`` grows; a reader resumes after the last one it saw."""

    id: int
    time: float
    kind: str
    vm: str | None = None
    name: str | None = None
    data: dict[str, Any] = {}
