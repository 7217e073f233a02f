"""Making a vm, and removing one: the record, its directory, its disks."""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from posada.engine.registry import choose
from posada.errors import InvalidState, SpecError
from posada.host import faults, names
from posada.host.files import remove_tree
from posada.host.house import House, now
from posada.host.launch import check_folders, check_spec, macs_for
from posada.host.layers import drop, frozen_path, new_layer
from posada.host.operations import Operation
from posada.host.process import me
from posada.model.machine import DiskSpec, MachineSpec, validate
from posada.model.progress import Progress
from posada.model.records import Disk, ImageRecord, LayerRecord, VmRecord
from posada.model.states import AT_REST, LIVE, State
from posada.model.units import format_size
from posada.storage import disks as storage_disks
from posada.storage import qcow2


async def create(house: House, spec: MachineSpec, progress: Progress | None = None) -> VmRecord:
    """Make a vm from a spec; see `posada.host.machines.Machines.create`."""
    validate(spec)
    engine = choose(spec)
    check_spec(spec, engine.capabilities())
    check_folders(house, spec)
    uid = str(uuid.uuid4())
    target = spec.name or spec.image or uid[:8]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(house.locks.hold(uid, "create", new=True))
        op = await stack.enter_async_context(house.operations.run("create", target, [uid], progress))
        image = await _image(house, spec, op)
        vm = VmRecord(
            uuid=uid,
            name=spec.name or names.generate(house.db.has_vm_named),
            spec=spec,
            state=State.CREATED,
            engine=engine.name,
            image=image.digest if image is not None else None,
            macs=macs_for(spec),
            created=now(),
            owner=me() if spec.ephemeral else None,
        )
        vm = msgspec.structs.replace(vm, identity_pending=house.has_agent(vm))
        house.db.put_vm(vm)
        faults.point("create.reserved")
        house.paths.disks(uid).mkdir(mode=0o700, parents=True)
        faults.point("create.directory")
        made = await _make_disks(house, vm, image)
        faults.point("create.disks")
        with house.db.transaction(durable=True):
            for _, layer in made:
                if layer is not None:
                    house.db.put_layer(layer)
            vm = house.save(vm, disks=tuple(disk for disk, _ in made))
        op.succeed(vm=vm.uuid, name=vm.name)
        house.events.emit("vm.created", vm, image=spec.image)
        return vm


async def _image(house: House, spec: MachineSpec, op: Operation) -> ImageRecord | None:
    if spec.image is None:
        return None
    image = await house.images.ensure(spec.image, op.report)
    if image.arch != spec.arch:
        raise SpecError("image", f"{spec.image} is for {image.arch}, the spec says {spec.arch}", hint="set arch")
    return image


async def _make_disks(house: House, vm: VmRecord, image: ImageRecord | None) -> list[tuple[Disk, LayerRecord | None]]:
    specs = list(vm.spec.disks)
    if not specs and image is not None and image.disk is not None:
        specs = [DiskSpec(name="root")]
    made: list[tuple[Disk, LayerRecord | None]] = []
    for i, disk in enumerate(specs):
        if i == 0 and disk.source is None and image is not None and image.disk is not None:
            made.append(_from_image(house, vm, disk, image))
        else:
            made.append(await make_disk(house, vm.uuid, disk))
    return made


def _from_image(house: House, vm: VmRecord, spec: DiskSpec, image: ImageRecord) -> tuple[Disk, LayerRecord | None]:
    base = f"image:{image.digest}"
    size = spec.size or image.disk_size
    if size < image.disk_size:
        raise SpecError(
            "disks[0].size",
            f"{format_size(size)} is smaller than the image's disk",
            hint=f"use at least {format_size(image.disk_size)}",
        )
    if spec.readonly:
        return Disk(name=spec.name, size=image.disk_size, chain=(base,), readonly=True), None
    layer = new_layer(house, vm.uuid, spec.name, size=size)
    qcow2.create_overlay(
        house.paths.absolute(layer.path),
        size=size,
        backing=house.paths.absolute(image.path) / (image.disk or ""),
        backing_format=image.disk_format,
    )
    return Disk(name=spec.name, size=size, chain=(base, layer.id)), layer


