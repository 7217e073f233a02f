"""One thread per vcpu: it runs the guest, answers port I/O and MMIO from the buses, and stands still when asked.

::

                 start()                  park() and no access half done
      NEW ──────────────────► RUNNING ──────────────────────────────────► PARKED
                                 ▲ ◄────────────── unpark() ──────────────── │ ▲
                                 │                                           │ │ on_exit said no,
                                 └── exits ── (PIO, MMIO, INTR: at once) ────┼─┘ or a device failed
                                                                             │
      STOPPED ◄──────────────────── stop(), from any state ──────────────────┘

A vcpu never parks with an access half done: an exit for PIO or MMIO is complete only when KVM_RUN is entered again (the
value read goes into a register, RIP moves on). So `park` lets the thread enter once more with ``immediate_exit`` set,
which completes the access and returns INTR. Registers read while PARKED are therefore whole.

*Kick.* ``wanted`` is set first, then ``immediate_exit``, then a signal is sent. The thread clears ``immediate_exit``
first and looks at ``wanted`` next. Whatever the order of the two, either it sees ``wanted``, or KVM_RUN returns at once,
or the signal cuts it: a kick is never lost.

*Locks.* All shared state is guarded by the loop's lock, an RLock. The thread holds it while a device works. Whoever
waits for a vcpu to park waits on a Condition of that same lock, which gives the lock up meanwhile, however often it is
held: a vcpu that waits for the lock inside an access can always finish it.

*fork(2).* Fork in the main thread while every vcpu is PARKED and the lock is held. In the child their threads do not
exist; nobody else holds or waits for the lock; `after_fork` and `start` give each object a thread again. The first
vcpu's may be the thread that forked (`VcpuThread.run_here`).
"""

from __future__ import annotations

import _thread
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NoReturn, Protocol

from posada.errors import KvmError
from posada.kvm.exits import IO_DATA, UNION, ExitData, MmioExit, name_of
from posada.kvm.numbers import Exit
from posada.kvm.vcpu import Vcpu, enter
from posada.vmm.threads import Condition, RLock

KICK = signal.SIGUSR1
MAX_REASON = 63
"""Exit reasons beyond it are counted as this one."""

_IO, _MMIO, _INTR = int(Exit.IO), int(Exit.MMIO), int(Exit.INTR)


class Accessed(Protocol):
    """A bus: `posada.vmm.bus.Bus`."""

    def read(self, address: int, size: int, /) -> int: ...

    def write(self, address: int, size: int, value: int, /) -> None: ...


class State(Enum):
    """Where a `VcpuThread` is; the module's docstring draws it."""

    NEW = "new"
    RUNNING = "running"
    PARKED = "parked"
    STOPPED = "stopped"


class Wanted(Enum):
    """What it was asked for."""

    RUN = "run"
    PARK = "park"
    STOP = "stop"


OnExit = Callable[["VcpuThread", "ExitData | Exception"], bool]


