"""Snapshots of one vm: a tree of points to return to."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import msgspec

from posada.engine.base import SnapshotFiles
from posada.errors import AlreadyExists, GuestError, InUse, NotFound, SpecError, Unsupported
from posada.host import faults, identity
from posada.host.capturing import growing, still
from posada.host.files import remove_tree, write_atomic
from posada.host.house import House, now
from posada.host.launch import build_launch, refuse_folders
from posada.host.layers import collect, overlay
from posada.host.merging import merge_deep
from posada.model.capabilities import Feature
from posada.model.progress import Progress
from posada.model.records import Disk, LayerRecord, SnapshotKind, SnapshotRecord, VmRecord
from posada.model.states import AT_REST, LIVE, State


def find(house: House, vm: VmRecord, ref: str) -> SnapshotRecord:
    """A snapshot of ``vm`` by name, id, or unique beginning of an id (≥ 4 digits). Raises NotFound."""
    some = house.db.snapshots(vm.uuid)
    exact = [s for s in some if ref in (s.name, s.id)]
    near = [s for s in some if len(ref) >= 4 and s.id.startswith(ref)]
    found = exact or near
    if len(found) != 1:
        raise NotFound("snapshot", ref, hint=f"posada snapshot ls {vm.name} lists those of {vm.name}")
    return found[0]


async def snapshot(
    house: House, ref: str, name: str | None, kind: SnapshotKind | None, progress: Progress | None
) -> SnapshotRecord:
    """See `posada.host.machines.Machines.snapshot`."""
    async with house.hold(ref, "snapshot") as vm:
        rest = vm.state in AT_REST
        kind = kind or (SnapshotKind.DISKS if rest else SnapshotKind.FULL)
        if rest and kind is SnapshotKind.FULL:
            raise Unsupported(
                vm.engine,
                f"a snapshot with memory of a vm that is {vm.state}",
                hint="start it, or take one of its disks",
            )
        taken = {s.name for s in house.db.snapshots(vm.uuid)}
        name = _name(name, taken)
        can = house.engine(vm.engine).capabilities()
        can.require(Feature.SNAPSHOT_FULL if kind is SnapshotKind.FULL else Feature.SNAPSHOT_DISKS)
        if kind is SnapshotKind.FULL:
            refuse_folders(vm, "a snapshot with the memory")
        return await _take(house, vm, name, kind, progress)


def _name(name: str | None, taken: set[str]) -> str:
    if name is None:
        number = len(taken) + 1
        while f"snap-{number}" in taken:
            number += 1
        return f"snap-{number}"
    if not 1 <= len(name) <= 63 or not name.isprintable() or "/" in name or name != name.strip():
        raise SpecError("snapshot", f"{name!r} is not a snapshot name", hint="1–63 printable characters without /")
    if name in taken:
        raise AlreadyExists("snapshot", name, hint="choose another name, or delete that one")
    return name


async def _take(house: House, vm: VmRecord, name: str, kind: SnapshotKind, progress: Progress | None) -> SnapshotRecord:
    engine, id = house.engine(vm.engine), uuid.uuid4().hex
    folder = house.paths.snapshot(vm.uuid, id)
    async with house.operations.run("snapshot", vm.name, [vm.uuid], progress, snapshot=id) as op:
        op.report(None, f"taking {name} of {vm.name}")
        folder.mkdir(mode=0o700, parents=True)
        faults.point("snapshot.directory")
        vm = await merge_deep(house, vm, op)
        pause, memory, private = 0.0, 0, {}
        if kind is SnapshotKind.FULL:
            await _sync(house, vm)
            async with still(house, vm, op) as token, growing(house, vm) as growth:
                faults.point("snapshot.grown")
                capture = await engine.capture(house.running(vm), folder, growth.switch)
                faults.point("snapshot.captured")
            pause, memory = capture.pause, capture.memory_bytes
            private = {"engine": capture.private, "token": token.hex()}
        elif vm.state in LIVE:
            async with _frozen(house, vm), growing(house, vm) as growth:
                faults.point("snapshot.grown")
                pause = await engine.switch(house.running(vm), growth.switch)
                faults.point("snapshot.captured")
        else:
            async with growing(house, vm) as growth:
                faults.point("snapshot.grown")
        record = SnapshotRecord(
            id=id,
            vm=vm.uuid,
            name=name,
            kind=kind,
            spec=vm.spec,
            disks=growth.frozen,
            parent=vm.head,
            path=house.paths.relative(folder),
            created=now(),
            pause=pause,
            memory_bytes=memory,
            engine=vm.engine,
            macs=vm.macs,
            private=private,
        )
        write_atomic(folder / "snapshot.json", msgspec.json.encode(record), durable=True)
        faults.point("snapshot.written")
        with house.db.transaction(durable=True):
            house.db.put_snapshot(record)
            house.save(house.recorded(vm.uuid), head=id)
        op.succeed(snapshot=id, name=name)
    house.events.emit("snapshot.created", vm, snapshot=name, pause=pause)
    return record


async def _sync(house: House, vm: VmRecord) -> None:
    """Have the guest write out what it holds back, so that the snapshot's disks are worth cloning without its memory."""
    if vm.state is State.RUNNING and house.has_agent(vm):
        client = await house.guests.connect(vm, timeout=10.0)
        with contextlib.suppress(GuestError, TimeoutError):
            async with asyncio.timeout(10.0):
                await client.call("sync")


