"""A machine's life, and what each state refuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
from contract_kit import DISK, RAM, Inn

from posada.errors import AlreadyExists, GuestGone, InvalidState, NotFound, SpecError, Timeout
from posada.model.states import State


async def test_a_life(inn: Inn) -> None:
    made = await inn.vms.create(inn.spec(name="one"))
    assert made.state is State.CREATED and made.running is None
    started = await inn.vms.start("one")
    assert started.state is State.RUNNING and started.running is not None
    await inn.vms.wait_ready("one", timeout=120)
    assert (await inn.sh("one", "echo", "hello")).stdout == "hello\n"
    assert (await inn.sh("one", "false")).exit_code == 1
    await inn.put("one", DISK, "kept")
    await inn.put("one", RAM, "lost")

    stopped = await inn.vms.stop("one")
    assert stopped.state is State.STOPPED and stopped.exit == "guest powered off"
    await inn.vms.start("one")
    await inn.vms.wait_ready("one", timeout=120)
    assert await inn.see("one", DISK) == "kept"
    assert await inn.see("one", RAM) is None

    killed = await inn.vms.kill("one")
    assert killed.state is State.STOPPED and killed.exit == "killed"
    assert (await inn.vms.kill("one")).state is State.STOPPED, "killing what does not run is fine"
    await inn.vms.delete("one")
    with pytest.raises(NotFound):
        inn.vms.get("one")


async def test_pause_and_resume(inn: Inn) -> None:
    await inn.machine()
    assert (await inn.vms.pause("one")).state is State.PAUSED
    with pytest.raises(InvalidState, match="resume"):
        await inn.sh("one", "true")
    assert inn.vms.get("one").state is State.PAUSED
    assert (await inn.vms.resume("one")).state is State.RUNNING
    assert (await inn.sh("one", "echo", "back")).stdout == "back\n"


async def test_a_paused_machine_can_be_stopped(inn: Inn) -> None:
    await inn.machine()
    await inn.vms.pause("one")
    assert (await inn.vms.stop("one")).exit == "guest powered off"


async def test_restart(inn: Inn) -> None:
    first = await inn.machine()
    again = await inn.vms.restart("one")
    assert again.running is not None and first.running is not None
    assert again.running.process != first.running.process
    await inn.vms.wait_ready("one", timeout=120)


async def test_states_refuse_and_say_what_to_do(inn: Inn) -> None:
    await inn.vms.create(inn.spec(name="idle"))
    for work in (
        lambda: inn.vms.stop("idle"),
        lambda: inn.vms.pause("idle"),
        lambda: inn.vms.resume("idle"),
        lambda: inn.vms.fork("idle"),
        lambda: inn.vms.guest("idle"),
    ):
        with pytest.raises(InvalidState) as refused:
            await work()
        assert refused.value.actual == "created"
    await inn.machine()
    for work in (
        lambda: inn.vms.start("one"),
        lambda: inn.vms.resume("one"),
        lambda: inn.vms.clone("one"),
        lambda: inn.vms.delete("one"),
    ):
        with pytest.raises(InvalidState) as refused:
            await work()
        assert refused.value.actual == "running" and refused.value.hint


async def test_names(inn: Inn) -> None:
    one = await inn.vms.create(inn.spec(name="one"))
    with pytest.raises(AlreadyExists):
        await inn.vms.create(inn.spec(name="one"))
    other = await inn.vms.create(inn.spec())
    assert other.name and other.name != "one"
    assert inn.vms.get(one.uuid).name == inn.vms.get(one.uuid[:13]).name == "one"
    with pytest.raises(AlreadyExists):
        await inn.vms.rename("one", other.name)
    with pytest.raises(SpecError):
        await inn.vms.rename("one", "Not A Name")
    await inn.vms.rename("one", "uno")
    assert inn.vms.get("uno").uuid == one.uuid


async def test_a_machine_that_powers_itself_off(inn: Inn) -> None:
    await inn.machine()
    guest = await inn.vms.guest("one")
    with pytest.raises(Timeout):
        await inn.vms.wait("one", timeout=0.05)
    with contextlib.suppress(GuestGone):  # the answer may or may not arrive before the end
        await guest.call("poweroff")
    ended = await inn.vms.wait("one", timeout=60)
    assert ended.state is State.STOPPED and ended.exit == "guest powered off"


async def test_a_process_that_is_killed_from_outside(inn: Inn) -> None:
    vm = await inn.machine()
    assert vm.running is not None
    os.kill(vm.running.process.pid, signal.SIGKILL)
    ended = await inn.vms.wait("one", timeout=30)
    assert ended.state is State.CRASHED and "signal 9" in (ended.exit or "")
    with pytest.raises(InvalidState):
        await inn.vms.guest("one")
    await inn.vms.start("one")
    await inn.vms.wait_ready("one", timeout=120)


async def test_a_command_whose_machine_dies_says_how(inn: Inn) -> None:
    if inn.engine == "fake":
        pytest.skip("the commands of a fake guest are processes of this one, and outlive its end for a moment")
    vm = await inn.machine()
    assert vm.running is not None
    guest = await inn.vms.guest("one")
    command = asyncio.create_task(inn.vms.run("one", ["sleep", "1000"]))
    await inn.until(lambda: guest.busy)
    os.kill(vm.running.process.pid, signal.SIGKILL)
    with pytest.raises(GuestGone, match=r"'one' ended: .*signal 9"):
        await command


async def test_waiting_for_a_dead_guest_says_how_it_died(inn: Inn) -> None:
    vm = await inn.boot()
    assert vm.running is not None
    os.kill(vm.running.process.pid, signal.SIGKILL)
    await inn.until(lambda: inn.vms.get("one").state is State.CRASHED)
    with pytest.raises(GuestGone, match="console"):
        await inn.vms.wait_ready("one")


async def test_usage_console_and_log(inn: Inn) -> None:
    await inn.machine()
    assert inn.vms.usage("one").rss > 0
    assert inn.vms.console("one").is_socket()
    assert inn.vms.log("one").parent == inn.host.paths.vm(inn.vms.get("one").uuid)
    await inn.vms.kill("one")
    assert inn.vms.usage("one").rss == 0
    with pytest.raises(InvalidState):
        inn.vms.console("one")


async def test_ephemeral_machines_go_when_they_stop(inn: Inn) -> None:
    await inn.boot(ephemeral=True)
    await inn.vms.stop("one")
    with pytest.raises(NotFound):
        inn.vms.get("one")


async def test_keep(inn: Inn) -> None:
    await inn.boot(ephemeral=True)
    assert (await inn.vms.keep("one")).owner is None
    await inn.vms.stop("one")
    assert inn.vms.get("one").state is State.STOPPED
