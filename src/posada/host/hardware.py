"""Changing a vm's hardware: cpus, memory, disks, ports; running or at rest."""

from __future__ import annotations

import contextlib

import msgspec

from posada.errors import AlreadyExists, EngineError, GuestError, NotFound, SpecError, Unsupported
from posada.host import faults
from posada.host.creating import make_disk
from posada.host.house import House
from posada.host.layers import collect, disk_file, layer_file
from posada.model.capabilities import Feature
from posada.model.machine import DiskSpec, MachineSpec, PortSpec, validate
from posada.model.records import Disk, PortRecord, VmRecord
from posada.model.states import LIVE, State
from posada.model.units import format_size
from posada.storage import disks as storage_disks


def _changed(spec: MachineSpec, **changes: object) -> MachineSpec:
    new = msgspec.structs.replace(spec, **changes)
    validate(new)
    return new


async def resize(
    house: House, ref: str, *, cpus: int | None, memory: int | None, disk: tuple[str, int] | None
) -> VmRecord:
    """See `posada.host.machines.Machines.resize`."""
    async with house.hold(ref, "resize") as vm:
        engine, live = house.engine(vm.engine), vm.state in LIVE
        can = engine.capabilities()
        spec = vm.spec
        if cpus is not None:
            spec = _changed(spec, cpus=cpus)
            if live and cpus != vm.spec.cpus:
                raise Unsupported(vm.engine, "changing the cpus of a running machine", hint=f"posada stop {vm.name}")
        if memory is not None:
            spec = _changed(spec, memory=memory)
        target = _find_disk(vm, disk[0]) if disk is not None else None
        if target is not None and disk is not None:
            _check_growth(target, disk[1])
        if live and (memory is not None or disk is not None):
            can.require(Feature.RESIZE_LIVE)
        if live and memory is not None:
            if memory > vm.spec.memory:
                raise Unsupported(
                    vm.engine,
                    f"more than the {format_size(vm.spec.memory)} the machine was started with",
                    hint=f"stop it first: posada stop {vm.name}",
                )
            # The balloon only: the machine's own size, which snapshots depend on, stays.
            await engine.set_memory(house.running(vm), memory)
            spec = msgspec.structs.replace(spec, memory=vm.spec.memory)
        vm = house.save(vm, spec=spec)
        if target is not None and disk is not None:
            vm = await _grow_disk(house, vm, target, disk[1])
        house.events.emit("vm.resized", vm)
        return vm


def _find_disk(vm: VmRecord, name: str) -> Disk:
    for disk in vm.disks:
        if disk.name == name:
            return disk
    raise NotFound("disk", name, hint=f"{vm.name} has {', '.join(d.name for d in vm.disks) or 'none'}")


def _check_growth(disk: Disk, size: int) -> None:
    if disk.readonly:
        raise SpecError("disk", f"{disk.name!r} is read-only")
    if size < disk.size:
        raise SpecError(
            "disk", f"{disk.name!r} has {format_size(disk.size)} and cannot shrink", hint="only growing is safe"
        )
    if size % 512:
        raise SpecError("disk", f"{size} bytes is not a multiple of 512")


async def _grow_disk(house: House, vm: VmRecord, disk: Disk, size: int) -> VmRecord:
    engine = house.engine(vm.engine)
    if vm.state in LIVE:
        await engine.resize_disk(house.running(vm), disk.name, size)
        if vm.state is State.RUNNING and house.has_agent(vm):
            index = [d.name for d in vm.disks].index(disk.name)
            client = await house.guests.connect(vm)
            with contextlib.suppress(GuestError):  # no ext4 on it, or not mounted: the guest's user grows it
                await client.call("disk.grow", device=f"/dev/vd{chr(ord('a') + index)}")
    else:
        path, format = layer_file(house, disk.chain[-1])
        await storage_disks.resize(path, size, format=format)
    disks = tuple(msgspec.structs.replace(d, size=size) if d.name == disk.name else d for d in vm.disks)
    specs = tuple(msgspec.structs.replace(d, size=size) if d.name == disk.name else d for d in vm.spec.disks)
    return house.save(vm, disks=disks, spec=msgspec.structs.replace(vm.spec, disks=specs))


