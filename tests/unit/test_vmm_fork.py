"""Fork by fork(2), on toy guests and the host's own /dev/kvm: who shares what, who keeps what, who is told what."""

from __future__ import annotations

import _thread
import mmap
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from kvm_kit import needs_kvm
from machine_kit import COUNTER, MIB, child, counter, fork, monitor, spin, tidy, toy

from posada.runtime.console import DescriptorLog
from posada.vmm import cpustate, layout, vmstate
from posada.vmm.fork import Child, Forker
from posada.vmm.machine import State
from posada.vmm.replay import Replay

pytestmark = needs_kvm
Report = Callable[..., None]


def by(reports: list[dict[str, Any]], who: str) -> list[dict[str, Any]]:
    return [r for r in reports if r.get("who") == who]


def test_children_go_on_from_the_same_instant() -> None:
    def body(report: Report) -> None:
        machine, _ = toy()
        machine.start()
        spin(machine, lambda: counter(machine) > 50)
        forked = fork(machine, Forker(machine), 3)
        who = "parent" if forked else machine.config.name
        start = counter(machine)
        spin(machine, lambda: counter(machine) > start + 50)
        report(
            who=who, start=start, pid=os.getpid(), children=forked and forked.children, pause=forked and forked.pause
        )

    reports = monitor(body)
    (parent,) = by(reports, "parent")
    children = [by(reports, f"child{index}")[0] for index in range(3)]
    assert [c["pid"] for c in children] == parent["children"]
    assert 0 < parent["pause"] < 5
    assert all(c["start"] >= 50 for c in children)


def test_memory_is_shared_and_then_is_not() -> None:
    """No child sees a later write of the source, or of another child, nor the source one of theirs."""

    def body(report: Report) -> None:
        machine, _ = toy()
        machine.start()
        machine.memory.write(0x300000, b"before the fork")
        forked = fork(machine, Forker(machine), 2)
        who = "parent" if forked else machine.config.name
        machine.memory.write(0x300000, f"of {who}".encode().ljust(15))
        start = counter(machine)
        spin(machine, lambda: counter(machine) > start + 30)
        report(who=who, text=machine.memory.read(0x300000, 15).decode().strip())

    assert sorted(r["text"] for r in monitor(body)) == ["of child0", "of child1", "of parent"]


def test_a_fork_of_a_fork_and_of_a_paused_machine() -> None:
    def body(report: Report) -> None:
        machine, _ = toy()
        forker = Forker(machine)
        machine.start()
        spin(machine, lambda: counter(machine) > 20)
        for generation in range(3):
            machine.pause()
            at = counter(machine)
            if fork(machine, forker, 1):
                report(who=f"parent{generation}", same=counter(machine) == at, state=machine.state.value)
                return
            assert machine.state is State.RUNNING, "the children of a paused machine run"
            spin(machine, lambda at=at: counter(machine) > at + 20)
        report(who="last", count=counter(machine))

    reports = monitor(body)
    assert [by(reports, f"parent{n}")[0] for n in range(3)] == [
        {"who": f"parent{n}", "same": True, "state": "paused"} for n in range(3)
    ]
    assert by(reports, "last")[0]["count"] > 80


def test_the_thread_that_forked_may_be_the_first_vcpu() -> None:
    """With ``live`` a child's loop has a new thread: it runs, stands still when asked to, and forks in turn."""

    def body(report: Report) -> None:
        machine, _ = toy(cpus=2)
        generation = 0

        def live() -> NoReturn:
            nonlocal generation
            generation += 1
            try:
                thread = machine.vcpus.threads[0]
                start = counter(machine)
                spin(machine, lambda: counter(machine) > start + 50)
                machine.pause()
                at = counter(machine)
                report(
                    who=machine.config.name,
                    generation=generation,
                    swapped=thread._ident == main_thread() != _thread.get_ident(),
                    parked=thread.state.value,
                    still=counter(machine) == at,
                )
                machine.resume()
                spin(machine, lambda: counter(machine) > at + 50)
                if generation < 3:
                    fork(machine, forker, 1)
            except BaseException as error:
                report(error=repr(error))
            finally:
                os._exit(0)

        forker = Forker(machine, live)
        machine.start()
        spin(machine, lambda: counter(machine) > 20)
        fork(machine, forker, 2)

    reports = monitor(body)
    assert sorted((r["who"], r["generation"]) for r in reports) == [
        ("child0", 1), ("child0", 2), ("child0", 2), ("child0", 3), ("child0", 3), ("child1", 1),
    ]  # fmt: skip
    assert all(r["swapped"] and r["still"] and r["parked"] == "parked" for r in reports)


