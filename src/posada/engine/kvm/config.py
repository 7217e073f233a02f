"""``Launch`` → the monitor's configuration. Pure but for ``fd``; tests/golden holds what it writes.

Every file and socket is opened by us and inherited, or sent: ``fd`` is asked for each by role, and answers with the number
under which the monitor will find it. The roles: ``kvm``, ``control``, ``exit``, ``kernel``, ``initrd``,
``disk:NAME:I:ro`` and ``disk:NAME:I:rw`` (file I of the disk's chain), ``nic:I``, ``agent``, ``vsock``, ``console``,
``log``, ``log.1``, ``starter``, ``lock``, ``status``, ``activity``, ``owner``, ``root``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from posada.engine.base import DiskFile, Launch
from posada.proto.frames import VSOCK_PORT
from posada.vmm.config import ConsoleConfig, DiskConfig, JailConfig, MonitorConfig, NicConfig, NicKind, VsockConfig
from posada.vmm.life import LifeConfig

#: What the kernel is told by the machine, before what the image and the host append. ``panic=-1``: reset at once, which
#: ends the monitor, instead of hanging for ever. There is no keyboard controller behind its reset port, and no PCI.
APPEND = "panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd pci=off"

Descriptor = Callable[[str], int]


def append(launch: Launch) -> str:
    """The whole kernel command line."""
    words = [APPEND]
    if launch.agent:
        words.append(f"posada.vsock={VSOCK_PORT}")
    return " ".join([*words, launch.append]).strip()


def boot(launch: Launch, fd: Descriptor, *, cid: int, uid: int | None) -> MonitorConfig:
    """A machine from power-on."""
    base = _machine(launch, fd, cid, uid)
    return dataclasses.replace(
        base,
        kvm=fd("kvm"),
        kernel=fd("kernel") if launch.kernel is not None else -1,
        initrd=fd("initrd") if launch.initrd is not None else -1,
        append=append(launch),
        disks=tuple(whole_chain(disk, fd) for disk in launch.disks),
    )


def restored(launch: Launch, fd: Descriptor, *, cid: int, uid: int | None) -> MonitorConfig:
    """A machine that begins with another's memory and devices, in a process of its own."""
    base = _machine(launch, fd, cid, uid)
    return dataclasses.replace(base, kvm=fd("kvm"), disks=tuple(whole_chain(disk, fd) for disk in launch.disks))


def forked(launch: Launch, fd: Descriptor, *, cid: int, uid: int | None) -> MonitorConfig:
    """A machine that its parent's process becomes: of its disks it gets what stands on the parent's frozen layers."""
    base = _machine(launch, fd, cid, uid)
    writable = (disk for disk in launch.disks if not disk.readonly)
    return dataclasses.replace(base, disks=tuple(top_only(disk, fd) for disk in writable))


def whole_chain(disk: DiskFile, fd: Descriptor) -> DiskConfig:
    last = len(disk.chain) - 1
    chain = tuple(
        (fd(f"disk:{disk.name}:{i}:{'rw' if i == last and not disk.readonly else 'ro'}"), format)
        for i, (_, format) in enumerate(disk.chain)
    )
    return DiskConfig(disk.name, disk.size, chain, disk.readonly)


def top_only(disk: DiskFile, fd: Descriptor) -> DiskConfig:
    last = len(disk.chain) - 1
    return DiskConfig(disk.name, disk.size, ((fd(f"disk:{disk.name}:{last}:rw"), disk.chain[last][1]),))


def _machine(launch: Launch, fd: Descriptor, cid: int, uid: int | None) -> MonitorConfig:
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
        nics=tuple(NicConfig(mac, NicKind.PASST, fd(f"nic:{i}")) for i, mac in enumerate(launch.macs)),
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
        jail=JailConfig(uid=-1 if uid is None else uid, root=fd("root")),
    )
