"""``Launch`` → the monitor's configuration. Pure but for ``fd``; tests/golden holds what it writes.

Every file and socket is opened by us and inherited, or sent: ``fd`` is asked for each by role, and answers with the number
under which the monitor will find it. The roles: ``kvm``, ``control``, ``exit``, ``kernel``, ``initrd``,
``disk:NAME:I:ro`` and ``disk:NAME:I:rw`` (file I of the disk's chain), ``nic:I``, ``folder:I``, ``server:I`` (its
other end), ``agent``, ``vsock``, ``console``, ``log``, ``log.1``, ``starter``, ``lock``, ``status``, ``activity``,
``owner``, ``root``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from posada.engine.base import DiskFile, Launch
from posada.engine.kvm import folders, net
from posada.errors import EngineError, Unsupported
from posada.proto.frames import VSOCK_PORT
from posada.vmm.config import (
    MAX_BAYS,
    ConsoleConfig,
    DiskConfig,
    FolderConfig,
    JailConfig,
    MonitorConfig,
    NicConfig,
    NicKind,
    RestoreConfig,
    VsockConfig,
)
from posada.vmm.life import LifeConfig

#: What the kernel is told by the machine, before what the image and the host append. ``panic=-1``: reset at once, which
#: ends the monitor, instead of hanging for ever. There is no keyboard controller behind its reset port, and no PCI.
APPEND = "panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd pci=off"

#: Disks that can be attached to a running machine. Each is a device that is there from power-on, and empty.
BAYS = 4

Descriptor = Callable[[str], int]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a machine's devices is decided at power-on, and by attaching disks: a restored or forked one has the same."""

    bays: int = BAYS
    inserted: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Disks by name in the bay they are in."""

    def with_disk(self, name: str) -> Shape:
        """With a disk in the lowest free bay. Raises Unsupported when all are full."""
        free = sorted(set(range(self.bays)) - set(self.inserted.values()))
        if not free:
            hint = "detach one, or stop the machine first"
            raise Unsupported("kvm", f"more than {self.bays} disks attached while it runs", hint=hint)
        return dataclasses.replace(self, inserted={**self.inserted, name: free[0]})

    def without_disk(self, name: str) -> Shape:
        return dataclasses.replace(self, inserted={k: v for k, v in self.inserted.items() if k != name})

    def to_private(self) -> dict[str, Any]:
        return {"bays": self.bays, "inserted": dict(self.inserted)}

    @classmethod
    def from_private(cls, private: Mapping[str, Any]) -> Shape:
        """Raises EngineError: a snapshot's record is data from disk."""
        bays, inserted = private.get("bays", BAYS), private.get("inserted", {})
        if (
            type(bays) is not int
            or not 0 <= bays <= MAX_BAYS
            or not isinstance(inserted, Mapping)
            or not all(type(bay) is int and 0 <= bay < bays for bay in inserted.values())
            or len(set(inserted.values())) != len(inserted)
        ):
            raise EngineError("the machine's record is damaged", detail=f"bays {bays!r}, {inserted!r}")
        return cls(bays, inserted)


def append(launch: Launch) -> str:
    """The whole kernel command line."""
    words = [APPEND]
    if launch.agent:
        words.append(f"posada.vsock={VSOCK_PORT}")
    return " ".join([*words, launch.append]).strip()


def boot(launch: Launch, fd: Descriptor, *, cid: int, uid: int | None) -> MonitorConfig:
    """A machine from power-on."""
    base = _machine(launch, fd, cid, uid, Shape())
    return dataclasses.replace(
        base,
        kvm=fd("kvm"),
        kernel=fd("kernel") if launch.kernel is not None else -1,
        initrd=fd("initrd") if launch.initrd is not None else -1,
        append=append(launch),
        jail=_jail(base, fd),
    )


def restored(
    launch: Launch, fd: Descriptor, *, cid: int, uid: int | None, shape: Shape, restore: RestoreConfig
) -> MonitorConfig:
    """A machine that begins with another's memory and devices, in a process of its own."""
    folders.refuse(launch, "restore")
    base = _machine(launch, fd, cid, uid, shape)
    return dataclasses.replace(base, kvm=fd("kvm"), jail=_jail(base, fd), restore=restore)


def forked(launch: Launch, fd: Descriptor, *, cid: int, uid: int | None, shape: Shape) -> MonitorConfig:
    """A machine that its parent's process becomes. Its disks' layers are the parent's but for the top, by files of its own."""
    base = _machine(launch, fd, cid, uid, shape)
    twins = [dataclasses.replace(f, server=fd(f"server:{i}")) for i, f in enumerate(base.folders)]
    return dataclasses.replace(base, folders=tuple(twins))


def _jail(base: MonitorConfig, fd: Descriptor) -> JailConfig:
    """For a process that is not in it yet."""
    return dataclasses.replace(base.jail, root=fd("root"))


def disk_config(disk: DiskFile, fd: Descriptor, bay: int = -1) -> DiskConfig:
    """Every file of the chain; the last one to be written to."""
    last = len(disk.chain) - 1
    chain = tuple(
        (fd(f"disk:{disk.name}:{i}:{'rw' if i == last and not disk.readonly else 'ro'}"), format)
        for i, (_, format) in enumerate(disk.chain)
    )
    return DiskConfig(disk.name, disk.size, chain, disk.readonly, bay)


def _machine(launch: Launch, fd: Descriptor, cid: int, uid: int | None, shape: Shape) -> MonitorConfig:
    spec = launch.spec
    return MonitorConfig(
        uuid=launch.uuid,
        name=launch.name,
        cpus=spec.cpus,
        memory=spec.memory,
        kvm=-1,
        control=fd("control"),
        exit=fd("exit"),
        generation_id=launch.generation_id,
        disks=tuple(disk_config(disk, fd, shape.inserted.get(disk.name, -1)) for disk in launch.disks),
        bays=shape.bays,
        nics=tuple(NicConfig(mac, NicKind.PASST, fd(f"nic:{i}"), net.MTU) for i, mac in enumerate(launch.macs)),
        folders=tuple(FolderConfig(f"folder{i}", fd(f"folder:{i}")) for i in range(len(spec.folders))),
        vsock=VsockConfig(cid, ((VSOCK_PORT, fd("agent")),) if launch.agent else (), fd("vsock")),
        console=ConsoleConfig(fd("console"), fd("log"), fd("log.1")),
        life=LifeConfig(
            starter=fd("starter"),
            lock=fd("lock"),
            status=fd("status"),
            activity=fd("activity"),
            owner=fd("owner") if launch.owner is not None else -1,
            lifetime=spec.limits.lifetime or 0,
            idle=spec.limits.idle or 0,
            action=spec.limits.action,
        ),
        jail=JailConfig(uid=-1 if uid is None else uid),
    )