def test_a_child_whose_guest_asks_for_nothing_is_a_machine_too() -> None:
    """Its first vcpu never leaves KVM_RUN: the loop goes on without it, stops and ends it."""

    def body(report: Report) -> None:
        machine, _ = toy(b"\xeb\xfe")

        def live() -> NoReturn:
            machine.pause()
            report(parked=machine.vcpus.threads[0].state.value)
            machine.resume()
            machine.close()
            report(stopped=machine.vcpus.threads[0].state.value)
            os._exit(0)

        machine.start()
        fork(machine, Forker(machine, live), 1)

    assert monitor(body) == [{"parked": "parked"}, {"stopped": "stopped"}]


def test_a_signal_to_such_a_child_reaches_its_loop() -> None:
    """Python answers signals on a process's first thread, which is in KVM_RUN."""

    def body(report: Report) -> None:
        machine, _ = toy(b"\xeb\xfe")
        signal.signal(signal.SIGTERM, lambda *_: machine.loop.stop())

        def live() -> NoReturn:
            machine.loop.soon(lambda: report(pid=os.getpid()))
            machine.loop.run()
            report(ended=True)
            os._exit(0)

        machine.start()
        forked = fork(machine, Forker(machine, live), 1)
        assert forked is not None
        os.read(told[0], 1)
        os.kill(forked.children[0], signal.SIGTERM)

    told = os.pipe()

    def telling(report: Report) -> None:
        def both(**values: Any) -> None:
            report(**values)
            os.write(told[1], b".")

        body(both)

    assert [set(r) for r in monitor(telling)] == [{"pid"}, {"ended"}]


def test_the_guest_is_told() -> None:
    """Generation id in memory before a vcpu runs, cid in the vsock device's configuration."""

    def body(report: Report) -> None:
        machine, _ = toy()
        machine.start()
        if not fork(machine, Forker(machine), 1):
            vsock = machine.slots["vsock"].transport.device
            report(
                who="child",
                generation=machine.memory.read(layout.VMGENID, 16).hex(),
                cid=int.from_bytes(vsock.config()[:8], "little"),
                pending=machine.power.save(),
            )

    (child_,) = by(monitor(body), "child")
    assert child_["generation"] == "0" * 31 + "1" and child_["cid"] == 100


def main_thread() -> int:
    return threading.main_thread().ident or 0


def mapped_vcpus() -> int:
    with open("/proc/self/maps") as maps:
        return sum("kvm-vcpu" in line for line in maps)


def test_a_child_has_nothing_of_its_parents() -> None:
    """No descriptor of the child is one of the parent's, but /dev/kvm and what this test itself opened."""

    def opened() -> list[int]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("\0" + os.urandom(8).hex())
        listener.listen()
        stream = socket.socket(socket.AF_UNIX)
        stream.bind("\0" + os.urandom(8).hex())
        stream.listen()
        return [listener.detach(), stream.detach()]

    looked = mmap.mmap(-1, 4096)  # shared by all of them

    def body(report: Report) -> None:
        before, kept = descriptors(), mapped_vcpus()  # other tests keep vms
        machine, _ = toy()
        control, console = opened()
        machine.control.after_fork(control)
        machine.console.reopen(console, DescriptorLog(-1, -1, MIB))
        machine.start()
        forker = Forker(machine)
        mine = opened()
        theirs = opened()
        configs = [child(machine, 0, control=mine[0]), child(machine, 1, control=theirs[0])]
        os.close(mine[1]), os.close(theirs[1])
        outcome: list[Any] = []
        machine.loop.soon(lambda: outcome.append(forker.fork(list(map(Child, configs)))))
        spin(machine, lambda: bool(outcome))
        keys = descriptors() - before
        vcpus = mapped_vcpus() - kept
        who = "parent" if outcome[0] else machine.config.name
        report(who=who, keys=sorted(keys), vcpus=vcpus)
        # Nobody ends before all have looked: the kernel gives an eventfd's number away again.
        looked[["parent", "child0", "child1"].index(who)] = 1
        spin(machine, lambda: looked[:3] == b"\1\1\1")

    reports = {r["who"]: r for r in monitor(body)}
    assert len(reports) == 3

    def own(name: str) -> set[str]:
        return {key for key in reports[name]["keys"] if not key.startswith(("anon_inode:kvm", "anon_inode:[eventpoll"))}

    for one, other in (("parent", "child0"), ("parent", "child1"), ("child0", "child1")):
        assert own(one) & own(other) <= {"/dev/kvm"}
    assert len([key for key in own("child0") if key.startswith("socket")]) == 1
    assert [r["vcpus"] for r in reports.values()] == [1, 1, 1]


def test_a_child_that_cannot_live_says_so() -> None:
    """Its console listener is no descriptor: the starter hears why, the parent runs on."""

    def body(report: Report) -> None:
        machine, _ = toy()
        machine.start()
        ours, starter = socket.socketpair()
        config = child(machine, 0)
        config = replace(
            config,
            console=replace(config.console, listener=os.open("/dev/null", os.O_RDWR)),
            life=replace(config.life, starter=starter.detach()),
        )
        outcome: list[Any] = []
        machine.loop.soon(lambda: outcome.append(Forker(machine).fork([Child(config)])))
        spin(machine, lambda: bool(outcome))
        start = counter(machine)
        spin(machine, lambda: counter(machine) > start + 20)
        report(who="parent", told=ours.recv(1000).decode())

    (parent,) = monitor(body)
    assert parent["told"].startswith("error HostError")


