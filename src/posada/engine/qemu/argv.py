"""``Launch`` + ``Layout`` → QEMU's command line. Pure: no I/O, no randomness; tests/golden holds what it writes.

Every file and socket is opened by posada and inherited, so QEMU needs no path and its uid no access. The numbers are
given out here, from 3 up, and the keeper puts the descriptors there before exec; ``fds`` says which is which:
``ram``, ``state``, ``qmp``, ``monitor``, ``console``, ``agent0``…, ``kernel``, ``initrd``, ``vsock``,
``disk:NAME:I:ro`` and ``disk:NAME:I:rw`` (file I of the disk's chain).

Options follow QEMU 7.2's and 10.0's qemu-system-x86_64(1); what is not said in the manual is commented here.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from posada.engine.base import Launch
from posada.engine.qemu.layout import (
    AGENT_PORTS,
    NIC_SLOTS,
    SLOT_BALLOON,
    SLOT_RNG,
    SLOT_SERIAL,
    SLOT_VSOCK,
    Layout,
    match_disks,
)
from posada.model.units import MIB

#: MiB of translated code kept per machine. Docs: bench/, docs/adr/; smaller costs retranslation, larger memory.
TB_SIZE = 64

#: What the kernel is told by the machine, before what the image and the host append.
#: ``panic=-1``: reboot at once, which ends QEMU, instead of hanging for ever.
APPEND = "panic=-1"

#: Those of disks are their slot times 256 and up.
_STATE_FDSET = 1


@dataclasses.dataclass(frozen=True)
class Invocation:
    """The command line and, by role, the descriptor numbers it expects."""

    argv: tuple[str, ...]
    fds: dict[str, int]
    state_uri: str = ""
    """Where a machine with ``incoming`` loads its devices from: the argument of migrate-incoming."""


class _Builder:
    """Collects options and hands out descriptor numbers."""

    def __init__(self, binary: str) -> None:
        self.argv: list[str] = [binary]
        self.fds: dict[str, int] = {}

    def add(self, *options: str) -> None:
        self.argv += options

    def fd(self, role: str) -> int:
        self.fds[role] = number = 3 + len(self.fds)
        return number


def quote(text: str) -> str:
    """A value inside QEMU's comma-separated options: commas are doubled."""
    return text.replace(",", ",,")


def build(
    launch: Launch,
    layout: Layout,
    *,
    binary: str,
    incoming: bool = False,
    file_uri: bool = False,
    cid: int = 0,
    tb_size: int = TB_SIZE,
) -> Invocation:
    """The command line that starts ``launch`` with the devices of ``layout``.

    ``incoming``: memory and devices come from a capture; the machine waits, stopped, for its state on fd ``state``.
    ``file_uri``: QEMU reads state by ``file:`` URIs (8.2), and means to give up reading files by ``fd:`` (9.1).
    Raises EngineError when the launch's disks are not the layout's.
    """
    b = _Builder(binary)
    _machine(b, launch, layout, incoming, tb_size)
    _control(b)
    if not incoming:
        _boot(b, launch)
    _console(b, layout.agent)
    b.add("-device", f"virtio-balloon-pci,id=balloon,addr={SLOT_BALLOON:#x},free-page-reporting=on,deflate-on-oom=on")
    b.add("-object", "rng-builtin,id=entropy", "-device", f"virtio-rng-pci,id=rng,addr={SLOT_RNG:#x},rng=entropy")
    b.add("-device", f"vmgenid,id=generation,guid={launch.generation_id or 'auto'}")
    if layout.vsock:
        b.add("-device", f"vhost-vsock-pci,id=vsock,addr={SLOT_VSOCK:#x},guest-cid={cid},vhostfd={b.fd('vsock')}")
    _nics(b, launch, layout)
    _disks(b, launch, layout)
    state_uri = ""
    if incoming:
        state = b.fd("state")
        state_uri = f"fd:{state}"
        if file_uri:
            b.add("-add-fd", f"fd={state},set={_STATE_FDSET}")
            state_uri = f"file:/dev/fdset/{_STATE_FDSET}"
        # The stream holds devices only (xen-save-devices-state): no configuration section, no run state.
        b.add("-global", "migration.send-configuration=off", "-global", "migration.store-global-state=off")
        b.add("-S", "-incoming", "defer")
    return Invocation(tuple(b.argv), b.fds, state_uri)


