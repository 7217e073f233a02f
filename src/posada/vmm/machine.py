"""One machine: its parts, its states, and what can be asked of it. `posada.vmm.builder` puts it together.

::

                start ┌─────────┐ pause
     BUILT ─────────► │ RUNNING │ ───────► PAUSED
       │              └─────────┘ ◄─────── │ ▲
       │                   │       resume  │ │
       └── start_paused ───┼───────────────┼─┘
                           ▼               ▼
                         close ───────► CLOSED       (from BUILT too)

All methods run on the loop's thread; `end` and the guest's own requests may come from a vcpu's.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from posada.errors import EngineError, StateError
from posada.kvm.exits import ExitData, SystemEvent, SystemEventKind
from posada.kvm.numbers import Exit
from posada.kvm.report import report
from posada.kvm.structs import ClockData
from posada.kvm.system import System
from posada.kvm.vm import Vm
from posada.runtime import ending
from posada.runtime.console import Console
from posada.vmm import cpustate, layout, state, vmstate
from posada.vmm.acpi.tables import generation_bytes
from posada.vmm.bus import Bus
from posada.vmm.config import MonitorConfig
from posada.vmm.control import Control
from posada.vmm.irq import Line
from posada.vmm.legacy.power import Event, PowerRegisters
from posada.vmm.legacy.rtc import Rtc
from posada.vmm.legacy.serial import Serial
from posada.vmm.life import Life
from posada.vmm.loop import Loop
from posada.vmm.memory import GuestMemory
from posada.vmm.pagemap import Run
from posada.vmm.vcpu import Vcpus, VcpuThread
from posada.vmm.virtio.mmio import MmioTransport
from posada.vmm.virtio.pages import ACKNOWLEDGE, USED_BUFFER, RegisterPages

VERSION = 1
"""Of the saved state."""


class State(enum.Enum):
    BUILT = "built"
    RUNNING = "running"
    PAUSED = "paused"
    CLOSED = "closed"


class Verb(enum.Enum):
    START = "start"
    START_PAUSED = "start paused"
    PAUSE = "pause"
    RESUME = "resume"
    CLOSE = "close"


TRANSITIONS: dict[tuple[State, Verb], State] = {
    (State.BUILT, Verb.START): State.RUNNING,
    (State.BUILT, Verb.START_PAUSED): State.PAUSED,
    (State.RUNNING, Verb.PAUSE): State.PAUSED,
    (State.PAUSED, Verb.PAUSE): State.PAUSED,
    (State.PAUSED, Verb.RESUME): State.RUNNING,
    (State.RUNNING, Verb.RESUME): State.RUNNING,
    (State.BUILT, Verb.CLOSE): State.CLOSED,
    (State.RUNNING, Verb.CLOSE): State.CLOSED,
    (State.PAUSED, Verb.CLOSE): State.CLOSED,
    (State.CLOSED, Verb.CLOSE): State.CLOSED,
}


@dataclass(slots=True)
class Slot:
    """A virtio device in the machine: its transport, where it is, its interrupt, and an eventfd per queue for kicks."""

    transport: MmioTransport
    address: int
    line: Line
    kicks: list[int] = field(default_factory=list)


class Machine:
    """Made by `posada.vmm.builder.build`, which fills in what is declared here."""

    vm: Vm
    vcpus: Vcpus
    life: Life
    console: Console
    serial: Serial
    power: PowerRegisters
    control: Control
    registers: RegisterPages

    def __init__(self, config: MonitorConfig, system: System, loop: Loop, memory: GuestMemory) -> None:
        self.config = config
        self.system = system
        self.loop = loop
        self.memory = memory
        self.state = State.BUILT
        self.pio = Bus()
        self.mmio = Bus()
        self.rtc = Rtc()
        self.lines: dict[str, Line] = {}
        """Interrupt lines of what is not virtio, by device name."""
        self.slots: dict[str, Slot] = {}
        """Virtio devices by name, in the order of their addresses."""
        self._swallowed = new_kick()
        """An eventfd nobody looks at (`posada.vmm.virtio.pages`)."""
        self.layers: tuple[tuple[Run, ...], ...] | None = None
        """What it stands on: the runs of the upper memory files (`posada.vmm.snapshot`). None: on no file."""
        self.clock: ClockData | None = None
        """kvm-clock as it was when the vcpus were stopped, from the first pause on."""

        self.given_up: Callable[[], object] | None = None
        """Its disks may be another monitor's by now (`posada.vmm.handover`). This takes them back, or raises."""

    # Its life.

    def start(self, paused: bool = False) -> None:
        """Run the vcpus, or let them stand ready. From BUILT."""
        self._go(Verb.START_PAUSED if paused else Verb.START)
        if paused:
            self.clock = self.vm.get_clock()
        self.vcpus.start(parked=paused)
        self.life.paused(paused)

    def pause(self) -> None:
        """Returns when the vcpus stand still; the guest's clock stands too. Idempotent."""
        was = self.state
        self._go(Verb.PAUSE)
        if was is State.RUNNING:
            self.vcpus.quiesce()
            self.clock = self.vm.get_clock()
            self.life.paused(True)

    def resume(self) -> None:
        """Idempotent. Raises EngineError, Busy if its disks are another's: then it stays paused."""
        if self.state is State.PAUSED and self.given_up is not None:
            self.given_up()
        was = self.state
        self._go(Verb.RESUME)
        if was is State.PAUSED:
            if self.clock is not None:
                self.vm.set_clock(ClockData(clock=self.clock.clock))
            for thread in self.vcpus.threads:
                cpustate.tell_paused(thread.vcpu)
            self.vcpus.resume()
            self.life.paused(False)

    def powerdown(self) -> None:
        """Press the power button. The guest may ignore it."""
        self.power.notify(Event.POWER_BUTTON)

    def new_generation(self, generation_id: str) -> None:
        """Tell the guest that it is a copy: its random numbers must differ from the original's."""
        self.memory.write(layout.VMGENID, generation_bytes(generation_id))
        self.power.notify(Event.GENERATION)

    def end(self, reason: str, *, crashed: bool = False, detail: str = "") -> None:
        """Leave the loop, for this reason. From any thread."""
        self.life.end(reason, crashed=crashed, detail=detail)

    def close(self) -> None:
        """Stop everything and write the exit record. Idempotent. The process may end then; the kernel does the rest."""
        if self.state is State.CLOSED:
            return
        self._go(Verb.CLOSE)
        self.vcpus.stop()
        self.serial.flush()
        for slot in self.slots.values():
            slot.transport.device.close()
        self.life.finish()

    def _go(self, verb: Verb) -> None:
        after = TRANSITIONS.get((self.state, verb))
        if after is None:
            raise EngineError(f"cannot {verb.value} a machine that is {self.state.value}")
        self.state = after

    # Its state.

    def save(self) -> dict[str, Any]:
        """Everything but memory and disks. The machine must be PAUSED, or BUILT."""
        if self.state is State.RUNNING:
            raise EngineError("cannot save a machine that runs")
        for slot in self.slots.values():
            slot.transport.device.quiesce()
        document: dict[str, Any] = {
            "version": VERSION,
            "cpus": [cpustate.save(thread.vcpu) for thread in self.vcpus.threads],
            "chips": vmstate.save(self.vm),
            "serial": self.serial.save(),
            "rtc": self.rtc.save(),
            "power": self.power.save(),
            "virtio": {name: slot.transport.save() for name, slot in self.slots.items()},
        }
        if self.clock is not None:
            document["chips"]["clock"] = int(self.clock.clock)
        return document

    def load(self, document: state.Document) -> None:
        """Take what `save` gave, of a machine of the same make. Untrusted: raises StateError, and is useless then."""
        state.integer(document, "version", VERSION, VERSION)
        virtio = state.child(document, "virtio")
        if list(virtio) != list(self.slots):
            raise StateError(
                f"the state is of a machine with {', '.join(virtio)}, and this has {', '.join(self.slots)}"
            )
        self.serial.load(state.child(document, "serial"))
        self.rtc.load(state.child(document, "rtc"))
        self.power.load(state.child(document, "power"))
        for name, slot in self.slots.items():
            slot.transport.load(state.child(virtio, name))
        self.load_processors(state.children(document, "cpus", 256), state.child(document, "chips"))

    def load_processors(self, cpus: list[dict[str, Any]], chips: state.Document) -> None:
        """The kernel's part of `load`."""
        cpustate.load_all([thread.vcpu for thread in self.vcpus.threads], cpus)
        vmstate.load(self.vm, chips)

    # What the guest does.

    def powered_off(self) -> None:
        """The guest asked for S5."""
        self.end(ending.POWERED_OFF)

    def reset(self) -> None:
        """The guest asked for a reset. What starts it again is whoever started it: this process ends."""
        self.end(ending.REBOOTED)

    def exited(self, thread: VcpuThread, what: ExitData | Exception) -> bool:
        """A vcpu left KVM_RUN for something no device answers. Always False: it does not run on."""
        if isinstance(what, Exception):
            self.end(f"the monitor failed: {what}", crashed=True, detail=_traceback(what))
        elif isinstance(what, SystemEvent):
            self.powered_off() if what.kind == SystemEventKind.SHUTDOWN else self.reset()
        elif getattr(what, "reason", None) == Exit.SHUTDOWN:
            self.reset()  # a triple fault: what `reboot=t` does on purpose
        else:
            self.end(f"KVM gave up: {what}", crashed=True, detail=report(thread.vcpu, self.memory))
        return False

    # Its descriptors.

    def connect(self) -> None:
        """Tie interrupts, kicks and acknowledgements to the (new) vm. Raises KvmError."""
        for line in [*self.lines.values(), *(slot.line for slot in self.slots.values())]:
            line.connect(self.vm)
        for slot in self.slots.values():
            for index, kick in enumerate(slot.kicks):
                self.vm.ioeventfd(kick, slot.address + QUEUE_NOTIFY, 4, datamatch=index)
            self.vm.ioeventfd(self._swallowed, slot.address + ACKNOWLEDGE, 4, datamatch=USED_BUFFER)

    def after_fork(self) -> None:
        """In a forked child: eventfds of its own. After the loop's `after_fork`: its old epoll is the parent's too."""
        os.close(self._swallowed)
        self._swallowed = new_kick()
        for line in [*self.lines.values(), *(slot.line for slot in self.slots.values())]:
            line.after_fork()
        for slot in self.slots.values():
            for index, kick in enumerate(slot.kicks):
                self.loop.unwatch(kick)
                os.close(kick)
                slot.kicks[index] = new = new_kick()
                slot.transport.watch_kicks(index, new)


QUEUE_NOTIFY = 0x50
"""The register of a virtio-mmio transport (virtio 1.2, 4.2.2)."""


def new_kick() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def _traceback(error: BaseException) -> str:
    import traceback  # seldom needed, and not small

    return "".join(traceback.format_exception(error))
