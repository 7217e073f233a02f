"""What a dead process left undone: finished, or rolled back, by whoever opens the state next.

Each kind of operation has one handler below. It runs with the locks of all the operation's vms held, finds out from the
records how far the action came, and leaves either all of it or nothing. The living use the same handlers when an action
fails half-way (`posada.host.operations`). Handlers may themselves be killed at any
instant: each step is one that can be done again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import msgspec

from posada.errors import EngineError, PosadaError, StateError
from posada.host import creating, forking, snapshots
from posada.host.files import remove_tree
from posada.host.house import House, now
from posada.host.layers import collect, sweep
from posada.host.process import NOBODY, boot_id
from posada.model.records import OperationRecord, OperationState, VmRecord
from posada.model.states import LIVE, State

#: Seconds that a guest gets to be told to go on; one that cannot be reached does so by itself after 30 s.
WAKE_TIMEOUT = 2.0

log = logging.getLogger(__name__)


class RecoverReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `recover` did."""

    finished: tuple[str, ...] = ()
    """Operations carried to their end, in words."""
    undone: tuple[str, ...] = ()
    """Operations rolled back, in words."""
    rebuilt: tuple[str, ...] = ()
    """Names of the vms that a rebuild found."""
    problems: tuple[str, ...] = ()
    """What could not be put right, and why."""

    def merge(self, other: RecoverReport) -> RecoverReport:
        """Both."""
        return RecoverReport(
            finished=self.finished + other.finished,
            undone=self.undone + other.undone,
            rebuilt=self.rebuilt + other.rebuilt,
            problems=self.problems + other.problems,
        )


async def recover(house: House) -> RecoverReport:
    """Every open operation whose owner is dead. One that cannot be recovered now is reported, and stays."""
    finished: list[str] = []
    undone: list[str] = []
    problems: list[str] = []
    for op in house.db.open_operations():
        if not house.operations.interrupted(op):
            continue
        words = f"{op.kind} of {op.target}"
        try:
            outcome = await recover_operation(house, op.id, timeout=5.0)
        except (PosadaError, OSError) as error:
            log.warning("recovering the %s failed: %s", words, error)
            problems.append(f"{words}: {error}")
        else:
            if outcome is not None:
                (finished if outcome is OperationState.DONE else undone).append(words)
    return RecoverReport(finished=tuple(finished), undone=tuple(undone), problems=tuple(problems))


async def recover_operation(house: House, id: str, *, timeout: float = 30.0) -> OperationState | None:
    """Recover one. Returns what became of it, or None when somebody else was faster. Raises PosadaError."""
    op = house.db.operation(id)
    if op is None:
        return None
    async with AsyncExitStack() as stack:
        # In order, as everybody who takes several locks of vms that others know.
        for uid in sorted(set(op.intent.get("vms", ()))):
            await stack.enter_async_context(house.locks.hold(uid, f"recover {op.kind}", timeout=timeout))
        op = house.db.operation(id)
        if op is None or not house.operations.interrupted(op):
            return None
        done = await settle(house, op)
        state = OperationState.DONE if done else OperationState.FAILED
        error = None if done else "interrupted, and rolled back"
        house.db.put_operation(msgspec.structs.replace(op, state=state, error=error, updated=now()))
        house.events.emit("operation.recovered", None, id=op.id, kind=op.kind, target=op.target, done=done)
        return state


async def settle(house: House, op: OperationRecord) -> bool:
    """Leave all of a broken operation (True) or nothing of it (False). With the locks of its vms held."""
    handler = _HANDLERS.get(op.kind)
    if handler is None:
        raise StateError(f"operation {op.id} is a {op.kind}, of which this posada knows nothing", hint="upgrade posada")
    done = await handler(house, op)
    collect(house, op.intent.get("merged", ()))
    for uid in op.intent["vms"]:
        vm = house.db.vm(uid)
        if vm is not None:
            sweep(house, vm)
    return done


# Handlers: True when the operation is finished, False when it is rolled back.


async def _create(house: House, op: OperationRecord) -> bool:
    for uid in op.intent["vms"]:
        creating.forget(house, uid)
    return False


async def _delete(house: House, op: OperationRecord) -> bool:
    for uid in op.intent["vms"]:
        vm = house.db.vm(uid)
        if vm is not None:
            await creating.finish_delete(house, vm)
        else:
            creating.forget(house, uid)
    collect(house, op.intent.get("layers", ()))
    return True


async def _start(house: House, op: OperationRecord) -> bool:
    vm = _the_vm(house, op)
    if vm is None or vm.state is not State.STARTING:
        return True
    await house.engine(vm.engine).abandon(house.paths.machine(vm.uuid))
    never_ran = op.intent.get("before") == State.CREATED.value
    if never_ran:
        house.save(vm, state=State.CREATED, running=None)
    else:
        house.save(vm, state=State.STOPPED, running=None, exit=_how("start", op))
    return False


async def _snapshot(house: House, op: OperationRecord) -> bool:
    id, vm = op.intent.get("snapshot"), _the_vm(house, op)
    await _wake(house, vm, op)
    if vm is None or id is None or house.db.snapshot(id) is not None:
        return True
    remove_tree(house.paths.snapshot(vm.uuid, id))
    return False


