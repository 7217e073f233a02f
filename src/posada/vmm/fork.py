"""New machines from a running one, by fork(2): guest memory and devices are this process's, so its copy is the machine's.

In the pause, in this order::

    parent   vcpus parked, devices idle, disks frozen, the kernel's part recorded          (`posada.vmm.replay`)
             os.fork() ───────────┐  once for each child
             its disks on new     │  a kernel vm of its own over the same memory, with the recorded state
             layers; vcpus run    │  a new generation id in memory; vcpus run: their first access waits for the lock
                                  │  its own descriptors: loop, lines, kicks, control, console, life, disks, network, vsock
                                  ▼  the lock is let go

Waking a thread costs a child a fifth of its time to the first instruction. So where it may, the thread that forked runs the
child's first vcpu itself, for good, and the child's loop gets a new thread (``live``).

Which locks can be held at the fork, and by whom, is in docs/adr/0007-kvm-fork.md. In short: every other thread waits in
a `VcpuThread`'s Condition, holding nothing, and the loop's lock is this thread's.
"""

from __future__ import annotations

import _thread
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from posada.runtime.console import DescriptorLog
from posada.vmm import layout, process
from posada.vmm.acpi.tables import generation_bytes
from posada.vmm.builder import CONSOLE_LOG_MAX
from posada.vmm.config import DiskConfig, MonitorConfig
from posada.vmm.legacy.power import Event
from posada.vmm.machine import Machine, State
from posada.vmm.replay import Replay
from posada.vmm.vcpu import Wanted
from posada.vmm.virtio.blk import Blk

FIRST_RUN = 0.0005
"""Seconds that a child waits for its first vcpu's first exit before it goes on, if that vcpu's thread has yet to wake up."""
FIRST_EXIT = 0.0001
"""The same if the vcpu runs already. What halts will not leave; what leaves at once has left by then."""


@dataclass(frozen=True)
class Forked:
    """What the parent gets: a pid or an OSError for each child, and the seconds that its vcpus stood still."""

    children: tuple[int | OSError, ...]
    pause: float


class Child:
    """A child to be, worked out beforehand: what a child does by itself costs it a page fault at every step."""

    def __init__(self, config: MonitorConfig) -> None:
        """``config`` has no ``kvm``: a child keeps its parent's."""
        self.config = config
        self.descriptors: list[int] = []
        config.relocated(self._note)
        self.generation = generation_bytes(config.generation_id) if config.generation_id else None
        self.hardware = hardware(config)

    def _note(self, fd: int) -> int:
        self.descriptors.append(fd)
        return fd

    def close(self) -> None:
        """It is another process's."""
        for fd in self.descriptors:
            os.close(fd)


