"""Start, stop, kill, pause, resume, wait."""

from __future__ import annotations

import asyncio
import contextlib
import time

import msgspec

from posada.engine.base import Status
from posada.errors import GuestError, NotFound, PosadaError, Timeout
from posada.host import creating, faults
from posada.host.guests import console_tail
from posada.host.house import House
from posada.host.identity import reset_pending
from posada.host.launch import build_launch
from posada.model.capabilities import Feature
from posada.model.progress import Progress
from posada.model.records import VmRecord
from posada.model.states import AT_REST, LIVE, State, require

#: Seconds that a forced stop gives the guest's own power off once asked by the agent or ACPI.
STOP_TIMEOUT = 30.0


async def start(house: House, ref: str, progress: Progress | None = None) -> VmRecord:
    async with house.hold(ref, "start") as vm:
        return await start_held(house, vm, progress)


async def start_held(house: House, vm: VmRecord, progress: Progress | None = None) -> VmRecord:
    engine = house.engine(vm.engine)
    before = vm.state
    async with house.operations.run("start", vm.name, [vm.uuid], progress, before=before.value) as op:
        op.report(None, f"starting {vm.name}")
        launch = build_launch(house, vm)
        vm = house.save(vm, state=State.STARTING, exit=None)
        faults.point("start.marked")
        running = await engine.start(launch)
        faults.point("start.started")
        vm = house.save(vm, state=State.RUNNING, running=running)
        op.succeed(vm=vm.uuid)
    return vm


async def wait_ready(house: House, ref: str, timeout: float | None = 60.0) -> None:
    """See `posada.host.machines.Machines.wait_ready`."""
    vm = house.refresh(house.find(ref))
    if vm.state is not State.RUNNING:
        if vm.state in AT_REST and vm.exit is not None:
            raise house.guests.gone(vm, vm.exit)
        require(vm.name, "exec", vm.state)
    try:
        await house.guests.connect(vm, timeout=timeout)
    except Timeout as error:
        tail = console_tail(house.paths.log(vm.uuid))
        raise Timeout(
            f"vm {vm.name!r} was not ready within {timeout:g} s"
            + (f"; its console says last:\n{tail}" if tail else ""),
            hint=f"see posada logs {vm.name}, or wait longer",
        ) from error
    await reset_pending(house, vm.uuid)
    house.touch(vm.uuid)


async def stop(house: House, ref: str, *, timeout: float = STOP_TIMEOUT, force: bool = True) -> VmRecord:
    async with house.hold(ref, "stop") as vm:
        vm = await stop_held(house, vm, timeout=timeout, force=force)
        return await _after_end(house, vm)


async def stop_held(house: House, vm: VmRecord, *, timeout: float, force: bool) -> VmRecord:
    engine, running, before = house.engine(vm.engine), house.running(vm), vm.state
    vm = house.save(vm, state=State.STOPPING)
    try:
        if before is State.PAUSED:
            await engine.resume(running)  # a guest that stands still cannot power itself off
        await _ask(house, vm)
        try:
            status = await engine.wait(running, timeout)
        except Timeout as error:
            if not force:
                raise Timeout(
                    f"vm {vm.name!r} did not power off within {timeout:g} s", hint=f"end it with: posada kill {vm.name}"
                ) from error
            await engine.kill(running)
            status = Status(alive=False, ended=f"killed: it did not power off within {timeout:g} s")
    except BaseException:
        if engine.status(running).alive:
            house.save(vm, state=State.RUNNING)
        raise
    return await ended(house, vm, status)


async def _ask(house: House, vm: VmRecord) -> None:
    """Ask for a power off: the agent where it answers at once, ACPI where there is none."""
    engine = house.engine(vm.engine)
    if house.has_agent(vm):
        with contextlib.suppress(GuestError, Timeout, PosadaError):
            client = await house.guests.connect(vm, timeout=5.0)
            with contextlib.suppress(GuestError, TimeoutError):  # it may go before it replies
                async with asyncio.timeout(5.0):
                    await client.call("poweroff")
            return
    await engine.powerdown(house.running(vm))


async def ended(house: House, vm: VmRecord, status: Status) -> VmRecord:
    """Store how a machine ended, and clear its runtime directory. With its lock held."""
    await house.guests.drop(vm.uuid)
    house.engine(vm.engine).reap(house.paths.machine(vm.uuid))
    state = State.CRASHED if status.crashed else State.STOPPED
    return house.save(vm, state=state, running=None, exit=status.ended or "ended")


async def _after_end(house: House, vm: VmRecord) -> VmRecord:
    """An ephemeral vm is deleted when it stops."""
    if vm.owner is not None and vm.state in AT_REST:
        await creating.delete_held(house, vm)
    return vm


async def kill(house: House, ref: str) -> VmRecord:
    vm = house.find(ref)
    if vm.running is not None:
        # Before the lock: its holder may be waiting for this very machine (a stop, a wait for the agent).
        await house.engine(vm.engine).kill(vm.running)
    async with house.hold(ref, "kill", check=False) as vm:
        if vm.state in LIVE:
            await house.engine(vm.engine).kill(house.running(vm))
            vm = await ended(house, vm, Status(alive=False, ended="killed"))
        return await _after_end(house, vm)


async def pause(house: House, ref: str) -> VmRecord:
    async with house.hold(ref, "pause") as vm:
        engine = house.engine(vm.engine)
        engine.capabilities().require(Feature.PAUSE)
        await engine.pause(house.running(vm))
        return house.save(vm, state=State.PAUSED)


async def resume(house: House, ref: str) -> VmRecord:
    async with house.hold(ref, "resume") as vm:
        await house.engine(vm.engine).resume(house.running(vm))
        house.touch(vm.uuid)
        return house.save(vm, state=State.RUNNING)


async def restart(house: House, ref: str, *, timeout: float, force: bool, progress: Progress | None) -> VmRecord:
    async with house.hold(ref, "restart") as vm:
        vm = await stop_held(house, vm, timeout=timeout, force=force)
        return await start_held(house, vm, progress)


async def wait(house: House, ref: str, timeout: float | None) -> VmRecord:
    """See `posada.host.machines.Machines.wait`."""
    deadline = None if timeout is None else time.monotonic() + timeout
    uid = house.find(ref).uuid
    vm = house.refresh(house.recorded(uid))
    while vm.state in LIVE:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if vm.running is not None:
            await house.engine(vm.engine).wait(vm.running, left)
        # Its record is another's to write while they hold the lock (a stop, a restore): wait for them.
        async with house.locks.hold(uid, "wait", timeout=left):
            current = house.db.vm(uid)
            if current is None:  # ephemeral, and somebody has cleared it away
                return vm
            vm = house.refresh_held(current)
    return vm


async def keep(house: House, ref: str) -> VmRecord:
    """See `posada.host.machines.Machines.keep`."""
    async with house.hold(ref, "keep") as vm:
        if vm.running is not None:
            await house.engine(vm.engine).disown(vm.running)
        return house.save(vm, owner=None, spec=msgspec.structs.replace(vm.spec, ephemeral=False))


async def reap_ephemeral(house: House, uid: str) -> None:
    """Delete an ephemeral vm that has ended or whose owner is dead."""
    with contextlib.suppress(NotFound):
        await creating.delete(house, uid, force=True)