class _frozen:
    """The guest's file systems frozen, where its agent can; the disks are then as after a clean sync."""

    def __init__(self, house: House, vm: VmRecord) -> None:
        self._house, self._vm = house, vm
        self._frozen = False

    async def __aenter__(self) -> None:
        if self._vm.state is State.RUNNING and self._house.has_agent(self._vm):
            client = await self._house.guests.connect(self._vm, timeout=10.0)
            await client.call("freeze")
            self._frozen = True

    async def __aexit__(self, *_: object) -> None:
        if self._frozen:
            client = await self._house.guests.connect(self._vm, timeout=10.0)
            try:
                await client.call("thaw")
            except GuestError:
                pass  # it thaws by itself after 30 s


async def restore(house: House, ref: str, snapshot: str, progress: Progress | None) -> VmRecord:
    """See `posada.host.machines.Machines.restore`."""
    async with house.hold(ref, "restore") as vm:
        point = find(house, vm, snapshot)
        if point.kind is SnapshotKind.FULL:
            return await _restore_full(house, vm, point, progress)
        return await _restore_disks(house, vm, point)


def _onto(house: House, vm: VmRecord, point: SnapshotRecord) -> tuple[VmRecord, list[LayerRecord]]:
    """The record of ``vm`` as it will be on ``point``, and the layers made for it. Nothing is recorded."""
    disks: list[Disk] = []
    fresh: list[LayerRecord] = []
    for disk in point.disks:
        if disk.readonly:
            disks.append(disk)
        else:
            grown, layer = overlay(house, vm.uuid, disk)
            disks.append(grown)
            fresh.append(layer)
    spec = msgspec.structs.replace(
        point.spec,
        name=vm.spec.name,
        labels=vm.spec.labels,
        limits=vm.spec.limits,
        ports=vm.spec.ports,
        hostname=vm.spec.hostname,
        ephemeral=vm.spec.ephemeral,
    )
    return msgspec.structs.replace(vm, spec=spec, disks=tuple(disks), head=point.id), fresh


async def _restore_disks(house: House, vm: VmRecord, point: SnapshotRecord) -> VmRecord:
    if vm.state in LIVE:
        raise Unsupported(
            vm.engine,
            f"going back to the disks of {point.name!r} while the vm is {vm.state}",
            hint=f"stop it first: posada stop {vm.name}",
        )
    before = [id for disk in vm.disks for id in disk.chain]
    async with house.operations.run("restore", vm.name, [vm.uuid], snapshot=point.id, before=before) as op:
        new, fresh = _onto(house, vm, point)
        faults.point("restore.made")
        with house.db.transaction(durable=True):
            for layer in fresh:
                house.db.put_layer(layer)
            house.save(new)
        faults.point("restore.recorded")
        collect(house, before)
        op.succeed(vm=vm.uuid)
    house.events.emit("snapshot.restored", vm, snapshot=point.name)
    return new