def test_the_parent_goes_on_when_its_disks_cannot() -> None:
    def body(report: Report) -> None:
        machine, _ = toy()
        machine.start()

        def switch() -> None:
            raise OSError(28, "no space")

        outcome: list[Any] = []

        def run() -> None:
            try:
                Forker(machine).fork([], switch)
            except OSError as error:
                outcome.append(error.errno)

        machine.loop.soon(run)
        spin(machine, lambda: bool(outcome))
        start = counter(machine)
        spin(machine, lambda: counter(machine) > start + 20)
        report(errno=outcome[0])

    assert monitor(body) == [{"errno": 28}]


def test_several_vcpus() -> None:
    """The second one waits for its start-up IPI, and still does in the child."""

    def body(report: Report) -> None:
        machine, _ = toy(cpus=2)
        machine.start()
        spin(machine, lambda: counter(machine) > 20)
        forked = fork(machine, Forker(machine), 1)
        start = counter(machine)
        spin(machine, lambda: counter(machine) > start + 20)
        with machine.vcpus.quiesced():
            states = [int(thread.vcpu.get_mp_state()) for thread in machine.vcpus.threads]
        report(who="parent" if forked else "child", states=states)

    reports = monitor(body)
    assert [r["states"] for r in reports] == [[0, 1], [0, 1]]


def test_replayed_state_is_the_saved_state() -> None:
    """The recorded requests give the same vm as `wire` and `Machine.load` would."""

    def body(report: Report) -> None:
        machine, _ = toy(cpus=2)
        machine.start()
        spin(machine, lambda: counter(machine) > 20)
        machine.pause()
        vcpus = [thread.vcpu for thread in machine.vcpus.threads]
        replay = Replay(machine.system, machine.vm, vcpus)
        replay.record(machine.clock)
        before = [cpustate.save(vcpu) for vcpu in vcpus], vmstate.save(machine.vm)
        replay.become(replay.play())
        after = [cpustate.save(vcpu) for vcpu in vcpus], vmstate.save(machine.vm)
        moving = {"tsc", "clock"}
        differing = [
            key
            for a, b in zip([*before[0], before[1]], [*after[0], after[1]], strict=True)
            for key in a
            if key not in moving and a[key] != b[key]
        ]
        report(differing=differing)

    assert monitor(body) == [{"differing": []}]


def test_regular_files_are_not_touched_by_the_dead() -> None:
    """A child's log is its own file; the parent's is closed there."""

    def body(report: Report) -> None:
        logs = [os.memfd_create(name) for name in ("parent", "child")]
        machine, _ = toy()
        machine.start()
        machine.console.reopen(-1, DescriptorLog(logs[0], -1, MIB))
        config = child(machine, 0)
        config = replace(config, console=replace(config.console, log=os.dup(logs[1])))
        inode = os.fstat(logs[0]).st_ino
        outcome: list[Any] = []
        machine.loop.soon(lambda: outcome.append(Forker(machine).fork([Child(config)])))
        spin(machine, lambda: bool(outcome))
        if outcome[0] is None:
            machine.console.output(b"child speaks")
            left = [fd for fd in range(3, 100) if _inode(fd) == inode]
            report(who="child", log=os.pread(logs[1], 100, 0).decode(), left=len(left))
        else:
            machine.console.output(b"parent speaks")
            report(who="parent", log=os.pread(logs[0], 100, 0).decode())

    reports = monitor(body)
    assert by(reports, "parent") == [{"who": "parent", "log": "parent speaks"}]
    assert by(reports, "child") == [{"who": "child", "log": "child speaks", "left": 0}]


def descriptors() -> set[str]:
    """What this process has open, by what the kernel calls it. An eventfd's number is only in its fdinfo."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
            with open(f"/proc/self/fdinfo/{fd}") as info:
                name += "".join(line for line in info if line.startswith("eventfd-id"))
        except FileNotFoundError:
            continue  # the listing's own
        if int(fd) > 2 and name != "anon_inode:[eventfd]":
            found.add(name)
    return found


def _inode(fd: int) -> int:
    try:
        status = os.fstat(fd)
    except OSError:
        return -1
    return status.st_ino if stat.S_ISREG(status.st_mode) else -1


def test_counting_is_at_the_right_place() -> None:
    machine, probe = toy()
    machine.start()
    spin(machine, lambda: len(probe.values) > 5)
    machine.pause()
    assert probe.values[:3] == [1, 2, 3] and machine.memory.u32(COUNTER) >= 6
    machine.close()


assert tidy  # a fixture for every test here
