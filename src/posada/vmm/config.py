"""What the engine hands the monitor at start: a plain document with descriptors (ints) in place of paths.

The engine builds a `MonitorConfig` and sends ``to_dict()`` as CBOR; the monitor reads it with ``from_dict()``, which
checks types and bounds. The monitor opens nothing by path, so every file and socket is a descriptor here.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from posada.vmm import state
from posada.vmm.life import LifeConfig
from posada.vmm.memory import MAX_SIZE, PAGE

MAX_CPUS = 64
MAX_DISKS = 16
MAX_NICS = 8
MAX_FOLDERS = 8
MAX_BAYS = 8
MAX_FD = 1 << 20
FORMATS = ("raw", "qcow2")


class NicKind(enum.Enum):
    """What a NIC's descriptor is: passt's stream socket, a tap device, or nothing (link down)."""

    PASST = "passt"
    TAP = "tap"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """``chain``: (descriptor, format) lowest first, as `posada.engine.base.DiskFile`; the last is written to.

    ``bay``: it was put into that bay of a running machine (`posada.vmm.virtio.spare`); -1: it was there at power-on.
    """

    name: str
    size: int
    chain: tuple[tuple[int, str], ...]
    readonly: bool = False
    bay: int = -1

    @property
    def device(self) -> str:
        """The name of its device in the machine."""
        return f"disk:{self.name}" if self.bay < 0 else f"bay:{self.bay}"

    @classmethod
    def from_dict(cls, d: state.Document) -> DiskConfig:
        chain = []
        for link in state.items(d, "chain", 64):
            if not isinstance(link, list | tuple) or len(link) != 2:
                raise state.StateError("'chain' holds something else than pairs of descriptor and format")
            fields = {"fd": link[0], "format": link[1]}
            chain.append((state.integer(fields, "fd", 0, MAX_FD), state.choice(fields, "format", FORMATS)))
        if not chain:
            raise state.StateError("'chain' is empty")
        return cls(
            name=state.text(d, "name", 64),
            size=state.integer(d, "size", 0, 1 << 62),
            chain=tuple(chain),
            readonly=state.boolean(d, "readonly", False),
            bay=state.integer(d, "bay", -1, MAX_BAYS - 1, -1),
        )


@dataclass(frozen=True, slots=True)
class NicConfig:
    mac: str
    kind: NicKind
    fd: int = -1
    mtu: int = 0
    """What the guest is told, in bytes; 0: nothing. The other end must be able to carry it."""

    @classmethod
    def from_dict(cls, d: state.Document) -> NicConfig:
        kind = NicKind(state.choice(d, "kind", tuple(k.value for k in NicKind)))
        mac = state.text(d, "mac", 17)
        try:
            if len(bytes.fromhex(mac.replace(":", ""))) != 6:
                raise ValueError
        except ValueError:
            raise state.StateError(f"'mac' is not a MAC address: {mac!r}") from None
        fd = state.integer(d, "fd", -1 if kind is NicKind.NONE else 0, MAX_FD, -1)
        return cls(mac, kind, fd, state.integer(d, "mtu", 0, 65535, 0))


@dataclass(frozen=True, slots=True)
class FolderConfig:
    """A folder of the host. ``tag``: what the guest mounts; ``fd``: the socket of its server (`posada.vmm.folder`).

    ``server``, of a machine that is forked: the other end of ``fd``, for its parent's server to fork for; else -1.
    """

    tag: str
    fd: int
    server: int = -1

    @classmethod
    def from_dict(cls, d: state.Document) -> FolderConfig:
        return cls(
            state.text(d, "tag", 36), state.integer(d, "fd", 0, MAX_FD), state.integer(d, "server", -1, MAX_FD, -1)
        )


@dataclass(frozen=True, slots=True)
class VsockConfig:
    """``listeners``: (guest port, listening unix socket): each connection there becomes a stream to that port.

    ``connect`` is a listening socket that speaks Firecracker's ``CONNECT port`` convention, or -1.
    """

    cid: int
    listeners: tuple[tuple[int, int], ...] = ()
    connect: int = -1

    @classmethod
    def from_dict(cls, d: state.Document) -> VsockConfig:
        listeners = []
        for pair in state.items(d, "listeners", 64):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise state.StateError("'listeners' holds something else than pairs of port and descriptor")
            fields = {"port": pair[0], "fd": pair[1]}
            listeners.append((state.integer(fields, "port", 0, 0xFFFF_FFFF), state.integer(fields, "fd", 0, MAX_FD)))
        return cls(
            cid=state.integer(d, "cid", 3, 0xFFFF_FFFE),
            listeners=tuple(listeners),
            connect=state.integer(d, "connect", -1, MAX_FD, -1),
        )


@dataclass(frozen=True, slots=True)
class ConsoleConfig:
    """``listener``: socket whose clients see the serial port. ``log``, ``log_old``: open files, the log rotates once."""

    listener: int = -1
    log: int = -1
    log_old: int = -1

    @classmethod
    def from_dict(cls, d: state.Document) -> ConsoleConfig:
        return cls(*(state.integer(d, name, -1, MAX_FD, -1) for name in ("listener", "log", "log_old")))


@dataclass(frozen=True, slots=True)
class JailConfig:
    """How the monitor locks itself in, once everything is set up. ``uid``: its user, and group; -1: stay who it is."""

    uid: int = -1
    root: int = -1
    """Descriptor of an empty directory to chroot to where there are no mount namespaces, or -1."""
    namespaces: bool = True
    seccomp: bool = True

    @classmethod
    def from_dict(cls, d: state.Document) -> JailConfig:
        return cls(
            uid=state.integer(d, "uid", -1, 0xFFFF_FFFE, -1),
            root=state.integer(d, "root", -1, MAX_FD, -1),
            namespaces=state.boolean(d, "namespaces", True),
            seccomp=state.boolean(d, "seccomp", True),
        )


@dataclass(frozen=True, slots=True)
class RestoreConfig:
    """A machine that goes on where another was saved: descriptors of the state, and of the memory files, lowest first."""

    devices: int
    memory: tuple[int, ...]
    paused: bool = False

    @classmethod
    def from_dict(cls, d: state.Document) -> RestoreConfig:
        return cls(
            devices=state.integer(d, "devices", 0, MAX_FD),
            memory=tuple(state.integers(d, "memory", 0, MAX_FD, 64)),
            paused=state.boolean(d, "paused", False),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """One machine. Descriptors are -1 where there is none; sizes in bytes."""

    uuid: str
    name: str
    cpus: int
    memory: int
    kvm: int
    """-1 only for a machine that is forked, and has its parent's."""
    control: int = -1
    exit: int = -1
    kernel: int = -1
    """-1 only for a machine that is restored, forked or migrated."""
    initrd: int = -1
    incoming: int = -1
    """A stream on which the machine comes by live migration (`posada.vmm.incoming`)."""
    append: str = ""
    hugepages: bool = False
    generation_id: str = ""
    disks: tuple[DiskConfig, ...] = ()
    bays: int = 0
    """Block devices that wait for a disk."""
    nics: tuple[NicConfig, ...] = ()
    folders: tuple[FolderConfig, ...] = ()
    vsock: VsockConfig | None = None
    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    life: LifeConfig = field(default_factory=LifeConfig)
    jail: JailConfig = field(default_factory=JailConfig)
    restore: RestoreConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for CBOR."""
        document = asdict(self)
        for disk in document["disks"]:
            disk["chain"] = [list(link) for link in disk["chain"]]
        for nic in document["nics"]:
            nic["kind"] = nic["kind"].value
        if document["vsock"] is not None:
            document["vsock"]["listeners"] = [list(pair) for pair in document["vsock"]["listeners"]]
        if document["restore"] is not None:
            document["restore"]["memory"] = list(document["restore"]["memory"])
        for name in ("disks", "nics", "folders"):
            document[name] = list(document[name])
        return document

    def relocated(self, take: Callable[[int], int]) -> MonitorConfig:
        """The same with ``take(fd)`` in place of each descriptor: of a document whose descriptors came by a socket."""

        def at(fd: int) -> int:
            return take(fd) if fd >= 0 else -1

        console, life, vsock, restore = self.console, self.life, self.vsock, self.restore
        if restore is not None:
            restore = replace(restore, devices=at(restore.devices), memory=tuple(map(at, restore.memory)))
        if vsock is not None:
            doors = tuple((port, at(fd)) for port, fd in vsock.listeners)
            vsock = replace(vsock, listeners=doors, connect=at(vsock.connect))
        return replace(
            self,
            kvm=at(self.kvm),
            control=at(self.control),
            exit=at(self.exit),
            kernel=at(self.kernel),
            initrd=at(self.initrd),
            incoming=at(self.incoming),
            disks=tuple(replace(disk, chain=tuple((at(fd), kind) for fd, kind in disk.chain)) for disk in self.disks),
            nics=tuple(replace(nic, fd=at(nic.fd)) for nic in self.nics),
            folders=tuple(replace(each, fd=at(each.fd), server=at(each.server)) for each in self.folders),
            vsock=vsock,
            console=replace(console, listener=at(console.listener), log=at(console.log), log_old=at(console.log_old)),
            life=replace(
                life,
                starter=at(life.starter),
                lock=at(life.lock),
                status=at(life.status),
                activity=at(life.activity),
                owner=at(life.owner),
            ),
            jail=replace(self.jail, root=at(self.jail.root)),
            restore=restore,
        )

    def close(self) -> None:
        """Close every descriptor in it: for a machine that is not made here."""

        def shut(fd: int) -> int:
            os.close(fd)
            return -1

        self.relocated(shut)

    @classmethod
    def from_dict(cls, d: state.Document) -> MonitorConfig:
        """Raises StateError, naming the key that is wrong."""
        descriptors = {
            name: state.integer(d, name, -1, MAX_FD, -1) for name in ("control", "exit", "kernel", "initrd", "incoming")
        }
        memory = state.integer(d, "memory", 1 << 20, MAX_SIZE)
        if memory % PAGE:
            raise state.StateError("'memory' is not a whole number of pages")
        return cls(
            uuid=state.text(d, "uuid", 36),
            name=state.text(d, "name", 256),
            cpus=state.integer(d, "cpus", 1, MAX_CPUS),
            memory=memory,
            kvm=state.integer(d, "kvm", -1, MAX_FD),
            **descriptors,
            append=state.text(d, "append", 1 << 16, ""),
            hugepages=state.boolean(d, "hugepages", False),
            generation_id=state.text(d, "generation_id", 36, ""),
            disks=tuple(map(DiskConfig.from_dict, state.children(d, "disks", MAX_DISKS))),
            bays=state.integer(d, "bays", 0, MAX_BAYS, 0),
            nics=tuple(map(NicConfig.from_dict, state.children(d, "nics", MAX_NICS))),
            folders=tuple(map(FolderConfig.from_dict, state.children(d, "folders", MAX_FOLDERS))),
            vsock=VsockConfig.from_dict(state.child(d, "vsock")) if d.get("vsock") is not None else None,
            console=ConsoleConfig.from_dict(state.child(d, "console")),
            life=LifeConfig.from_dict(state.child(d, "life")),
            jail=JailConfig.from_dict(state.child(d, "jail")),
            restore=RestoreConfig.from_dict(state.child(d, "restore")) if d.get("restore") is not None else None,
        )