class VcpuThread:
    """The thread of one vcpu.

    ``on_exit`` is called on this thread, the lock held, for every exit but PIO, MMIO and INTR (HLT without an irqchip,
    SHUTDOWN, SYSTEM_EVENT, FAIL_ENTRY, INTERNAL_ERROR, DEBUG, unknown ones), and with the exception if a device or KVM
    raised one. True: run on. False: park until `unpark`. ``begin`` closes the thread's jail: after its first KVM_RUN,
    before it looks at anything that the guest did, so that a forked child's guest need not wait for it.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        index: int,
        pio: Accessed,
        mmio: Accessed,
        lock: RLock,
        on_exit: OnExit,
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        self.vcpu = vcpu
        self.index = index
        self.state = State.NEW
        self.exits = [0] * (MAX_REASON + 1)
        """How often each exit happened, by its number."""
        self.wanted = Wanted.RUN
        self.held = False
        """It parked because `on_exit` said no; `unpark` clears it."""
        self._kvm_run = vcpu.kvm_run
        self._pio = pio
        self._mmio = mmio
        self._lock = lock
        self._changed = Condition(lock)
        self.on_exit = on_exit
        self._begin = begin
        self._trace: deque[tuple[int, str]] | None = None
        self._ident = 0  # of its thread
        self._first = _thread.allocate_lock()
        self._first.acquire()

    # called by others

    def start(self, parked: bool = False) -> None:
        """From NEW. ``parked``: stand still before the first instruction."""
        _install_kick()
        with self._lock:
            if self.state is not State.NEW:
                raise RuntimeError(f"vcpu {self.index} is {self.state.value}, and must be new")
            self.wanted = Wanted.PARK if parked else Wanted.RUN
            self.state = State.RUNNING
            # Not threading.Thread: its start() waits until the thread runs, and a forked child cannot afford it.
            self._ident = _thread.start_new_thread(self._main, ())

    def run_here(self, fd: int, ran: _thread.LockType, settled: _thread.LockType) -> NoReturn:
        """In a forked child: run the vcpu ``fd``, which `vcpu` is to become, and be its thread for good.

        ``ran`` is released when it has left KVM_RUN for the first time; what made it do so is looked at when ``settled``
        can be had: `after_fork` has told others of this thread by then.
        """
        entered, begun = False, False
        failed: KvmError | None = None
        try:
            entered = enter(fd)
        except KvmError as error:
            failed = error
        ran.release()
        try:
            if failed is not None:
                raise failed
            self._begin()
            begun = True
            settled.acquire()
            self._step(self.vcpu.reason if entered else _INTR)
        except Exception as error:
            if not begun:
                settled.acquire()
            self._decide(error)
        self._main(begun)
        while True:  # this thread is the process's first: if it returned, the process would end
            settled.acquire()

    def wait_first(self, seconds: float) -> None:
        """After `start`, once: returns when it has left KVM_RUN for the first time, or when that takes longer."""
        self._first.acquire(timeout=seconds)

    def kick(self) -> None:
        """Make KVM_RUN return, now or at its next entry. Harmless at any time."""
        with self._lock:
            if self.state is State.RUNNING:
                self.vcpu.immediate_exit = 1
                signal.pthread_kill(self._ident, KICK)

    def park(self, wait: bool = True) -> None:
        """Stand still, no access half done. With ``wait`` returns when it does. Idempotent; nothing if not started."""
        with self._lock:
            # also in PARKED: it may have been told to run on, and not have woken yet
            if self.state in (State.RUNNING, State.PARKED) and self.wanted is Wanted.RUN:
                self.wanted = Wanted.PARK
                self.kick()
            if wait:
                self.wait_parked()

    def wait_parked(self) -> None:
        """Wait until it is not RUNNING; the lock is given up meanwhile. After ``park(wait=False)``."""
        if _thread.get_ident() == self._ident:
            raise RuntimeError(f"vcpu {self.index} would wait for itself")
        with self._lock:
            self._changed.wait_for(lambda: self.state is not State.RUNNING)

    def unpark(self) -> None:
        """Run on. Idempotent."""
        with self._lock:
            self.held = False
            if self.wanted is Wanted.PARK:
                self.wanted = Wanted.RUN
                self._changed.notify_all()

    def stop(self) -> None:
        """End the thread's work and wait for that. Idempotent. Not to be called on the thread itself."""
        with self._lock:
            if self.state is State.NEW:
                self.state = State.STOPPED
            if self.state is State.STOPPED:
                return
            self.wanted = Wanted.STOP
            self._changed.notify_all()
            self.kick()
            self._changed.wait_for(lambda: self.state is State.STOPPED)

    def after_fork(self, ident: int = 0) -> None:
        """In a forked child, which has no other thread: NEW again, on the vcpu as the child has remade it.

        ``ident``: it runs already, on that thread (`run_here`).
        """
        self.state, self.wanted, self.held = State.RUNNING if ident else State.NEW, Wanted.RUN, False
        self._kvm_run = self.vcpu.kvm_run
        self._first.acquire(blocking=False)
        self._changed.forget()
        self._ident = ident

    def trace(self, entries: int) -> None:
        """Keep the last ``entries`` exits for `traced`; 0 ends it."""
        self._trace = deque(maxlen=entries) if entries else None

    def traced(self) -> list[tuple[int, str]]:
        """(monotonic nanoseconds, what) of the exits that `trace` kept, oldest first."""
        return list(self._trace or ())

    def counts(self) -> dict[str, int]:
        """Exit counters by name."""
        return {name_of(reason): n for reason, n in enumerate(self.exits) if n}

    # on the thread itself

    def _main(self, begun: bool = False) -> None:
        try:
            while self._may_run():
                try:
                    if begun:
                        self._step()
                    else:
                        reason = self.vcpu.run()
                        if self._first.locked():
                            self._first.release()
                        self._begin()
                        begun = True
                        self._step(reason)
                except Exception as error:  # a device's fault or KVM's must not end in a silent thread
                    self._decide(error)
        finally:
            with self._lock:
                self.state = State.STOPPED
                self._changed.notify_all()

    def _may_run(self) -> bool:
        """Clear the kick, then see what is wanted; parks inside, if so wanted. False: end."""
        self.vcpu.immediate_exit = 0
        wanted = self.wanted
        if wanted is Wanted.RUN:
            return True
        self._finish_access()
        with self._lock:
            while self.wanted is Wanted.PARK:
                self.state = State.PARKED
                self._changed.notify_all()
                self._changed.wait()
            if self.wanted is Wanted.STOP:
                return False
            self.state = State.RUNNING
            return True

    def _finish_access(self) -> None:
        """Enter KVM_RUN without running the guest until nothing is left to complete: an access may have many parts."""
        self.vcpu.immediate_exit = 1
        try:
            while self._step() != _INTR:
                pass
        except Exception as error:
            self._decide(error)
        self.vcpu.immediate_exit = 0

    def _step(self, reason: int = -1) -> int:
        """Run to the next exit, unless it has, and answer it. Returns its reason."""
        if reason < 0:
            reason = self.vcpu.run()
        self.exits[reason if reason < MAX_REASON else MAX_REASON] += 1
        if reason == _IO:
            with self._lock:
                self._port_io()
        elif reason == _MMIO:
            with self._lock:
                self._memory_io(self.vcpu.mmio_exit())
        elif reason != _INTR:
            self._decide(self.vcpu.exit())
        if self._trace is not None and reason != _INTR:
            self._trace.append((time.monotonic_ns(), str(self.vcpu.exit())))
        return reason

    def _port_io(self) -> None:
        """`Vcpu.io_exit` says the same more readably; every access of the guest to a serial port passes here."""
        run = self._kvm_run
        out, size, port, repeat, at = IO_DATA.unpack_from(run, UNION)
        for _ in range(repeat):  # string I/O: one after the other at the same port
            if out:
                self._pio.write(port, size, run[at] if size == 1 else int.from_bytes(run[at : at + size], "little"))
            else:
                run[at : at + size] = self._pio.read(port, size).to_bytes(size, "little")
            at += size

    def _memory_io(self, access: MmioExit) -> None:
        write, address, data = access
        if write:
            self._mmio.write(address, len(data), int.from_bytes(data, "little"))
        else:
            data[:] = self._mmio.read(address, len(data)).to_bytes(len(data), "little")

    def _decide(self, what: ExitData | Exception) -> None:
        with self._lock:
            if not self.on_exit(self, what):
                self.held = True
                if self.wanted is Wanted.RUN:
                    self.wanted = Wanted.PARK


