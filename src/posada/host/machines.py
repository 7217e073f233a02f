"""Every verb on machines. ``ref`` is a vm's name, its uuid, or a unique beginning of it (≥ 4 digits).

This is the table of contents; each verb's work is in the module it names. All raise NotFound for a ref that is none,
Busy when another process holds the vm for too long, and InvalidState, with what to do, in a state that forbids it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posada.engine.base import Inspection, Usage
from posada.errors import GuestGone, NotFound
from posada.host.house import House
from posada.host.process import alive
from posada.model.capabilities import Feature
from posada.model.machine import DiskSpec, MachineSpec, PortSpec, validate
from posada.model.progress import Progress
from posada.model.records import PortRecord, SnapshotKind, SnapshotRecord, VmRecord
from posada.model.states import AT_REST, LIVE, State, require

if TYPE_CHECKING:
    from posada.guest.client import GuestClient
    from posada.guest.process import GuestProcess
    from posada.model.exec import ExecResult


# `list` is a verb below; inside the class its name is not the type's.
Vms = list[VmRecord]
Snapshots = list[SnapshotRecord]
Ports = list[PortRecord]


class Machines:
    """The machines of one host."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._reaping: set[str] = set()
        self._recovering = False

    # looking

    def get(self, ref: str) -> VmRecord:
        """The record as it truly is now: a machine whose process has ended is stored as stopped or crashed here."""
        self._recover_soon()
        vm = self._house.refresh(self._house.find(ref))
        if self._doomed(vm):
            self._reap_soon(vm)
            raise NotFound("vm", ref, hint="it was ephemeral, and has ended")
        return vm

    def list(self, *, labels: Mapping[str, str] = {}) -> list[VmRecord]:
        """All, by name; those with all of ``labels``. Ephemeral ones that have ended are not shown any more."""
        self._recover_soon()
        shown: list[VmRecord] = []
        for vm in self._house.db.vms():
            if labels and any(vm.spec.labels.get(k) != v for k, v in labels.items()):
                continue
            vm = self._house.refresh(vm) if vm.state in LIVE else vm
            if self._doomed(vm):
                self._reap_soon(vm)
            else:
                shown.append(vm)
        return shown

    def _doomed(self, vm: VmRecord) -> bool:
        """Ephemeral, and its owner is dead or it has ended; or its deletion was cut short."""
        if vm.state is State.DELETING:
            return not any(vm.uuid in op.intent.get("vms", ()) for op in self._house.db.open_operations())
        return vm.owner is not None and ((vm.exit is not None and vm.state in AT_REST) or not alive(vm.owner))

    def _reap_soon(self, vm: VmRecord) -> None:
        if vm.uuid not in self._reaping:
            self._reaping.add(vm.uuid)
            self._house.spawn(self._reap(vm.uuid), f"reap {vm.name}")

    def _recover_soon(self) -> None:
        """For processes that stay open for long: what another left undone meanwhile is put right by who looks."""
        if not self._recovering and any(map(self._house.operations.interrupted, self._house.db.open_operations())):
            self._recovering = True
            self._house.spawn(self._recover(), "recover")

    async def _recover(self) -> None:
        from posada.host import recovery

        try:
            await recovery.recover(self._house)
        finally:
            self._recovering = False

    async def _reap(self, uuid: str) -> None:
        from posada.host.lifecycle import reap_ephemeral

        try:
            await reap_ephemeral(self._house, uuid)
        finally:
            self._reaping.discard(uuid)

    async def reap(self) -> None:
        """Delete the ephemeral vms that have ended or whose owner is dead."""
        for vm in self._house.db.ephemeral_vms():
            if self._doomed(self._house.refresh(vm)):
                self._reap_soon(vm)

    # life: lifecycle.py, creating.py

    async def create(self, spec: MachineSpec, *, progress: Progress | None = None) -> VmRecord:
        """Make a vm; it does not run yet. Its image is built if it is missing. A name is found when the spec has none.

        On failure or cancellation nothing is left. Raises SpecError, Unsupported, AlreadyExists, ImageError, HostError.
        """
        from posada.host.creating import create

        return await create(self._house, spec, progress)

    async def start(self, ref: str, *, progress: Progress | None = None) -> VmRecord:
        """Power it on. Returns once its vcpus run. On failure it is as before. Raises EngineError, HostError."""
        from posada.host.lifecycle import start

        return await start(self._house, ref, progress)

    async def wait_ready(self, ref: str, *, timeout: float | None = 60.0) -> None:
        """Wait until the guest's agent has answered.

        Raises GuestGone, with the console's last lines, as soon as the machine ends; Timeout after ``timeout`` seconds;
        Unsupported for a guest without agent.
        """
        from posada.host.lifecycle import wait_ready

        await wait_ready(self._house, ref, timeout)

    async def stop(self, ref: str, *, timeout: float = 30.0, force: bool = True) -> VmRecord:
        """Ask the guest to power off; end it after ``timeout`` seconds if ``force``, else raise Timeout."""
        from posada.host.lifecycle import stop

        return await stop(self._house, ref, timeout=timeout, force=force)

    async def kill(self, ref: str) -> VmRecord:
        """End it now, as if the power went. A machine that has ended already is fine."""
        from posada.host.lifecycle import kill

        return await kill(self._house, ref)

    async def pause(self, ref: str) -> VmRecord:
        from posada.host.lifecycle import pause

        return await pause(self._house, ref)

    async def resume(self, ref: str) -> VmRecord:
        from posada.host.lifecycle import resume

        return await resume(self._house, ref)

    async def restart(
        self, ref: str, *, timeout: float = 30.0, force: bool = True, progress: Progress | None = None
    ) -> VmRecord:
        """Stop, then start, with nobody between."""
        from posada.host.lifecycle import restart

        return await restart(self._house, ref, timeout=timeout, force=force, progress=progress)

    async def wait(self, ref: str, *, timeout: float | None = None) -> VmRecord:
        """Wait until it does not run; its record then, whose ``exit`` says how it ended. Raises Timeout."""
        from posada.host.lifecycle import wait

        return await wait(self._house, ref, timeout)

    async def delete(self, ref: str, *, force: bool = False) -> None:
        """Delete it with its disks and snapshots. ``force``: end it first if it runs."""
        from posada.host.creating import delete

        await delete(self._house, ref, force=force)

    async def keep(self, ref: str) -> VmRecord:
        """Make an ephemeral vm an ordinary one: it outlives its maker, and its own stop."""
        from posada.host.lifecycle import keep

        return await keep(self._house, ref)

    async def rename(self, ref: str, name: str) -> VmRecord:
        """Give it another name; the guest keeps its host name until it boots. Raises AlreadyExists, SpecError."""
        import msgspec

        async with self._house.hold(ref, "rename") as vm:
            spec = msgspec.structs.replace(vm.spec, name=name)
            validate(spec)
            new = self._house.save(vm, name=name, spec=spec)
            self._house.events.emit("vm.renamed", new, old=vm.name)
            return new

    # inside the guest

    async def guest(self, ref: str) -> GuestClient:
        """The connection to its agent, kept for the next caller. Raises Unsupported, GuestGone, Timeout."""
        from posada.host.identity import reset_pending

        vm = self._house.find(ref)
        if vm.state is not State.RUNNING:
            vm = self.get(ref)
            require(vm.name, "exec", vm.state)
        client = await self._house.guests.connect(vm)
        if vm.identity_pending:
            await reset_pending(self._house, vm.uuid)
        self._house.touch(vm.uuid)
        return client

    async def exec(self, ref: str, argv: Sequence[str], **options: Any) -> GuestProcess:
        """Start a command; see `posada.guest.client.GuestClient.exec` for the options."""
        return await (await self.guest(ref)).exec(argv, **options)

    async def run(self, ref: str, argv: Sequence[str], **options: Any) -> ExecResult:
        """Run a command to its end; see `posada.guest.client.GuestClient.run` for the options.

        Raises GuestGone, with how the machine ended and its console's last lines, if it does meanwhile.
        """
        guest = await self.guest(ref)
        try:
            return await guest.run(argv, **options)
        except GuestGone as error:
            raise await self._house.guests.explain(self._house.find(ref), error) from error

    # points in time, and copies: snapshots.py, forking.py

    async def snapshot(
        self,
        ref: str,
        name: str | None = None,
        *,
        kind: SnapshotKind | None = None,
        progress: Progress | None = None,
    ) -> SnapshotRecord:
        """A point to return to. ``kind`` None: with memory if it runs, disks only if not."""
        from posada.host import snapshots

        return await snapshots.snapshot(self._house, ref, name, kind, progress)

    def snapshots(self, ref: str) -> Snapshots:
        """Oldest first; ``parent`` makes the tree."""
        return self._house.db.snapshots(self._house.find(ref).uuid)

    async def restore(self, ref: str, snapshot: str, *, progress: Progress | None = None) -> VmRecord:
        """Return to a snapshot, in place: same uuid, name and ports. What came after it and has no snapshot is lost.

        With memory, the machine runs when this returns; what ran before is ended first. If it fails the vm is stopped,
        on the disks it had. Returning to a snapshot of disks needs a vm that does not run.
        """
        from posada.host import snapshots

        return await snapshots.restore(self._house, ref, snapshot, progress)

    async def delete_snapshot(self, ref: str, snapshot: str, *, recursive: bool = False) -> None:
        """Raises InUse, which names them, when other snapshots stand on it and ``recursive`` is off."""
        from posada.host import snapshots

        await snapshots.delete(self._house, ref, snapshot, recursive=recursive)

    async def fork(
        self,
        ref: str,
        n: int = 1,
        *,
        snapshot: str | None = None,
        names: Sequence[str] | None = None,
        ephemeral: bool | None = None,
        same_identity: bool = False,
        progress: Progress | None = None,
    ) -> Vms:
        """``n`` new machines from a running one, or from a snapshot with memory: running, ready, with new identities.

        ``same_identity``: no guest is stopped, told or asked anything, and none needs an agent; what copies that believe
        to be one machine do to each other is the caller's to know (docs/hazards.md).
        Forwarded ports get free host ports. ``ephemeral`` None: as the source. Raises ForkError, whose ``.vms`` holds
        the survivors, when some children failed.
        """
        from posada.host import forking

        return await forking.fork(
            self._house,
            ref,
            n,
            snapshot=snapshot,
            names=names,
            ephemeral=ephemeral,
            same_identity=same_identity,
            progress=progress,
        )

    async def clone(self, ref: str, *, name: str | None = None, snapshot: str | None = None) -> VmRecord:
        """A new vm, not running, from the disks of one at rest or of a snapshot; its identity too is new."""
        from posada.host import forking

        return await forking.clone(self._house, ref, name=name, snapshot=snapshot)

    # hardware: hardware.py

    async def resize(
        self, ref: str, *, cpus: int | None = None, memory: int | None = None, disk: tuple[str, int] | None = None
    ) -> VmRecord:
        """Sizes in bytes; ``disk`` is (name, new size), and only grows. Running: no cpus, memory only downwards."""
        from posada.host import hardware

        return await hardware.resize(self._house, ref, cpus=cpus, memory=memory, disk=disk)

    async def attach_disk(self, ref: str, disk: DiskSpec) -> VmRecord:
        from posada.host import hardware

        return await hardware.attach_disk(self._house, ref, disk)

    async def detach_disk(self, ref: str, name: str) -> VmRecord:
        """Detach it; its data is deleted unless a snapshot has it."""
        from posada.host import hardware

        return await hardware.detach_disk(self._house, ref, name)

    async def add_port(self, ref: str, port: PortSpec) -> PortRecord:
        """Forward a host port; host 0 in the result of a vm that does not run: chosen when it starts."""
        from posada.host import hardware

        return await hardware.add_port(self._house, ref, port)

    async def remove_port(self, ref: str, guest: int) -> None:
        from posada.host import hardware

        await hardware.remove_port(self._house, ref, guest)

    def ports(self, ref: str) -> Ports:
        """The forwarded ports as they are bound; host 0 for those of a vm that does not run and that names none."""
        vm = self.get(ref)
        if vm.running is not None:
            return [*vm.running.ports]
        return [PortRecord(p.guest, p.host or 0, p.address, p.protocol) for p in vm.spec.ports]

    # watching

    def console(self, ref: str) -> Path:
        """The unix socket of its serial console."""
        vm = self.get(ref)
        require(vm.name, "console", vm.state)
        self._house.touch(vm.uuid)
        return self._house.engine(vm.engine).console(self._house.running(vm))

    def log(self, ref: str) -> Path:
        """The file its console is written to; it may not be there yet."""
        return self._house.paths.log(self._house.find(ref).uuid)

    async def inspect(self, ref: str, *, registers: bool = False) -> Inspection:
        """What is inside a running machine: counters, and with ``registers`` what its processors do."""
        vm = self.get(ref)
        require(vm.name, "inspect", vm.state)
        engine = self._house.engine(vm.engine)
        engine.capabilities().require(Feature.INSPECT)
        return await engine.inspect(self._house.running(vm), registers=registers)

    async def debug(self, ref: str, listener: int) -> None:
        """Let gdb attach to a running machine through a listening socket, which stays the caller's."""
        vm = self.get(ref)
        require(vm.name, "debug", vm.state)
        engine = self._house.engine(vm.engine)
        engine.capabilities().require(Feature.DEBUG)
        await engine.debug(self._house.running(vm), listener)

    def usage(self, ref: str) -> Usage:
        """What it uses of the host now; nothing when it does not run."""
        vm = self.get(ref)
        if vm.running is None:
            return Usage(cpu_seconds=0.0, rss=0)
        return self._house.engine(vm.engine).usage(vm.running)