async def attach_disk(house: House, ref: str, disk: DiskSpec) -> VmRecord:
    """See `posada.host.machines.Machines.attach_disk`."""
    async with house.hold(ref, "attach") as vm:
        engine, live = house.engine(vm.engine), vm.state in LIVE
        if any(d.name == disk.name for d in vm.disks):
            raise AlreadyExists("disk", disk.name, hint="give it another name")
        shown = vm.spec.disks or tuple(DiskSpec(name=d.name, size=d.size) for d in vm.disks)
        spec = _changed(vm.spec, disks=(*shown, disk))
        if live:
            engine.capabilities().require(Feature.ATTACH_DISK)
        async with house.operations.run("attach", vm.name, [vm.uuid], disk=disk.name) as op:
            made, layer = await make_disk(house, vm.uuid, disk)
            op.intend(layers=[layer.id])
            house.db.put_layer(layer)
            faults.point("attach.made")
            if live:
                await engine.attach_disk(house.running(vm), disk_file(house, made))
                faults.point("attach.attached")
            vm = house.save(vm, disks=(*vm.disks, made), spec=spec)
        house.events.emit("disk.attached", vm, disk=disk.name)
        return vm


async def detach_disk(house: House, ref: str, name: str) -> VmRecord:
    """See `posada.host.machines.Machines.detach_disk`."""
    async with house.hold(ref, "attach") as vm:
        disk = _find_disk(vm, name)
        if vm.disks and vm.disks[0].name == name:
            raise SpecError("disk", f"{name!r} is the root disk", hint="only other disks can be detached")
        async with house.operations.run("detach", vm.name, [vm.uuid], disk=name, layers=list(disk.chain)):
            if vm.state in LIVE:
                engine = house.engine(vm.engine)
                engine.capabilities().require(Feature.ATTACH_DISK)
                await engine.detach_disk(house.running(vm), name)
            faults.point("detach.detached")
            vm = house.save(
                vm,
                disks=tuple(d for d in vm.disks if d.name != name),
                spec=msgspec.structs.replace(vm.spec, disks=tuple(d for d in vm.spec.disks if d.name != name)),
            )
            faults.point("detach.recorded")
            collect(house, disk.chain)
        house.events.emit("disk.detached", vm, disk=name)
        return vm


async def add_port(house: House, ref: str, port: PortSpec) -> PortRecord:
    """See `posada.host.machines.Machines.add_port`."""
    async with house.hold(ref, "attach") as vm:
        if any((p.guest, p.protocol) == (port.guest, port.protocol) for p in vm.spec.ports):
            raise AlreadyExists("port", str(port.guest), hint="remove it first")
        spec = _changed(vm.spec, ports=(*vm.spec.ports, port))
        engine = house.engine(vm.engine)
        engine.capabilities().require(Feature.PORTS)
        bound = PortRecord(guest=port.guest, host=port.host or 0, address=port.address, protocol=port.protocol)
        running = vm.running
        if running is not None:
            bound = await engine.add_port(running, bound)
            running = msgspec.structs.replace(running, ports=(*running.ports, bound))
        house.save(vm, spec=spec, running=running)
        return bound


async def remove_port(house: House, ref: str, guest: int) -> None:
    """See `posada.host.machines.Machines.remove_port`."""
    async with house.hold(ref, "attach") as vm:
        if not any(p.guest == guest for p in vm.spec.ports):
            raise NotFound("port", str(guest), hint=f"posada port {vm.name} lists them")
        running = vm.running
        if running is not None:
            for bound in running.ports:
                if bound.guest == guest:
                    with contextlib.suppress(EngineError):  # gone in the machine: the record follows
                        await house.engine(vm.engine).remove_port(running, bound)
            running = msgspec.structs.replace(running, ports=tuple(p for p in running.ports if p.guest != guest))
        spec = msgspec.structs.replace(vm.spec, ports=tuple(p for p in vm.spec.ports if p.guest != guest))
        house.save(vm, spec=spec, running=running)