async def make_disk(house: House, vm: str, spec: DiskSpec) -> tuple[Disk, LayerRecord]:
    """A data disk, empty or copied from ``spec.source``. Records nothing. Raises ImageError, HostError, SpecError."""
    if spec.source is None:
        if spec.size is None:
            raise SpecError("disks.size", "is missing", hint="an empty disk needs a size, like 10GiB")
        layer = new_layer(house, vm, spec.name, size=spec.size)
        qcow2.create_empty(house.paths.absolute(layer.path), size=spec.size)
        return Disk(name=spec.name, size=spec.size, chain=(layer.id,), readonly=spec.readonly), layer
    copy = house.paths.disks(vm) / f".{spec.name}.import"
    format, size = await storage_disks.import_disk(Path(spec.source), copy)
    if spec.size is not None and spec.size > size:
        await storage_disks.resize(copy, spec.size, format=format)
        size = spec.size
    layer = new_layer(house, vm, spec.name, size=size, format=format)
    if spec.readonly:
        # Never written to: frozen from birth, so that forks and snapshots share the one file.
        path = house.paths.relative(frozen_path(house, layer.id, format))
        layer = msgspec.structs.replace(layer, path=path, frozen=True)
    copy.rename(house.paths.absolute(layer.path))
    return Disk(name=spec.name, size=size, chain=(layer.id,), readonly=spec.readonly), layer


async def delete(house: House, ref: str, *, force: bool = False) -> None:
    """See `posada.host.machines.Machines.delete`."""
    if force:
        vm = house.find(ref)
        if vm.running is not None:  # whoever holds the lock waits for this machine: end it first
            await house.engine(vm.engine).kill(vm.running)
    async with AsyncExitStack() as stack:
        vm = await stack.enter_async_context(house.hold(ref, "kill" if force else "delete", check=False))
        if vm.state in LIVE and not force:
            raise InvalidState(
                vm.name, "delete", vm.state.value, sorted(AT_REST), hint="stop it first, or force: posada rm -f"
            )
        await delete_held(house, vm)


async def delete_held(house: House, vm: VmRecord) -> None:
    """As an operation: whoever opens the state next goes on with it. With its lock held."""
    layers = {id for disk in vm.disks for id in disk.chain}
    layers |= {id for snapshot in house.db.snapshots(vm.uuid) for disk in snapshot.disks for id in disk.chain}
    async with house.operations.run("delete", vm.name, [vm.uuid], layers=sorted(layers)) as op:
        await finish_delete(house, vm)
        op.succeed(vm=vm.uuid)


async def finish_delete(house: House, vm: VmRecord) -> None:
    """Delete it for good, whatever is left of it. With its lock held. Each step may have been done before."""
    if vm.state is not State.DELETING:
        vm = house.save(vm, state=State.DELETING)
    faults.point("delete.marked")
    await house.guests.drop(vm.uuid)
    engine = house.engine(vm.engine)
    if vm.running is not None:
        await engine.kill(vm.running)
    await engine.abandon(house.paths.machine(vm.uuid))
    faults.point("delete.killed")
    forget(house, vm.uuid)
    house.events.emit("vm.deleted", vm)


def forget(house: House, uid: str) -> None:
    """Remove all that there is of a vm without a process: files first, the record last. With its lock held."""
    vm = house.db.vm(uid)
    remove_tree(house.paths.machine(uid))
    remove_tree(house.paths.vm(uid))
    faults.point("delete.files")
    if vm is not None:
        layers = {id for disk in vm.disks for id in disk.chain}
        layers |= {id for snapshot in house.db.snapshots(uid) for disk in snapshot.disks for id in disk.chain}
        with house.db.transaction():
            house.db.drop_vm(uid)
            files = drop(house, layers)
        faults.point("delete.dropped")
        for path in files:
            path.unlink(missing_ok=True)
    house.locks.forget(uid)
