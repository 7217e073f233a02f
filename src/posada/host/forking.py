"""New vms from a running one, from a snapshot, or (clone) from disks alone. Each is another machine than its source.

A fork in order::

    the intent, the children's records (names are taken, state ``starting``)
    the guest holds still          fork.prepare: no process of a child runs before it has its own identity
                                   (not if it is asked for: ``same_identity``)
    the disks grow                 source and children each get an overlay on the layers as they stand
    the engine forks               memory, devices and disks of one instant
    the source goes on
    each child: connect, identity reset (which thaws it), ``running``
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack, nullcontext

import msgspec

from posada.errors import ForkError, SpecError, Unsupported
from posada.host import faults, identity
from posada.host import snapshots as points
from posada.host.capturing import growing, still
from posada.host.creating import forget
from posada.host.house import House, now
from posada.host.launch import build_launch, new_mac
from posada.host.layers import grow, overlay, settle
from posada.host.merging import merge_deep
from posada.host.names import generate
from posada.host.operations import Operation
from posada.host.process import me
from posada.model.capabilities import Feature
from posada.model.machine import MachineSpec, validate
from posada.model.progress import Progress
from posada.model.records import Disk, Running, SnapshotKind, SnapshotRecord, VmRecord
from posada.model.states import State

MAX_CHILDREN = 1000
#: Seconds a child has to answer; it boots nothing, so it is slow only where the host is.
CHILD_TIMEOUT = 60.0


async def fork(
    house: House,
    ref: str,
    n: int,
    *,
    snapshot: str | None,
    names: Sequence[str] | None,
    ephemeral: bool | None,
    same_identity: bool,
    progress: Progress | None,
) -> list[VmRecord]:
    """See `posada.host.machines.Machines.fork`."""
    if not 1 <= n <= MAX_CHILDREN:
        raise SpecError("n", f"{n} children are out of range", hint=f"use 1 to {MAX_CHILDREN}")
    if names is not None and len(names) != n:
        raise SpecError("names", f"{len(names)} names for {n} children")
    async with house.hold(ref, "fork" if snapshot is None else "fork a snapshot of") as vm:
        point = points.find(house, vm, snapshot) if snapshot is not None else None
        if point is not None and point.kind is not SnapshotKind.FULL:
            raise Unsupported(
                vm.engine, f"fork of {point.name!r}, which has no memory", hint="posada clone takes its disks"
            )
        can = house.engine(vm.engine).capabilities()
        can.require(Feature.FORK if point is None else Feature.FORK_SNAPSHOT)
        if not same_identity and not house.has_agent(vm):
            raise Unsupported(
                vm.engine,
                f"fork of {vm.name!r}: its guest has no posada agent, so its copies would share one identity",
                hint="use an image that posada built, or clone it; same_identity=True (--same-identity) if they shall",
            )
        mortal = vm.spec.ephemeral if ephemeral is None else ephemeral
        chosen = list(names) if names is not None else _names(house, n)
        children = [_child(house, vm, point, chosen[i], names is not None, mortal) for i in range(n)]
        return await _fork_held(house, vm, point, children, same_identity, progress)


def _names(house: House, n: int) -> list[str]:
    chosen: list[str] = []
    for _ in range(n):
        chosen.append(generate(lambda name: name in chosen or house.db.has_vm_named(name)))
    return chosen


def _child(
    house: House, vm: VmRecord, point: SnapshotRecord | None, name: str, named: bool, ephemeral: bool
) -> VmRecord:
    """The record of a child: the source's spec, with all that makes an identity its own."""
    spec = _spec(vm.spec if point is None else point.spec, name if named else None, ephemeral)
    return VmRecord(
        uuid=str(uuid.uuid4()),
        name=name,
        spec=spec,
        state=State.CREATED,
        engine=vm.engine,
        image=vm.image,
        macs=tuple(new_mac() for _ in spec.nics),
        created=now(),
        generation=vm.generation + 1,
        parent=vm.uuid,
        owner=me() if spec.ephemeral else None,
    )


def _spec(spec: MachineSpec, name: str | None, ephemeral: bool) -> MachineSpec:
    new = msgspec.structs.replace(
        spec,
        name=name,
        hostname=None,
        ephemeral=ephemeral,
        # A host port belongs to one machine: the children get free ones.
        ports=tuple(msgspec.structs.replace(p, host=None) for p in spec.ports),
        nics=tuple(msgspec.structs.replace(nic, mac=None) for nic in spec.nics),
    )
    validate(new)
    return new


async def _fork_held(
    house: House,
    vm: VmRecord,
    point: SnapshotRecord | None,
    children: list[VmRecord],
    same_identity: bool,
    progress: Progress | None,
) -> list[VmRecord]:
    uuids = [child.uuid for child in children]
    async with AsyncExitStack() as stack:
        for uid in uuids:
            await stack.enter_async_context(house.locks.hold(uid, "fork", new=True))
        op = await stack.enter_async_context(
            house.operations.run("fork", vm.name, [vm.uuid, *uuids], progress, source=vm.uuid, children=uuids)
        )
        op.report(None, f"forking {vm.name}")
        for uid in uuids:
            # Recovery would keep those that are ready; a caller who gets an error, or gave up, wants none.
            op.undo.push_async_callback(remove, house, uid)
        with house.db.transaction():
            for child in children:
                house.db.put_vm(child)
        faults.point("fork.reserved")
        for child in children:
            house.paths.disks(child.uuid).mkdir(mode=0o700, parents=True)
        if point is None:
            children, outcomes, token = await _from_running(house, vm, children, same_identity, op)
        else:
            children, outcomes, token = await _from_snapshot(house, point, children)
        faults.point("fork.forked")
        ready_one = _as_it_is if same_identity else _ready
        readied = await asyncio.gather(
            *(ready_one(house, c, o, token) for c, o in zip(children, outcomes, strict=True)), return_exceptions=True
        )
        ready = [r for r in readied if isinstance(r, VmRecord)]
        failures = {i: r for i, r in enumerate(readied) if not isinstance(r, VmRecord)}
        for i, error in failures.items():
            if not isinstance(error, Exception):
                raise error
            await remove(house, children[i].uuid)
        faults.point("fork.ready")
        op.succeed(vms=[r.uuid for r in ready])
        op.undo.pop_all()
        if failures:
            raise ForkError(
                f"{len(failures)} of {len(children)} forks of {vm.name!r} failed", vms=ready, failures=failures
            )
    return ready


