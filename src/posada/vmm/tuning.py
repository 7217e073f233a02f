"""Requests that change a running machine: disks that come, go and grow, memory, the network behind a NIC."""

from __future__ import annotations

import os
from typing import Any

from posada.errors import EngineError, Timeout
from posada.proto.monitor import Op
from posada.vmm.block.chain import layers_of, open_chain
from posada.vmm.block.disk import Disk
from posada.vmm.block.merge import merge
from posada.vmm.block.qcow2.disk import Qcow2Disk
from posada.vmm.config import DiskConfig, NicKind
from posada.vmm.control import Call, Handler, Result
from posada.vmm.machine import Machine
from posada.vmm.virtio.balloon import Balloon
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.net import Net
from posada.vmm.virtio.spare import Bay

#: Seconds for a guest to look at a disk that came. One whose driver is not up looks when it is.
_LOOK = 2.0


class Tuning:
    """The handlers of one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def handlers(self) -> dict[Op, Handler]:
        return {
            Op.ATTACH: self._attach,
            Op.DETACH: self._detach,
            Op.RESIZE_DISK: self._resize_disk,
            Op.MERGE: self._merge,
            Op.SET_MEMORY: self._set_memory,
            Op.NIC: self._nic,
        }

    def _attach(self, call: Call) -> None:
        wanted = DiskConfig.from_dict(call.args["disk"])
        slot = self._machine.slots.get(wanted.device)
        bay = slot.transport.device if slot is not None else None
        if not isinstance(bay, Bay):
            raise EngineError("the machine has no such bay for a disk")
        answer = _Answer(self._machine, call, _LOOK, late=False)
        disk = self._open(call, wanted)
        try:
            bay.insert(disk, wanted.name, answer.seen)
        except BaseException:
            disk.close()
            raise
        answer.wait(bay.active)

    def _open(self, call: Call, wanted: DiskConfig) -> Disk:
        chain = [(call.given.take(index), format) for index, format in wanted.chain]
        return open_chain(chain, wanted.size, wanted.readonly)

    def _detach(self, call: Call) -> None:
        bay = find_disk(self._machine, call.args["name"])
        if not isinstance(bay, Bay):
            raise EngineError("the disk was there at power-on, and cannot be taken out of the running machine")
        answer = _Answer(self._machine, call, call.args["timeout"], late=True)
        bay.eject(answer.seen)
        answer.wait(bay.active)

    def _resize_disk(self, call: Call) -> Result:
        find_disk(self._machine, call.args["name"]).resize(call.args["size"])
        return {}

    def _merge(self, call: Call) -> Result:
        """By identity: the caller may know of layers that this disk never got, or has merged already."""
        blk = find_disk(self._machine, call.args["name"])
        blk.quiesce()
        files = call.args["files"]
        places = {(file["device"], file["inode"]): place for place, file in enumerate(files)}

        def stands_on() -> list[int]:
            try:
                return [places[layer.file.identity()] for layer in layers_of(blk.disk)[:-1]]
            except KeyError:
                raise EngineError(
                    f"disk {call.args['name']!r} stands on a file that is not among those named"
                ) from None

        keep = sum(place < call.args["keep"] for place in stands_on())
        if merge(blk.disk, keep) and (kept := stands_on()):
            base = files[kept[-1]]
            top = blk.disk
            assert isinstance(top, Qcow2Disk)
            top.image.rename_backing(os.fsencode(base["name"]), base["format"].encode())
        return {"kept": stands_on()}

    def _set_memory(self, call: Call) -> Result:
        balloon = self._machine.slots["balloon"].transport.device
        assert isinstance(balloon, Balloon)
        try:
            balloon.set_target(call.args["size"])
        except ValueError as error:
            raise EngineError(str(error)) from None
        return {}

    def _nic(self, call: Call) -> Result:
        slot = self._machine.slots.get(f"nic:{call.args['index']}")
        if slot is None or not isinstance(slot.transport.device, Net):
            raise EngineError(f"the machine has no network interface {call.args['index']}")
        given: dict[str, Any] = {"kind": NicKind.NONE}
        if "fd" in call.args:
            given = {"kind": NicKind.PASST, "fd": call.given.take(call.args["fd"])}
        slot.transport.device.reopen(given)
        return {}


class _Answer:
    """The answer to a call, given when the guest has looked; or after ``seconds``, with Timeout if that is too late."""

    def __init__(self, machine: Machine, call: Call, seconds: float, *, late: bool) -> None:
        self._loop, self._call, self._seconds, self._late = machine.loop, call, seconds, late
        self._done = False

    def seen(self) -> None:
        self._finish(None)

    def wait(self, active: bool) -> None:
        """A device without a driver shows nobody anything."""
        if active:
            self._loop.timer(self._seconds, self._over)
        else:
            self._finish(None)

    def _over(self) -> None:
        hint = "unmount it in the guest and try again"
        self._finish(Timeout("the guest has not let go of the disk", hint=hint) if self._late else None)

    def _finish(self, error: Exception | None) -> None:
        if self._done:
            return
        self._done = True
        if error is None:
            self._call.done({})
        else:
            self._call.fail(error)


def blks(machine: Machine) -> dict[str, Blk]:
    """Its block devices, empty bays too, by their names in the machine."""
    devices = {name: slot.transport.device for name, slot in machine.slots.items()}
    return {name: device for name, device in devices.items() if isinstance(device, Blk)}


def find_disk(machine: Machine, name: str) -> Blk:
    """By the name it was given. Raises EngineError."""
    for blk in blks(machine).values():
        if blk.serial == name.encode()[:20] and not (isinstance(blk, Bay) and blk.empty):
            return blk
    raise EngineError(f"the machine has no disk named {name!r}")