async def _restore(house: House, op: OperationRecord) -> bool:
    vm = _the_vm(house, op)
    done = vm is not None and vm.state is not State.STARTING and vm.head == op.intent.get("snapshot")
    if vm is not None and vm.state is State.STARTING:
        await house.engine(vm.engine).abandon(house.paths.machine(vm.uuid))
        house.save(vm, state=State.STOPPED, running=None, exit=_how("restore", op))
    collect(house, [*op.intent.get("before", ()), *op.intent.get("fresh", ())])
    return done


async def _fork(house: House, op: OperationRecord) -> bool:
    source = house.db.vm(op.intent["source"])
    await _wake(house, source, op)
    done = True
    for uid in op.intent["children"]:
        child = house.db.vm(uid)
        if child is None or child.state in (State.CREATED, State.STARTING):
            await forking.remove(house, uid)
            done = False
    return done


async def _clone(house: House, op: OperationRecord) -> bool:
    for uid in op.intent["children"]:
        creating.forget(house, uid)
    return False


async def _delete_snapshot(house: House, op: OperationRecord) -> bool:
    vm = _the_vm(house, op)
    if vm is not None:
        snapshots.finish_delete(house, vm, op.intent["snapshots"], op.intent["layers"])
    return True


async def _attach(house: House, op: OperationRecord) -> bool:
    vm, name = _the_vm(house, op), op.intent["disk"]
    if vm is None or any(d.name == name for d in vm.disks):
        return vm is not None
    if vm.running is not None:
        with contextlib.suppress(EngineError, TimeoutError):
            await house.engine(vm.engine).detach_disk(vm.running, name)
    collect(house, op.intent.get("layers", ()))
    return False


async def _detach(house: House, op: OperationRecord) -> bool:
    vm, name = _the_vm(house, op), op.intent["disk"]
    if vm is not None and vm.running is not None:
        with contextlib.suppress(EngineError, TimeoutError):
            await house.engine(vm.engine).detach_disk(vm.running, name)
    if vm is not None and any(d.name == name for d in vm.disks):
        specs = tuple(d for d in vm.spec.disks if d.name != name)
        house.save(
            vm,
            disks=tuple(d for d in vm.disks if d.name != name),
            spec=msgspec.structs.replace(vm.spec, disks=specs),
        )
    collect(house, op.intent.get("layers", ()))
    return True


_HANDLERS: dict[str, Callable[[House, OperationRecord], Awaitable[bool]]] = {
    "create": _create,
    "delete": _delete,
    "start": _start,
    "snapshot": _snapshot,
    "restore": _restore,
    "fork": _fork,
    "clone": _clone,
    "delete-snapshot": _delete_snapshot,
    "attach": _attach,
    "detach": _detach,
}


def _how(what: str, op: OperationRecord) -> str:
    return f"its {what} failed: {op.error}" if op.error else f"its {what} was interrupted"


def _the_vm(house: House, op: OperationRecord) -> VmRecord | None:
    return house.db.vm(op.intent["vms"][0])


async def _wake(house: House, vm: VmRecord | None, op: OperationRecord) -> None:
    """A source that was left standing still, in its engine or in its agent, goes on."""
    if vm is None or vm.running is None or vm.state is not State.RUNNING:
        return
    engine = house.engine(vm.engine)
    if not engine.status(vm.running).alive:
        return
    with contextlib.suppress(PosadaError):
        await engine.resume(vm.running)
        token = op.intent.get("token")
        if token:
            client = await house.guests.connect(vm, timeout=WAKE_TIMEOUT)
            await client.fork_done(bytes.fromhex(token))


def bury_earlier_boot(house: House) -> None:
    """After a reboot of the host no recorded process is alive, whatever runs under its pid now."""
    boot = boot_id()
    if house.db.meta("boot") == boot:
        return
    with house.db.transaction():
        if house.db.meta("boot") == boot:
            return
        operations = house.db.open_operations()
        working = {uid for op in operations for uid in op.intent.get("vms", ())}
        for op in operations:
            house.db.put_operation(msgspec.structs.replace(op, owner=NOBODY))
        for vm in house.db.vms():
            if vm.owner is not None:
                vm = msgspec.structs.replace(vm, owner=NOBODY)
                house.db.put_vm(vm)
            if vm.state not in LIVE:
                continue
            vm = msgspec.structs.replace(vm, running=None)
            if vm.uuid in working:
                house.db.put_vm(vm)
            else:
                house.save(vm, state=State.CRASHED, exit="the host was restarted")
        house.db.set_meta("boot", boot)


def check_runtime(house: House) -> None:
    """One state directory has one runtime directory: the locks are there. Raises StateError when it moved under us."""
    here, known = str(house.paths.runtime), house.db.meta("runtime")
    if known == here:
        return
    if known is not None and any(vm.state in LIVE for vm in house.db.vms()):
        raise StateError(
            f"{house.paths.home} has running machines, whose runtime directory is {known}, not {here}",
            hint=f"set POSADA_RUNTIME={known}",
        )
    house.db.set_meta("runtime", here)