Outcomes = Sequence[Running | Exception]


async def _from_running(
    house: House, vm: VmRecord, children: list[VmRecord], same_identity: bool, op: Operation
) -> tuple[list[VmRecord], Outcomes, bytes | None]:
    engine = house.engine(vm.engine)
    vm = await merge_deep(house, vm, op)
    held = nullcontext(b"") if same_identity else still(house, vm, op)
    async with held as token, growing(house, vm) as growth:
        children = _overlays(house, growth.frozen, children)
        faults.point("fork.grown")
        launches = [build_launch(house, child, boot=False) for child in children]
        forked = await engine.fork(house.running(vm), launches, growth.switch)
        faults.point("fork.switched")
    house.events.emit("vm.forked", vm, children=[c.name for c in children], pause=forked.pause)
    return children, forked.children, token or None


async def _from_snapshot(
    house: House, point: SnapshotRecord, children: list[VmRecord]
) -> tuple[list[VmRecord], Outcomes, bytes | None]:
    children = _overlays(house, point.disks, children)
    faults.point("fork.grown")
    launches = [build_launch(house, child, boot=False) for child in children]
    outcomes = await house.engine(point.engine).restore(launches, points.files(house, point))
    faults.point("fork.switched")
    return children, outcomes, points.token_of(point)


def _overlays(house: House, frozen: Sequence[Disk], children: list[VmRecord]) -> list[VmRecord]:
    """Record each child with its own overlay on the frozen disks, as ``starting``."""
    made: list[VmRecord] = []
    with house.db.transaction():
        for child in children:
            disks = []
            for disk in frozen:
                if not disk.readonly:
                    disk, layer = overlay(house, child.uuid, disk)
                    house.db.put_layer(layer)
                disks.append(disk)
            made.append(house.save(child, disks=tuple(disks), state=State.STARTING))
    return made


async def _as_it_is(house: House, child: VmRecord, outcome: Running | Exception, token: bytes | None) -> VmRecord:
    """Its guest is told nothing, and not asked whether it answers. Raises what went wrong."""
    if isinstance(outcome, Exception):
        raise outcome
    return house.save(child, state=State.RUNNING, running=outcome)


async def _ready(house: House, child: VmRecord, outcome: Running | Exception, token: bytes | None) -> VmRecord:
    """Make the machine that the engine started a machine of its own. Raises what went wrong."""
    if isinstance(outcome, Exception):
        raise outcome
    started = msgspec.structs.replace(child, running=outcome)
    client = await house.guests.connect(started, timeout=CHILD_TIMEOUT)
    if token is None:
        # The source was paused and could not prepare. The child's processes stop now, as early as can be.
        token = uuid.uuid4().bytes
        await client.fork_prepare(token)
    await identity.reset(client, started, token=token, ssh_host_keys=True)
    faults.point("fork.reset")
    return house.save(started, state=State.RUNNING)


async def remove(house: House, uid: str) -> None:
    """Undo a child: its process, its files, its record. Each may be missing."""
    vm = house.db.vm(uid)
    await house.guests.drop(uid)
    if vm is not None:
        engine = house.engine(vm.engine)
        if vm.running is not None:
            await engine.kill(vm.running)
        await engine.abandon(house.paths.machine(uid))
    forget(house, uid)


async def clone(house: House, ref: str, *, name: str | None, snapshot: str | None) -> VmRecord:
    """See `posada.host.machines.Machines.clone`."""
    async with house.hold(ref, "clone" if snapshot is None else "clone a snapshot of") as vm:
        point = points.find(house, vm, snapshot) if snapshot is not None else None
        chosen = name or generate(house.db.has_vm_named)
        child = _child(house, vm, point, chosen, name is not None, False)
        child = msgspec.structs.replace(child, identity_pending=house.has_agent(vm))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(house.locks.hold(child.uuid, "clone", new=True))
            op = await stack.enter_async_context(
                house.operations.run("clone", vm.name, [vm.uuid, child.uuid], source=vm.uuid, children=[child.uuid])
            )
            house.db.put_vm(child)
            house.paths.disks(child.uuid).mkdir(mode=0o700, parents=True)
            faults.point("clone.reserved")
            frozen = vm.disks if point is None else point.disks
            if point is None:
                growth = grow(house, vm)
                settle(growth)
            faults.point("clone.grown")
            with house.db.transaction(durable=True):
                disks = []
                for disk in frozen:
                    if not disk.readonly:
                        disk, layer = overlay(house, child.uuid, disk)
                        house.db.put_layer(layer)
                    disks.append(disk)
                child = house.save(child, disks=tuple(disks))
            op.succeed(vm=child.uuid, name=child.name)
        house.events.emit("vm.created", child, parent=vm.name)
        return child