class Vcpus:
    """All vcpus of a machine. Called from the main thread, never from a device's handler on a vcpu's thread."""

    def __init__(self, threads: Iterable[VcpuThread]) -> None:
        self.threads = tuple(threads)

    def start(self, parked: bool = False) -> None:
        """All of them; ``parked``: standing still."""
        for thread in self.threads:
            thread.start(parked)

    def quiesce(self) -> None:
        """Returns when all stand still, registers and accesses whole. Idempotent. The lock is given up meanwhile."""
        for thread in self.threads:
            thread.park(wait=False)
        for thread in self.threads:
            thread.wait_parked()

    def resume(self) -> None:
        """Run those that stand still because they were asked to; one whose `on_exit` said no stays. Idempotent."""
        for thread in self.threads:
            if not thread.held:
                thread.unpark()

    def stop(self) -> None:
        """End their threads. Idempotent."""
        for thread in self.threads:
            thread.stop()

    @contextmanager
    def quiesced(self) -> Iterator[None]:
        """Stand still inside; afterwards those run on that ran before."""
        ran = [thread for thread in self.threads if thread.wanted is Wanted.RUN]
        self.quiesce()
        try:
            yield
        finally:
            for thread in ran:
                if not thread.held:
                    thread.unpark()


def _install_kick() -> None:
    """A handler that does nothing: its signal is there to cut KVM_RUN. Raises ValueError outside the main thread."""
    if signal.getsignal(KICK) in (signal.SIG_DFL, signal.SIG_IGN, None):
        signal.signal(KICK, lambda number, frame: None)
