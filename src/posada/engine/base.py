"""The engine contract: what posada asks of whatever executes a machine.

An engine runs machines; it knows nothing of names, databases, images or snapshots' trees. The host (`posada.host`)
calls it with the vm's lock held, hands it files that exist, and records what it returns. Every method says what it MUST
leave behind when it fails. Methods are coroutines; they may be cancelled at any await and clean up then as on failure.

The call order of one machine's life::

    start ──► (adopt) ──► pause/resume/capture/fork/… ──► powerdown | kill ──► wait ──► reap
    restore ─┘

The fake engine (`posada.engine.fake`) is the reference: where this text leaves a doubt, it decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from posada.model.capabilities import Capabilities
from posada.model.machine import MachineSpec
from posada.model.records import PortRecord, Process, Running


class DiskFile(msgspec.Struct, frozen=True, kw_only=True):
    """A disk with every file of its chain named, lowest first; only the last one is written to.

    Engines MUST open exactly these files: a backing file named inside an image is never followed.
    """

    name: str
    size: int
    chain: tuple[tuple[Path, str], ...]
    """(path, format) pairs; format is ``raw`` or ``qcow2``."""
    readonly: bool = False


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to start one machine. All paths exist, except sockets, which the engine makes."""

    uuid: str
    name: str
    spec: MachineSpec
    runtime: Path
    """Private directory on the run file system, already made, empty or left by an earlier run of the same vm."""
    log: Path
    """Where the console goes; the engine bounds it (CONSOLE_LOG_MAX, then it rotates once to ``.1``)."""
    disks: tuple[DiskFile, ...] = ()
    macs: tuple[str, ...] = ()
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    agent: bool = False
    """The guest runs posada's agent: give it its channels."""
    owner: Process | None = None
    """An ephemeral machine dies when this process does. Enforced by the engine, at once."""
    generation_id: str = ""
    """VM generation ID (a uuid), new for each fork and restore."""


class NewLayer(msgspec.Struct, frozen=True, kw_only=True):
    """An empty overlay, made by the host beforehand, that a capture switches a disk to."""

    disk: str
    path: Path
    format: str = "qcow2"


class Capture(msgspec.Struct, frozen=True, kw_only=True):
    """What `Engine.capture` made: files in the directory it was given."""

    pause: float
    """Seconds the vcpus stood still."""
    memory_bytes: int
    private: dict[str, Any] = {}
    """Goes into the snapshot's record and comes back in `SnapshotFiles`."""


class SnapshotFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A full snapshot as `Engine.restore` gets it. The files are immutable; what they hold is untrusted."""

    path: Path
    memory: int
    """The machine's memory size in bytes."""
    private: dict[str, Any] = {}


