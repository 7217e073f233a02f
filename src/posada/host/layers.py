"""Disk layers: what a disk's chain means in files, how a chain grows, and which files nobody needs any more.

A disk is a chain of layers, lowest first. Only the top one is written to; it lives in its vm's ``disks`` directory. To
freeze it (a snapshot, a fork, a clone) a new, empty overlay is put on top and the old file moves to ``layers/``, from
where any number of chains may stand on it.

The order makes a kill -9 harmless. An empty overlay is transparent: a chain with it on top reads the same as without.
So `grow` records the longer chain *before* the engine switches. If the switch then never happens, the record is still
true in every byte; if it does, it is true already.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from posada.engine.base import DiskFile, NewLayer
from posada.errors import StateError
from posada.host import faults
from posada.host.files import move, remove_tree
from posada.host.house import House, now
from posada.model.records import Disk, LayerRecord, VmRecord
from posada.storage import qcow2

_IMAGE = "image:"


def layer_file(house: House, id: str) -> tuple[Path, str]:
    """Path and format of one entry of a chain. Raises StateError when it is not recorded."""
    if id.startswith(_IMAGE):
        image = house.db.image(id.removeprefix(_IMAGE))
        if image is None or image.disk is None:
            raise StateError(f"image {id.removeprefix(_IMAGE)[:12]} is gone", hint="build or import it again")
        return house.paths.absolute(image.path) / image.disk, image.disk_format
    layer = house.db.layer(id)
    if layer is None:
        raise StateError(f"disk layer {id} is not recorded", hint="posada recover --rebuild looks for its file")
    return house.paths.absolute(layer.path), layer.format


def disk_file(house: House, disk: Disk) -> DiskFile:
    return DiskFile(
        name=disk.name,
        size=disk.size,
        chain=tuple(layer_file(house, id) for id in disk.chain),
        readonly=disk.readonly,
    )


def disk_files(house: House, disks: Iterable[Disk]) -> tuple[DiskFile, ...]:
    return tuple(disk_file(house, disk) for disk in disks)


def active_path(house: House, vm: str, disk: str, id: str, format: str) -> Path:
    return house.paths.disks(vm) / f"{disk}-{id[:8]}.{format}"


def frozen_path(house: House, id: str, format: str) -> Path:
    return house.paths.layers / f"{id}.{format}"


def new_layer(house: House, vm: str, disk: str, *, size: int, format: str = "qcow2") -> LayerRecord:
    """A record for a layer that is about to be made, in the disks directory of ``vm``."""
    id = uuid.uuid4().hex
    path = active_path(house, vm, disk, id, format)
    return LayerRecord(id=id, path=house.paths.relative(path), format=format, size=size, frozen=False, created=now())


def overlay(house: House, vm: str, disk: Disk) -> tuple[Disk, LayerRecord]:
    """Make an empty overlay on the whole chain of ``disk``. Returns the disk of ``vm`` that it makes; records nothing.

    The chain below must be frozen by the time anybody else writes, see `grow`.
    """
    layer = new_layer(house, vm, disk.name, size=disk.size)
    backing, format = _final_file(house, disk.chain[-1])
    qcow2.create_overlay(house.paths.absolute(layer.path), size=disk.size, backing=backing, backing_format=format)
    return msgspec.structs.replace(disk, chain=(*disk.chain, layer.id)), layer


def _final_file(house: House, id: str) -> tuple[Path, str]:
    path, format = layer_file(house, id)
    return (path if id.startswith(_IMAGE) else frozen_path(house, id, format)), format


class Growth(msgspec.Struct, frozen=True):
    """What `grow` did to one vm."""

    before: VmRecord
    vm: VmRecord
    """Recorded now: each writable disk has a new top layer."""
    frozen: tuple[Disk, ...]
    """The disks as they stood: what a snapshot or a child stands on."""
    switch: tuple[NewLayer, ...]
    """What the engine has to switch a running machine to."""
    stale: tuple[Path, ...]
    """Old names of files that have moved; `settle` removes them."""


def grow(house: House, vm: VmRecord) -> Growth:
    """Put an empty overlay on each writable disk of ``vm`` and freeze what is below, in the record and on the disk.

    With the vm's lock held. The engine has not switched yet when this returns; see the top of this file.
    """
    disks: list[Disk] = []
    fresh: list[LayerRecord] = []
    frozen: list[LayerRecord] = []
    stale: list[Path] = []
    for disk in vm.disks:
        if disk.readonly:
            disks.append(disk)
            continue
        grown, layer = overlay(house, vm.uuid, disk)
        disks.append(grown)
        fresh.append(layer)
        below = house.db.layer(disk.chain[-1])
        if below is not None and not below.frozen:
            old, new = house.paths.absolute(below.path), frozen_path(house, below.id, below.format)
            if old != new:
                move(old, new)
                stale.append(old)
            frozen.append(msgspec.structs.replace(below, path=house.paths.relative(new), frozen=True))
    if not fresh:  # nothing to record, and nothing to wait for the disk for
        return Growth(before=vm, vm=vm, frozen=vm.disks, switch=(), stale=())
    faults.point("layers.made")
    # Durable: the guest will write, and fsync, to files that only this names.
    with house.db.transaction(durable=True):
        for layer in (*fresh, *frozen):
            house.db.put_layer(layer)
        grown_vm = house.save(vm, disks=tuple(disks))
    faults.point("layers.recorded")
    switch = tuple(
        NewLayer(disk=disk.name, path=layer_file(house, disk.chain[-1])[0]) for disk in disks if not disk.readonly
    )
    return Growth(before=vm, vm=grown_vm, frozen=vm.disks, switch=switch, stale=tuple(stale))


def settle(growth: Growth) -> None:
    """Remove the old names of frozen files; after the engine's switch, which may still look at them."""
    for path in growth.stale:
        path.unlink(missing_ok=True)