def _machine(b: _Builder, launch: Launch, layout: Layout, incoming: bool, tb_size: int) -> None:
    # suppress-vmdesc: without it a JSON description follows the device state, and the reader of a bare stream rejects it.
    b.add("-name", quote(f"posada-{launch.name}"), "-uuid", launch.uuid)
    b.add("-M", f"{layout.machine},memory-backend=ram,suppress-vmdesc=on,vmport=off,usb=off,dump-guest-core=off")
    # Both models have what the accelerator can give, so guests are kept from it unless they are to have guests.
    hidden = "" if layout.nested else ",svm=off,vmx=off"
    if layout.accelerator == "kvm":
        b.add("-accel", "kvm", "-cpu", f"host{hidden}")
    else:
        b.add("-accel", f"tcg,tb-size={tb_size}", "-cpu", f"max{hidden}")
    b.add("-smp", str(layout.cpus), "-m", str(layout.memory // MIB))
    # Booted machines share their memory file, so that a capture can copy it; children map a sealed copy privately.
    share = "off" if incoming else "on"
    backend = f"memory-backend-file,id=ram,size={layout.memory},mem-path=/proc/self/fd/{b.fd('ram')}"
    b.add("-object", f"{backend},share={share},merge=off,dump=off")
    b.add("-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=off")
    b.add("-rtc", "base=utc")
    b.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
    # A reset ends the process: the host starts the machine afresh, with its disks' newest layers.
    b.add("-action", "reboot=shutdown,shutdown=poweroff,panic=shutdown")


def _control(b: _Builder) -> None:
    b.add("-chardev", f"socket,id=qmp,fd={b.fd('qmp')},server=on,wait=off", "-mon", "chardev=qmp,mode=control")
    b.add("-chardev", f"socket,id=monitor,fd={b.fd('monitor')}", "-mon", "chardev=monitor,mode=control")


def _boot(b: _Builder, launch: Launch) -> None:
    if launch.kernel is None:
        return
    b.add("-kernel", f"/proc/self/fd/{b.fd('kernel')}")
    if launch.initrd is not None:
        b.add("-initrd", f"/proc/self/fd/{b.fd('initrd')}")
    b.add("-append", f"{APPEND} {launch.append}".strip())


def _console(b: _Builder, agent: bool) -> None:
    b.add("-chardev", f"socket,id=console,fd={b.fd('console')}", "-serial", "chardev:console")
    b.add("-device", "pvpanic,id=panic")
    # Port 0 is the virtio console's by tradition. The device is there without an agent too: one shape less to support.
    b.add("-device", f"virtio-serial-pci,id=serial,addr={SLOT_SERIAL:#x},max_ports={AGENT_PORTS + 1}")
    if not agent:
        return
    for i in range(AGENT_PORTS):
        b.add("-chardev", f"socket,id=agent{i},fd={b.fd(f'agent{i}')},server=on,wait=off")
        name = f"org.posada.agent.{i}"
        b.add("-device", f"virtserialport,id=port{i},bus=serial.0,nr={i + 1},chardev=agent{i},name={name}")


def _nics(b: _Builder, launch: Launch, layout: Layout) -> None:
    for i, slot in zip(range(layout.nics), NIC_SLOTS, strict=False):
        forwards = ""
        if i == 0:
            for port in launch.spec.ports:
                # Host port 0: any free one, bound by QEMU itself; `info usernet` tells which. So there is no race.
                forwards += f",hostfwd={port.protocol}:{port.address}:{port.host or 0}-:{port.guest}"
        b.add("-netdev", f"user,id=net{i},ipv6=off,restrict=off{forwards}")
        # romfile empty: no boot ROM, whose memory would be one more block outside the guest's RAM.
        mac = launch.macs[i] if i < len(launch.macs) else f"52:54:00:00:00:{i + 1:02x}"
        b.add("-device", f"virtio-net-pci,id=nic{i},addr={slot:#x},netdev=net{i},mac={mac},romfile=")


def blockdev(
    node: str, format: str, fdset: int, *, backing: str | None, writable: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``blockdev-add`` arguments (file node, format node) of one file of a chain.

    ``backing`` is the node below, or None for the lowest: stated always, so the name in the header is never followed.
    ``auto-read-only`` off: a file that cannot be written is an error at start, not at the guest's first write.
    """
    mode: dict[str, Any] = {"auto-read-only": False}
    mode |= {"discard": "unmap", "detect-zeroes": "off"} if writable else {"read-only": True}
    file = {"driver": "file", "node-name": f"{node}-f", "filename": f"/dev/fdset/{fdset}", **mode}
    top = {"driver": format, "node-name": node, "file": f"{node}-f", **mode}
    if format == "qcow2":
        top["backing"] = backing
    return file, top


def _disks(b: _Builder, launch: Launch, layout: Layout) -> None:
    for slot, disk in match_disks(layout, launch.disks):
        backing: str | None = None
        for i, (_, format) in enumerate(disk.chain):
            writable = not disk.readonly and i == len(disk.chain) - 1
            fdset = slot * 256 + i
            # A layer that is written to becomes read-only when a capture puts another on it: QEMU reopens it then.
            for access in ("rw", "ro") if writable else ("ro",):
                b.add("-add-fd", f"fd={b.fd(f'disk:{disk.name}:{i}:{access}')},set={fdset}")
            node = f"d{slot}-{i}"
            for options in blockdev(node, format, fdset, backing=backing, writable=writable):
                b.add("-blockdev", json.dumps(options))
            backing = node
        device = device_blk(disk.name, slot, f"d{slot}-{len(disk.chain) - 1}")
        b.add("-device", f"{device.pop('driver')}," + ",".join(f"{key}={value}" for key, value in device.items()))


def device_blk(name: str, slot: int, node: str) -> dict[str, Any]:
    """The ``device_add`` arguments of a disk.

    werror=report: a full host disk is an I/O error in the guest, at once, instead of a machine that stands still.
    """
    return {
        "driver": "virtio-blk-pci", "id": f"disk-{name}", "addr": f"{slot:#x}", "drive": node, "serial": name,
        "num-queues": 1, "werror": "report", "rerror": "report",
    }  # fmt: skip
