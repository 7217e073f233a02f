"""What all verbs share: the state, the locks, and one door to a vm (`House.hold`).

A verb's shape::

    async with house.hold(ref, "pause") as vm:      # the lock is held, the state is true and allows the verb
        await house.engine(vm.engine).pause(vm.running)
        house.save(vm, state=State.PAUSED)
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from posada.engine.base import Engine
from posada.engine.registry import load
from posada.errors import HostError, NotFound, PosadaError, StateError
from posada.host.db import Database
from posada.host.events import Events
from posada.host.files import write_atomic
from posada.host.guests import Guests
from posada.host.locks import Locks
from posada.host.operations import Operations
from posada.host.paths import Paths
from posada.host.process import alive
from posada.host.wakeup import Wakeups
from posada.model.records import ImageRecord, OperationRecord, Running, VmRecord
from posada.model.states import AT_REST, LIVE, State, check_transition, require

if TYPE_CHECKING:
    from posada.images.store import ImageStore

log = logging.getLogger(__name__)

#: What `posada.host.rebuild` must find in vm.json as it is.
_REBUILT = frozenset({"disks", "spec", "name", "macs"})

_PREFIX = re.compile(r"[0-9a-f][0-9a-f-]{3,35}")


class House:
    """One open state directory. Everything the verbs need; nothing of it knows what a verb is."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.db = Database(paths.database)
        self.locks = Locks(paths.locks, self._exists)
        wakeups = Wakeups(paths.listeners)
        self.events = Events(self.db, wakeups)
        self.operations = Operations(self.db, self.events, wakeups, self._clean_up)
        self.guests = Guests(self)
        self._images: ImageStore | None = None
        self._background: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        await self.guests.close()
        await self.operations.close()
        self.db.close()

    @property
    def images(self) -> ImageStore:
        if self._images is None:
            from posada.images.store import ImageStore

            self._images = ImageStore(self.paths.images, self.db)
        return self._images

    def engine(self, name: str) -> Engine:
        return load(name)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Run something that nobody waits for before `close`. Its failure is left to the next who looks."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    async def _clean_up(self, op: OperationRecord) -> None:
        from posada.host import recovery

        await recovery.settle(self, op)

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("%s: %s", task.get_name(), task.exception())

    # finding

    def find(self, ref: str) -> VmRecord:
        """The vm of that name, uuid, or unique beginning of a uuid (≥ 4 digits), as stored. Raises NotFound."""
        found = self.db.vm_named(ref) or self.db.vm(ref)
        if found is not None:
            return found
        if _PREFIX.fullmatch(ref):
            some = self.db.vms_with_prefix(ref)
            if len(some) == 1:
                return some[0]
            if some:
                raise NotFound("vm", ref, hint="several uuids begin like that: write more of it")
        raise NotFound("vm", ref, hint="posada ps -a lists them")

    def image_of(self, vm: VmRecord) -> ImageRecord | None:
        """Raises StateError when the image is gone."""
        if vm.image is None:
            return None
        image = self.db.image(vm.image)
        if image is None:
            raise StateError(f"vm {vm.name!r} stands on image {vm.image[:12]}, which is gone", hint="rebuild the image")
        return image

    def has_agent(self, vm: VmRecord) -> bool:
        """Posada's agent runs in the guest: its image has it, and boots by the image's own kernel and initrd."""
        image = self.image_of(vm)
        return image is not None and image.agent and vm.spec.boot.kernel is None and vm.spec.boot.initrd is None

    # the state of one vm

    def save(self, vm: VmRecord, **changes: Any) -> VmRecord:
        """Store the changed record, and vm.json beside the disks. Raises InvalidState for a forbidden change.

        A vm.json that cannot be written (a full disk) is an error only where a rebuild would miss what changed.
        """
        new = msgspec.structs.replace(vm, **changes)
        check_transition(vm.name, vm.state, new.state)
        self.db.put_vm(new)
        try:
            self.write_json(new)
        except HostError as error:
            if self.paths.vm(vm.uuid).is_dir() and not _REBUILT.isdisjoint(changes):
                raise
            log.warning("%s", error)
        if new.state is not vm.state:
            self.events.emit(
                f"vm.{new.state}", new, **({"exit": new.exit} if new.exit and new.state in AT_REST else {})
            )
        return new

    def write_json(self, vm: VmRecord) -> None:
        plain = msgspec.structs.replace(vm, running=None)
        write_atomic(self.paths.vm_json(vm.uuid), msgspec.json.encode(plain))

    def _exists(self, uuid: str) -> bool:
        """Whether there is such a vm; when in doubt, yes."""
        try:
            return self.db.vm(uuid) is not None
        except PosadaError:
            return True

    def refresh(self, vm: VmRecord) -> VmRecord:
        """The record as it truly is: a vm whose process ended is stored as stopped or crashed. Never waits."""
        if vm.state not in LIVE:
            return vm
        if vm.running is not None and vm.state in (State.RUNNING, State.PAUSED):
            status = self.engine(vm.engine).status(vm.running)
            if status.alive and not (status.paused and vm.state is State.RUNNING):
                return vm
            if not status.alive and alive(vm.running.keeper):
                return vm  # it has just ended; its keeper is about to write down how
        with self.locks.attempt(vm.uuid, "refresh") as held:
            if not held or self.interrupted(vm.uuid):
                return vm
            current = self.db.vm(vm.uuid)
            return vm if current is None else self.refresh_held(current)

    def refresh_held(self, vm: VmRecord) -> VmRecord:
        """As `refresh`, with the lock held and no operation open: whatever the state says is not being worked on."""
        if vm.state not in LIVE or vm.running is None:
            return vm
        engine = self.engine(vm.engine)
        status = engine.status(vm.running)
        if status.alive:
            if vm.state in (State.STARTING, State.STOPPING):  # whoever was at it is dead; the machine is not
                vm = self.save(vm, state=State.RUNNING)
            if status.paused and vm.state is State.RUNNING:
                vm = self.save(vm, state=State.PAUSED)
            return vm
        engine.reap(self.paths.machine(vm.uuid))
        self.guests.forget(vm.uuid)
        state = State.CRASHED if status.crashed else State.STOPPED
        return self.save(vm, state=state, running=None, exit=status.ended or "ended")

    async def _see_it_out(self, vm: VmRecord) -> None:
        """If its process has just ended, wait for its keeper to write down how: milliseconds."""
        if vm.running is not None and alive(vm.running.keeper):
            engine = self.engine(vm.engine)
            if not engine.status(vm.running).alive:
                await engine.wait(vm.running, timeout=10.0)

    def interrupted(self, uuid: str) -> list[OperationRecord]:
        """Open operations on this vm that nobody works on any more."""
        open = self.db.open_operations()
        return [op for op in open if uuid in op.intent.get("vms", ()) and self.operations.interrupted(op)]

    @asynccontextmanager
    async def hold(self, ref: str, verb: str, *, check: bool = True) -> AsyncIterator[VmRecord]:
        """Hold the vm's lock. Yields its true record, whose state allows ``verb`` (unless ``check`` is off).

        What a dead process left undone on it is finished or rolled back first. Raises NotFound, Busy, InvalidState.
        """
        from posada.host import recovery

        uuid = self.find(ref).uuid
        while True:
            for op in self.interrupted(uuid):
                await recovery.recover_operation(self, op.id)
            async with self.locks.hold(uuid, verb):
                if self.interrupted(uuid):  # it died while we waited for the lock
                    continue
                vm = self.db.vm(uuid)
                if vm is None:
                    raise NotFound("vm", ref, hint="it has been deleted meanwhile")
                await self._see_it_out(vm)
                vm = self.refresh_held(vm)
                if vm.state in LIVE and vm.running is None:
                    await self.engine(vm.engine).abandon(self.paths.machine(uuid))
                    vm = self.save(vm, state=State.STOPPED, exit="its start was interrupted")
                if check:
                    require(vm.name, verb, vm.state)
                yield vm
                return

    def running(self, vm: VmRecord) -> Running:
        """How to reach it. Raises StateError for a record that has lost it."""
        if vm.running is None:
            raise StateError(f"vm {vm.name!r} is {vm.state} but nothing is known of its process", hint="posada recover")
        return vm.running

    def touch(self, uuid: str) -> None:
        """Tell the idle timeout that the vm is in use."""
        try:
            self.paths.activity(uuid).touch()
        except OSError:
            pass  # the machine has just ended; there is no timeout to tell

    def recorded(self, uuid: str) -> VmRecord:
        """The record as it is now. Raises NotFound."""
        vm = self.db.vm(uuid)
        if vm is None:
            raise NotFound("vm", uuid)
        return vm


def now() -> float:
    return time.time()
