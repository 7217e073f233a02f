"""The driver's side of a device: status, features, queues. What registers carry it is `posada.vmm.virtio.mmio`'s.

The device status (virtio 1.2, sections 2.1 and 3.1.1)::

    RESET ──► ACKNOWLEDGE ──► DRIVER ──► FEATURES_OK ──► DRIVER_OK
      ▲            │             │            │              │
      │            └──────┬──────┴────────────┴──────────────┤
      │          the driver: FAILED        the device: NEEDS_RESET (`fail`)
      └──────────────── the driver writes 0 ─────────────────┘

Each write sets bits in this order, several at once if it likes, and never clears one: what else a driver writes is
refused. FEATURES_OK stays clear if the features don't suit; queues can be configured between FEATURES_OK and DRIVER_OK;
`active` is DRIVER_OK without FAILED and NEEDS_RESET, and only then does the device run. *Refused* writes change nothing
and are counted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from enum import IntFlag
from functools import partial
from typing import Any

from posada.vmm import state
from posada.vmm.loop import Loop
from posada.vmm.memory import BadAddress, GuestMemory
from posada.vmm.state import StateError
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Queue, QueueError


class Status(IntFlag):
    """Device status, section 2.1."""

    RESET = 0
    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


ORDER = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK)
STOPPED = Status.NEEDS_RESET | Status.FAILED

INDIRECT_DESC = 1 << 28
EVENT_IDX = 1 << 29
VERSION_1 = 1 << 32
GENERAL_FEATURES = INDIRECT_DESC | EVENT_IDX | VERSION_1

MAX_REPORTS = 16
"""Failures of one device that stderr hears of; a guest can make any number."""

MAX_REASON = 300
"""Characters of `Transport.reason`."""

USED_BUFFER = 1  # interrupt status, section 4.2.2
CONFIG_CHANGE = 2


class Transport:
    """Status machine, features and queues of one device. ``interrupt`` raises its (edge-triggered) line."""

    def __init__(self, device: Device, memory: GuestMemory, interrupt: Callable[[], object], loop: Loop) -> None:
        self.device = device
        self.memory = memory
        self.loop = loop
        self.queues = [Queue(memory, index, size) for index, size in enumerate(device.queue_sizes)]
        self.features = device.features | GENERAL_FEATURES
        self.interrupts = self.refused = self.failures = 0
        self.reason = ""
        """Why the device last asked for a reset."""
        self.generation = 0
        self._interrupt = interrupt
        self._again: set[int] = set()
        self._clear()
        device.transport = self
        device.attach(loop)

    def _clear(self) -> None:
        self.status = Status.RESET
        self.active = False
        self.acked = 0
        self.interrupt_status = 0

    # The driver's side.

    def set_status(self, value: int) -> None:
        """The driver writes the status register."""
        if value == 0:
            self._reset()
            return
        old = self.status & ~STOPPED
        if (value & old) != old or value & ~0xFF:
            self._refuse()
            return
        if value & Status.FAILED:
            self._stop(Status.FAILED)
        for number, step in enumerate(ORDER):
            if not value & ~self.status & step or self.status & STOPPED:
                continue
            if any(not self.status & before for before in ORDER[:number]):
                self._refuse()
                return
            self._advance(step)

    def set_features(self, value: int) -> None:
        """The driver writes the features it takes."""
        if self.status & Status.DRIVER and not self.status & Status.FEATURES_OK:
            self.acked = value
        else:
            self._refuse()

    def configurable(self, index: int) -> Queue | None:
        """The queue if the driver may set it up now, or None (and the write is refused)."""
        if index < len(self.queues) and self.status & Status.FEATURES_OK and not self.status & Status.DRIVER_OK:
            return self.queues[index]
        self._refuse()
        return None

    def set_ready(self, index: int, ready: bool) -> None:
        """The driver enables a queue, or stops using it."""
        if not ready:
            if index < len(self.queues):
                self.queues[index].stop()
        elif (queue := self.configurable(index)) is not None and not queue.ready:
            acked = self.acked
            self.run(partial(queue.start, event_idx=bool(acked & EVENT_IDX), indirect=bool(acked & INDIRECT_DESC)))

    def notify(self, index: int) -> None:
        """The driver kicked queue ``index``. On the loop's thread."""
        if self.active and index < len(self.queues) and index not in self._again:
            self.run(partial(self.device.notify, index))

    def acknowledge(self, bits: int) -> None:
        """The driver has seen these interrupts."""
        if bits & self.interrupt_status & CONFIG_CHANGE:
            self.run(self.device.config_noticed)
        self.interrupt_status &= ~bits

    def show(self) -> None:
        """Something that the driver can read has changed. For the registers' owner to override."""

    def show_interrupt(self) -> None:
        """As `show`, of the interrupt status alone."""

    # The device's side (`posada.vmm.virtio.device.Transport`).

    def interrupt_used(self) -> None:
        self._raise(USED_BUFFER)

    def interrupt_config(self) -> None:
        self.generation = self.generation + 1 & 0xFFFF_FFFF
        self.show()
        if self.status & Status.DRIVER_OK:
            self._raise(CONFIG_CHANGE)

    def again(self, index: int) -> None:
        """Notify the device of queue ``index`` once the loop has looked after others."""
        if index not in self._again:
            self._again.add(index)
            self.loop.soon(partial(self._notify_again, index))

    def fail(self, reason: str) -> None:
        """Section 2.1.2: the device can't go on. It does nothing more until the driver resets it."""
        if self.status & STOPPED:
            return
        self.reason = reason[:MAX_REASON]
        self.failures += 1
        self._stop(Status.NEEDS_RESET)
        self.show()
        if self.failures <= MAX_REPORTS:
            sys.stderr.write(f"{self.device.name}: {reason}; the driver must reset it\n")
        if self.status & Status.DRIVER_OK:
            self._raise(CONFIG_CHANGE)

    def run(self, call: Callable[[], object]) -> None:
        """Run device code. Whatever a guest makes it raise ends in `fail`, not in the monitor's death."""
        try:
            call()
        except (QueueError, BadAddress) as error:
            self.fail(str(error))
        except Exception as error:
            if self.failures < MAX_REPORTS:
                traceback.print_exc()
            self.fail(f"an error of posada itself: {type(error).__name__}: {error}")

    # The machine's side.

    @property
    def pending(self) -> bool:
        """The loop has yet to call `Device.notify`."""
        return bool(self._again)

    def kick(self) -> None:
        """After a pause, restore or fork: a notification or an interrupt may have been lost on the way. Spurious
        ones are harmless. The registers are shown anew: what a forked child was given may be in them.
        """
        self.show()
        if self.interrupt_status:
            self._interrupt()
        if self.active:
            for queue in self.queues:
                self.again(queue.index)

    def save(self) -> dict[str, Any]:
        """The transport's, the queues' and the device's state. Quiesce the device before."""
        return {
            "kind": self.device.kind,
            "status": int(self.status),
            "features": self.features,
            "acked": self.acked,
            "interrupt_status": self.interrupt_status,
            "generation": self.generation,
            "reason": self.reason,
            "queues": [queue.save() for queue in self.queues],
            "device": self.device.save(),
        }

    def load(self, document: dict[str, Any]) -> None:
        """Become what was saved; untrusted. Raises StateError; the device is reset then. Call `kick` before vcpus run."""
        self._reset()
        try:
            self._load(document)
        except StateError:
            self._reset()
            raise
        finally:
            self.show()

    def _load(self, document: dict[str, Any]) -> None:
        state.integer(document, "kind", self.device.kind, self.device.kind)
        offered = state.integer(document, "features", 0, (1 << 64) - 1)
        acked = state.integer(document, "acked", 0, (1 << 64) - 1)
        status = Status(state.integer(document, "status", 0, 0xFF))
        steps = [bool(status & step) for step in ORDER]
        if steps != sorted(steps, reverse=True) or status & ~(STOPPED | sum(ORDER)):
            raise StateError(f"{self.device.name}: no device status is {status:#x}")
        if offered & ~self.features:
            raise StateError(f"{self.device.name}: the driver was offered features {offered & ~self.features:#x}")
        if status & Status.FEATURES_OK and not self._suitable(acked):
            raise StateError(f"{self.device.name}: no driver has features {acked:#x}")
        queues = state.children(document, "queues", len(self.queues))
        if len(queues) != len(self.queues):
            raise StateError(f"{self.device.name}: {len(queues)} queues of {len(self.queues)}")
        for queue, saved in zip(self.queues, queues, strict=True):
            queue.load(saved)
        self.features = offered
        self.acked = acked
        self.status = status
        self.interrupt_status = state.integer(document, "interrupt_status", 0, USED_BUFFER | CONFIG_CHANGE)
        self.generation = state.integer(document, "generation", 0, 0xFFFF_FFFF)
        self.reason = state.text(document, "reason", MAX_REASON)
        self.active = bool(status & Status.DRIVER_OK) and not status & STOPPED
        self.device.load(state.child(document, "device"))
        if self.active:
            self.run(self.device.activate)

    def metrics(self) -> dict[str, int]:
        return {
            "interrupts": self.interrupts,
            "refused": self.refused,
            "failures": self.failures,
            **self.device.metrics(),
        }

    # Inside.

    def _stop(self, why: Status) -> None:
        """Until the reset no queue gives a request or takes an answer, whoever asks."""
        self.status |= why
        self.active = False
        for queue in self.queues:
            queue.stop()

    def _advance(self, step: Status) -> None:
        if step is Status.FEATURES_OK and not self._suitable(self.acked):
            self._refuse()
            return
        self.status |= step
        if step is Status.DRIVER_OK:
            self.active = True
            self.run(self.device.activate)
            for queue in self.queues:  # a driver may have kicked too early
                self.again(queue.index)

    def _suitable(self, acked: int) -> bool:
        return not acked & ~self.features and bool(acked & VERSION_1)

    def _reset(self) -> None:
        self.active = False
        self.run(self.device.reset)
        for queue in self.queues:
            queue.clear()
        self._clear()

    def _notify_again(self, index: int) -> None:
        self._again.discard(index)
        self.notify(index)

    def _raise(self, bit: int) -> None:
        self.interrupt_status |= bit
        self.show_interrupt()  # before the interrupt: its handler reads it
        self.interrupts += 1
        self._interrupt()  # even if the bit was set: a spurious interrupt costs little, a lost one everything

    def _refuse(self) -> None:
        self.refused += 1