class Forker:
    """Forks one machine, any number of times; in a child it is the child's.

    ``live``: runs a child's loop, on a thread that is made for it, and ends the process with it. Without it the caller goes
    on in the child, and its vcpus get new threads.
    """

    def __init__(self, machine: Machine, live: Callable[[], NoReturn] | None = None) -> None:
        self._machine, self._live = machine, live
        # What a child needs at once, made beforehand.
        self._generation = machine.memory.view(layout.VMGENID, 16)
        self._ran, self._settled = _thread.allocate_lock(), _thread.allocate_lock()
        self._unlock: Callable[[], object] = machine.loop.lock._release_save  # type: ignore[attr-defined]
        """However often it is held."""
        self._run_first = machine.vcpus.threads[0].run_here
        self._replay: Replay | None = None

    def fork(
        self,
        children: Sequence[Child],
        switch: Callable[[], object] = lambda: None,
        forget: Callable[[], object] = lambda: None,
    ) -> Forked | None:
        """Make ``children``; in each of them it returns None, or never with ``live``, and the machine is the child's.

        On the loop's thread, from `Loop.soon`: a child goes on in the same loop, and must not dispatch what the parent's
        epoll had found ready. ``switch`` puts the parent's disks, frozen by then, on their new layers; ``forget`` lets go, in
        a child and before anybody hears of it, of what only the parent needs for that. Descriptors in
        ``children`` are taken over: a child keeps its own, the parent none; they have no ``kvm``, and keep the parent's.
        A child that cannot live says so to its starter. The parent's vcpus run on, or stand still as before, also when
        this raises (KvmError, OSError, ImageError).
        """
        machine = self._machine
        born = list(children)
        pids: list[int | OSError] = []
        me: int | None = None
        with machine.loop.lock:
            begun = time.monotonic()
            running = [thread for thread in machine.vcpus.threads if thread.wanted is Wanted.RUN]
            machine.vcpus.quiesce()
            try:
                self._still()
                try:
                    freeze(machine)
                    for index in range(len(children)):
                        if not _fork(pids):
                            me = index
                            break
                finally:
                    if me is None:
                        switch()  # also after a failure: a disk that is frozen takes no write
            finally:
                if me is None:
                    for thread in running:
                        if not thread.held:
                            thread.unpark()
                    for child in born:
                        child.close()
            if me is None:
                return Forked(tuple(pids), time.monotonic() - begun)
            self._become(born.pop(me), born, forget)
        return None

    def _still(self) -> None:
        """The vcpus are parked: nothing else may be under way, and the kernel's part is recorded."""
        machine = self._machine
        for slot in machine.slots.values():
            slot.transport.device.quiesce()
        if self._replay is None:
            vcpus = [thread.vcpu for thread in machine.vcpus.threads]
            self._replay = Replay(machine.system, machine.vm, vcpus)
        self._replay.record(machine.clock if machine.state is State.PAUSED else None)
        for lock in (self._ran, self._settled):
            lock.acquire(blocking=False)

    def _become(self, me: Child, others: Sequence[Child], forget: Callable[[], object]) -> None:
        """In a child: live, or die and say why. The guest runs at once; its accesses wait until the lock is let go."""
        try:
            assert self._replay is not None
            made = self._replay.play()
            if me.generation is not None:
                self._generation[:] = me.generation
            if self._live is None:
                self._settle(made)
                self._adopt(me, others, forget)
                return
            _thread.start_new_thread(self._loop, (me, others, forget, made, _thread.get_ident()))
            self._unlock()  # the lock is the new thread's
        except BaseException as error:
            _die(me, error)
        self._run_first(made[1], self._ran, self._settled)

    def _loop(
        self, me: Child, others: Sequence[Child], forget: Callable[[], object], made: list[int], first: int
    ) -> None:
        """The new thread of a child's loop. ``first``: the thread that is the first vcpu's."""
        assert self._live is not None
        try:
            with self._machine.loop.lock:
                self._ran.acquire(timeout=FIRST_EXIT)
                self._settle(made, first)
                self._settled.release()
                self._adopt(me, others, forget)
        except BaseException as error:
            _die(me, error)
        self._live()

    def _settle(self, made: list[int], first: int = 0) -> None:
        """The machine is the vm that was made; its vcpus have threads."""
        machine, replay = self._machine, self._replay
        assert replay is not None
        replay.become(made)
        machine.state, machine.clock = State.RUNNING, None
        threads = machine.vcpus.threads
        for thread in threads:
            thread.after_fork(first if thread is threads[0] else 0)
        for thread in threads[1:] if first else threads:
            thread.start()
        # A thread that only wakes up never wins the interpreter's lock against one that gives it up for microseconds: let
        # the first have it until it stands in KVM_RUN. Most guests leave that at once.
        if not first:
            threads[0].wait_first(FIRST_RUN)

    def _adopt(self, me: Child, others: Sequence[Child], forget: Callable[[], object]) -> None:
        """What of the parent's is still there goes, and the child gets its own."""
        for other in others:
            other.close()
        forget()
        _adopt(self._machine, me)


def freeze(machine: Machine) -> None:
    """The disks' files are complete, and stay as they are: what comes goes to new layers. Raises OSError, ImageError."""
    for slot in machine.slots.values():
        if isinstance(slot.transport.device, Blk):
            slot.transport.device.freeze()


def _die(me: Child, error: BaseException) -> NoReturn:
    process.refuse(me.config.life.starter, error if isinstance(error, Exception) else RuntimeError(repr(error)))
    os._exit(1)


def _fork(pids: list[int | OSError]) -> bool:
    """False in the child."""
    try:
        pid = os.fork()
    except OSError as error:
        pids.append(error)
        return True
    if pid:
        pids.append(pid)
    return pid != 0


def _adopt(machine: Machine, me: Child) -> None:
    """Everything of the host's that the machine uses becomes the child's own."""
    config = me.config
    machine.config = replace(config, kvm=machine.config.kvm)
    machine.loop.after_fork()
    machine.after_fork()
    machine.connect()
    machine.control.after_fork(config.control)
    machine.console.reopen(config.console.listener, _log(config))
    machine.life.after_fork(config.life, config.exit)
    for name, slot in machine.slots.items():
        slot.transport.device.reopen(me.hardware.get(name, {}))
    if me.generation is not None:
        machine.power.notify(Event.GENERATION)
    for slot in machine.slots.values():
        slot.transport.kick()
    machine.life.paused(False)
    machine.life.started()


def _log(config: MonitorConfig) -> DescriptorLog:
    return DescriptorLog(config.console.log, config.console.log_old, CONSOLE_LOG_MAX)


def hardware(config: MonitorConfig) -> dict[str, dict[str, Any]]:
    """What each device gets from `Device.reopen`, by its name in the machine (`posada.vmm.builder.devices`)."""
    given: dict[str, dict[str, Any]] = {disk.device: _disk(disk) for disk in config.disks}
    if config.vsock is not None:
        vsock = config.vsock
        given["vsock"] = {"cid": vsock.cid, "listeners": vsock.listeners, "connect": vsock.connect}
    for index, nic in enumerate(config.nics):
        given[f"nic:{index}"] = {"mac": nic.mac, "fd": nic.fd, "kind": nic.kind}
    for folder in config.folders:
        given[folder.tag] = {"fd": folder.fd, "server": folder.server}
    return given


def _disk(disk: DiskConfig) -> dict[str, Any]:
    """The frozen layers, which are its parent's too, and its own on top; a read-only disk has none."""
    fds = [fd for fd, _ in disk.chain]
    return {"layers": fds} if disk.readonly else {"layers": fds[:-1], "overlay": fds[-1]}