async def _restore_full(house: House, vm: VmRecord, point: SnapshotRecord, progress: Progress | None) -> VmRecord:
    engine = house.engine(vm.engine)
    engine.capabilities().require(Feature.RESTORE)
    before = [id for disk in vm.disks for id in disk.chain]
    ports = vm.running.ports if vm.running is not None else ()
    async with house.operations.run("restore", vm.name, [vm.uuid], progress, snapshot=point.id, before=before) as op:
        op.report(None, f"restoring {vm.name} to {point.name}")
        new, fresh = _onto(house, vm, point)
        op.intend(fresh=[layer.id for layer in fresh])
        with house.db.transaction():
            for layer in fresh:
                house.db.put_layer(layer)
        faults.point("restore.made")
        if vm.state in LIVE:
            await house.guests.drop(vm.uuid)
            await engine.kill(house.running(vm))
            engine.reap(house.paths.machine(vm.uuid))
        faults.point("restore.killed")
        house.save(vm, state=State.STARTING, running=None, exit=None)
        new = msgspec.structs.replace(
            new, state=State.STARTING, running=None, exit=None, generation=vm.generation + 1, macs=point.macs or vm.macs
        )
        (outcome,) = await engine.restore([build_launch(house, new, ports=ports, boot=False)], files(house, point))
        if isinstance(outcome, Exception):
            raise outcome
        faults.point("restore.started")
        if house.has_agent(new):
            started = msgspec.structs.replace(new, state=State.RUNNING, running=outcome)
            client = await house.guests.connect(started, timeout=30.0)
            await identity.reset(client, started, token=token_of(point), ssh_host_keys=False)
        faults.point("restore.ready")
        with house.db.transaction(durable=True):
            new = house.save(new, state=State.RUNNING, running=outcome)
        faults.point("restore.recorded")
        collect(house, before)
        op.succeed(vm=vm.uuid)
    house.events.emit("snapshot.restored", new, snapshot=point.name)
    return new


def files(house: House, point: SnapshotRecord) -> SnapshotFiles:
    return SnapshotFiles(
        path=house.paths.absolute(point.path), memory=point.spec.memory, private=dict(point.private.get("engine") or {})
    )


def token_of(point: SnapshotRecord) -> bytes | None:
    text = point.private.get("token")
    return bytes.fromhex(text) if isinstance(text, str) and text else None


async def delete(house: House, ref: str, snapshot: str, *, recursive: bool) -> None:
    """See `posada.host.machines.Machines.delete_snapshot`."""
    async with house.hold(ref, "delete a snapshot of") as vm:
        point = find(house, vm, snapshot)
        family = descendants(house.db.snapshots(vm.uuid), point)
        if family and not recursive:
            raise InUse(
                "snapshot", point.name, [s.name for s in family], hint="delete those first, or all: --recursive"
            )
        doomed = [*reversed(family), point]
        layers = sorted({id for s in doomed for disk in s.disks for id in disk.chain})
        ids = [s.id for s in doomed]
        async with house.operations.run("delete-snapshot", vm.name, [vm.uuid], snapshots=ids, layers=layers):
            finish_delete(house, vm, ids, layers)


def finish_delete(house: House, vm: VmRecord, ids: list[str], layers: list[str]) -> None:
    """Delete these snapshots for good; some may be gone already. With the vm's lock held."""
    for id in ids:
        point = house.db.snapshot(id)
        if point is not None:
            with house.db.transaction():
                house.db.drop_snapshot(id)
                vm = house.recorded(vm.uuid)
                if vm.head == id:
                    house.save(vm, head=point.parent)
            house.events.emit("snapshot.deleted", vm, snapshot=point.name)
        faults.point("delete-snapshot.dropped")
        remove_tree(house.paths.snapshot(vm.uuid, id))
    faults.point("delete-snapshot.files")
    collect(house, layers)


def descendants(some: list[SnapshotRecord], point: SnapshotRecord) -> list[SnapshotRecord]:
    """Those that stand on ``point``, parents before children."""
    found: list[SnapshotRecord] = []
    front = {point.id}
    while front:
        children = [s for s in some if s.parent in front]
        found += children
        front = {s.id for s in children}
    return found