class Forked(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome for each child, in order: how to reach it, or why there is none."""

    children: tuple[Running | Exception, ...]
    pause: float
    """Seconds the source stood still."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine itself says of a machine."""

    alive: bool
    paused: bool = False
    ended: str | None = None
    """When not alive: how it ended, in words (``guest powered off``, ``killed by signal 9``, ``guest panicked``)."""
    crashed: bool = False
    """The end was the engine's or the guest kernel's failure, not a power off or a kill."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine uses of the host, now. Bytes and seconds."""

    cpu_seconds: float
    rss: int
    pss: int | None = None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What is inside a running machine, now. Parts that an engine cannot tell are empty."""

    registers: tuple[str, ...] = ()
    """Each vcpu's registers and the code around its instruction pointer, as text; only if asked for."""
    exits: tuple[dict[str, int], ...] = ()
    """How often each vcpu left the guest, by reason."""
    devices: dict[str, dict[str, int]] = {}
    """Counters of each device."""
    jail: tuple[str, ...] = ()
    """What the process gave up, in words (docs/SECURITY-MODEL.md)."""
    notes: str = ""
    """The last odd things it has to tell, a line each."""


CONSOLE_LOG_MAX = 1 << 20


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What ``posada doctor`` prints of an engine. ``ok``: it runs machines here; ``detail`` is measured."""

    engine: str
    ok: bool
    detail: str
    hint: str | None = None
    facts: dict[str, Any] = {}


class Runner(Protocol):
    """The least an engine must do."""

    name: str

    def probe(self) -> Probe:
        """Measure whether and how well this host can run it. Milliseconds; cached by the caller. Never raises."""

    def capabilities(self) -> Capabilities:
        """What it can do on this host. Raises HostError if the engine is not usable here at all."""

    async def start(self, launch: Launch) -> Running:
        """Start the machine from power-on. Returns once its vcpus run and its sockets accept connections.

        On failure or cancellation no process, socket or port is left; disks may have been opened but not changed.
        Raises EngineError (with the engine's own words), HostError, Unsupported.
        """

    def status(self, running: Running) -> Status:
        """Is it alive, and is that the same process? Reads /proc and the exit record only: microseconds."""

    async def wait(self, running: Running, timeout: float | None = None) -> Status:
        """Wait until its process has ended. Works in any process, not only the one that started it. Raises Timeout."""

    async def pause(self, running: Running) -> None:
        """Stop the vcpus. Idempotent."""

    async def resume(self, running: Running) -> None:
        """Run the vcpus. Idempotent."""

    async def powerdown(self, running: Running) -> None:
        """Ask the guest to power off (ACPI). Returns when asked, not when done."""

    async def kill(self, running: Running) -> None:
        """End it now. Idempotent; returns when its process is gone, even a hung one (SIGSTOP, mute sockets)."""

    def reap(self, launch_runtime: Path) -> None:
        """Remove what a dead machine left in its runtime directory. Idempotent. Never kills."""

    async def abandon(self, launch_runtime: Path) -> None:
        """End whatever an interrupted start, restore or fork of this runtime directory left running, then `reap` it.

        Recovery calls it when no `Running` was recorded: the process that called `start` died before it returned. The
        engine finds its own pid record (pid + start time) there; a monitor that was not recorded yet MUST end by
        itself when its starter dies. Idempotent; does nothing for a directory that is empty or gone.
        """

    async def disown(self, running: Running) -> None:
        """The machine no longer dies with `Launch.owner`. Idempotent."""

    def agent_channels(self, running: Running) -> Sequence[Path]:
        """Unix sockets, byte channels to the guest's agent. One client at a time each: take ``<path>.lock`` first."""

    def console(self, running: Running) -> Path:
        """Unix socket of the serial console, any number of clients; each first receives recent output."""

    def usage(self, running: Running) -> Usage: ...


class Capturer(Protocol):
    """An engine that claims SNAPSHOT_FULL, RESTORE, FORK, FORK_SNAPSHOT or MERGE_LAYERS."""

    async def capture(self, running: Running, target: Path, layers: Sequence[NewLayer]) -> Capture:
        """Save memory and devices into ``target`` (an empty directory) and switch disks to new layers, in one pause.

        A running machine runs again when this returns or raises; a paused one stays paused. The files are durable
        (fsync) when it returns. On failure the machine is as it was, on its old layers or, if they were switched
        already, on the new ones; `CaptureFailed.switched` tells which.
        """

    async def switch(self, running: Running, layers: Sequence[NewLayer]) -> float:
        """Switch disks to new layers in one pause, without memory (disks-only snapshot). Returns the pause, seconds."""

    async def restore(
        self, launches: Sequence[Launch], snapshot: SnapshotFiles, *, paused: bool = False
    ) -> Sequence[Running | Exception]:
        """Start one machine per launch from a snapshot, memory shared copy-on-write among them.

        No vm's process runs on these uuids when it is called. Each outcome stands alone, as in `start`.
        """

    async def fork(self, running: Running, children: Sequence[Launch], layers: Sequence[NewLayer]) -> Forked:
        """New machines from a running one, memory shared copy-on-write, disks and memory from the same pause.

        ``layers`` is what the *source* switches to; the children's own layers are in their launches.
        No child may ever see a later write of the source, nor the source one of a child, in memory or on disk.
        Connections of the source survive. The source runs again (or stays paused) when this returns or raises.
        The children run, also those of a paused source.
        """

    async def merge(self, running: Running, disk: DiskFile, keep: int) -> tuple[int, ...]:
        """Copy what the layers above the lowest ``keep`` hold into the top one, which then stands on those: MERGE_LAYERS.

        Returns which layers of ``disk.chain`` it stands on now, as indices, the lowest first. They need not be the lowest
        ``keep``: an earlier merge may have been done that nobody lived to record, and the chain may name empty layers
        that the machine never got (`posada.host.layers`). The disk reads the same at every instant, and no file but the
        top one is written to; it is durable when this returns. On failure or cancellation the chain may be as it was, or
        merged. Raises EngineError.
        """


class CaptureFailed(Exception):
    """Raised by `Capturer` methods from the underlying error; ``switched`` names the disks on their new layers."""

    def __init__(self, message: str, *, switched: Sequence[str]) -> None:
        super().__init__(message)
        self.switched = tuple(switched)


class Tuner(Protocol):
    """An engine that claims ATTACH_DISK, PORTS or RESIZE_LIVE."""

    async def attach_disk(self, running: Running, disk: DiskFile) -> None:
        """Plug a disk in. On failure it is not attached."""

    async def detach_disk(self, running: Running, name: str) -> None:
        """Unplug; waits until the guest let go. Raises Timeout if it does not."""

    async def resize_disk(self, running: Running, name: str, size: int) -> None:
        """Grow a disk the machine has open."""

    async def set_memory(self, running: Running, size: int) -> None:
        """Balloon to ``size`` bytes, at most what the machine was started with."""

    async def add_port(self, running: Running, port: PortRecord) -> PortRecord:
        """Forward a port (host 0: any free one). Returns it as it is bound. Raises HostError if it is taken."""

    async def remove_port(self, running: Running, port: PortRecord) -> None: ...


class Inspector(Protocol):
    """An engine that claims INSPECT or DEBUG."""

    async def inspect(self, running: Running, *, registers: bool = False) -> Inspection:
        """Look into a machine. With ``registers`` it stands still for an instant."""

    async def debug(self, running: Running, listener: int) -> None:
        """Serve gdb's remote protocol on a listening socket, which stays the caller's; one client at a time."""


class Engine(Runner, Capturer, Tuner, Inspector, Protocol):
    """All of it. An engine that lacks a part raises Unsupported (`Capabilities.require`) before anything is done."""


def registry() -> Mapping[str, str]:
    """Engine name → ``module:class``. Imported only when asked for, so that one engine's needs are not all's."""
    return {
        "fake": "posada.engine.fake:FakeEngine",
        "kvm": "posada.engine.kvm.engine:KvmEngine",
        "qemu": "posada.engine.qemu.engine:QemuEngine",
    }
