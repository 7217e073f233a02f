"""``posada recover --rebuild``: state.db made anew from the ``vm.json`` and ``snapshot.json`` files beside the disks.

For a database that is lost or damaged. What the files say is untrusted until it was checked: only records whose disks
are all there are taken; whatever is left out is named, and nothing is deleted.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from posada.errors import AlreadyExists, ImageError, PosadaError
from posada.host.house import House, now
from posada.host.layers import overlay
from posada.host.process import boot_id
from posada.host.recovery import RecoverReport
from posada.model.machine import validate
from posada.model.records import Disk, LayerRecord, SnapshotRecord, VmRecord
from posada.model.states import LIVE, State
from posada.storage import qcow2


def rebuild(house: House) -> RecoverReport:
    """Fill state.db from the files. Vms it knows already stay as they are. Nothing may be running that is lost."""
    layers = _layer_files(house)
    rebuilt: list[str] = []
    problems: list[str] = []
    for folder in sorted(house.paths.vms.iterdir()):
        if house.db.vm(folder.name) is not None:
            continue
        try:
            vm = _read_vm(folder)
            with house.db.transaction(durable=True):
                _take(house, vm, layers)
            rebuilt.append(vm.name)
        except (PosadaError, OSError, msgspec.MsgspecError) as error:
            problems.append(f"{folder.name}: {error}")
    house.db.set_meta("boot", boot_id())
    return RecoverReport(rebuilt=tuple(rebuilt), problems=tuple(problems))


def _read_vm(folder: Path) -> VmRecord:
    vm = msgspec.json.decode((folder / "vm.json").read_bytes(), type=VmRecord)
    if vm.uuid != folder.name:
        raise ImageError(f"its vm.json is that of {vm.uuid}")
    validate(vm.spec)
    # What ran is not known any more; a machine that still runs is ended by its start's check of the runtime directory.
    state = State.STOPPED if vm.state in LIVE else vm.state
    return msgspec.structs.replace(vm, state=state, running=None)


def _take(house: House, vm: VmRecord, layers: dict[str, Path]) -> None:
    points: list[SnapshotRecord] = []
    for file in sorted((house.paths.vm(vm.uuid) / "snapshots").glob("*/snapshot.json")):
        point = msgspec.json.decode(file.read_bytes(), type=SnapshotRecord)
        if point.id == file.parent.name and point.vm == vm.uuid:
            points.append(point)
    for disk in [*vm.disks, *(disk for point in points for disk in point.disks)]:
        _take_disk(house, disk, layers)
    name, number = vm.name, 1
    while house.db.has_vm_named(name):
        number += 1
        name = f"{vm.name[:55]}-{number}"
    if name != vm.name:
        vm = msgspec.structs.replace(vm, name=name, spec=msgspec.structs.replace(vm.spec, name=name))
    vm = msgspec.structs.replace(vm, disks=tuple(_writable(house, vm, disk) for disk in vm.disks))
    house.save(vm, disks=vm.disks)
    for point in sorted(points, key=lambda p: p.created):
        try:
            house.db.put_snapshot(point)
        except AlreadyExists:
            continue


def _take_disk(house: House, disk: Disk, layers: dict[str, Path]) -> None:
    top = len(disk.chain) - 1
    for i, id in enumerate(disk.chain):
        if id.startswith("image:"):
            if house.db.image(id.removeprefix("image:")) is None:
                raise ImageError(f"its image {id[6:18]} is not recorded", hint="import or build it again, then rebuild")
            continue
        if house.db.layer(id) is not None:
            continue
        path = layers.get(id) or layers.get(id[:8])
        if path is None:
            raise ImageError(f"the layer {id} of its disk {disk.name!r} is missing")
        format = path.suffix.removeprefix(".")
        if format == "qcow2":
            qcow2.inspect(path)
        house.db.put_layer(
            LayerRecord(
                id=id,
                path=house.paths.relative(path),
                format=format,
                size=disk.size,
                frozen=i < top or path.parent == house.paths.layers,
                created=now(),
            )
        )


def _writable(house: House, vm: VmRecord, disk: Disk) -> Disk:
    """The disk with a top of its own. A vm.json older than the last snapshot names a layer that is frozen since."""
    layer = house.db.layer(disk.chain[-1])
    if disk.readonly or (layer is not None and not layer.frozen):
        return disk
    disk, fresh = overlay(house, vm.uuid, disk)
    house.db.put_layer(fresh)
    return disk


def _layer_files(house: House) -> dict[str, Path]:
    """Layer files by id (frozen ones) and by the id's first eight digits (active ones, ``<disk>-<id8>.<format>``)."""
    found: dict[str, Path] = {}
    for path in house.paths.vms.glob("*/disks/*-????????.*"):
        if path.is_file() and not path.is_symlink():
            found[path.stem.rpartition("-")[2]] = path
    for path in house.paths.layers.iterdir():
        if path.is_file() and not path.is_symlink():
            found[path.stem] = path
    return found