def shrink(house: House, growth: Growth, switched: Sequence[str] = ()) -> None:
    """Take `grow` back for the disks that the engine did not switch. The layers below keep their new place."""
    vm = house.recorded(growth.vm.uuid)
    before = {disk.name: disk for disk in growth.before.disks}
    dropped = [d.chain[-1] for d in vm.disks if not d.readonly and d.name not in switched]
    disks = tuple(before.get(d.name, d) if d.chain[-1] in dropped else d for d in vm.disks)
    with house.db.transaction():
        for disk in disks:
            layer = house.db.layer(disk.chain[-1])
            if layer is not None and layer.frozen and not disk.readonly:
                house.db.put_layer(msgspec.structs.replace(layer, frozen=False))
        house.save(vm, disks=disks)
    collect(house, dropped)
    settle(growth)


def collect(house: House, candidates: Iterable[str]) -> None:
    """Delete those of the layers that no vm and no snapshot names.

    Safe without a global lock: a layer gets a new reference only from a vm or snapshot that has one and whose lock is
    held, so one that has none can never get one again.
    """
    for path in drop(house, candidates):
        path.unlink(missing_ok=True)


def drop(house: House, candidates: Iterable[str]) -> list[Path]:
    """The first half of `collect`: forget the layers. Returns the files, to be removed after the commit."""
    doomed = {id for id in candidates if not id.startswith(_IMAGE)}
    files: list[Path] = []
    if not doomed:
        return files
    with house.db.transaction():
        doomed -= references(house)
        for id in doomed:
            layer = house.db.layer(id)
            if layer is not None:
                files.append(house.paths.absolute(layer.path))
                house.db.drop_layer(id)
            else:  # dropped by somebody who died before the next line
                files += house.paths.layers.glob(f"{id}.*")
    faults.point("layers.dropped")
    return files


def references(house: House) -> set[str]:
    """Every layer and ``image:<digest>`` that a vm or a snapshot stands on."""
    records: list[Sequence[Disk]] = [vm.disks for vm in house.db.vms()]
    records += [snapshot.disks for snapshot in house.db.snapshots()]
    return {id for disks in records for disk in disks for id in disk.chain}


def sweep(house: House, vm: VmRecord) -> None:
    """Remove files that an interrupted action left in the vm's directory or in ``layers``. With its lock held."""
    known: set[Path] = set()
    for disk in vm.disks:
        for id in disk.chain:
            layer = None if id.startswith(_IMAGE) else house.db.layer(id)
            if layer is None:
                continue
            path = house.paths.absolute(layer.path)
            known.add(path)
            other = frozen_path(house, layer.id, layer.format)
            if other != path and other.exists():
                if path.exists():
                    other.unlink()
                else:  # a file system without hard links: it was renamed, and not recorded
                    os.rename(other, path)
    with contextlib.suppress(FileNotFoundError):
        for path in house.paths.disks(vm.uuid).iterdir():
            if path not in known:
                path.unlink(missing_ok=True)
    snapshots = {snapshot.id for snapshot in house.db.snapshots(vm.uuid)}
    with contextlib.suppress(FileNotFoundError):
        for path in (house.paths.vm(vm.uuid) / "snapshots").iterdir():
            if path.name not in snapshots:
                remove_tree(path)
    with contextlib.suppress(FileNotFoundError):
        for path in house.paths.vm(vm.uuid).glob(".vm.json.*"):
            path.unlink(missing_ok=True)
