"""What a virtio device is, seen from posada: the base class of every device, and what it may ask of its transport.

A device never sees a register. The transport negotiates with the driver (see `posada.vmm.virtio.transport`), checks the
queues, and calls the hooks below: all on the loop's thread or with `Loop.lock` held, so devices need no locks.

::

    attach ──► activate ──► notify, notify, … ──► reset ──► activate …        (the driver comes and goes)
                  ▲ load                            close                     (the machine does)

A device that meets nonsense from the guest raises QueueError (`Queue.pop` does) or calls `fail`: the driver finds
NEEDS_RESET and the reason is in the metrics and on stderr. A callback that a device gives to the loop itself goes
through `guarded`, so that the same holds there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from posada.vmm.loop import Loop
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.queue import Chain, Queue

BUDGET = 64
"""Requests a device handles before the loop looks after others."""


SETTLE = 0.05
"""Seconds after `Device.config_noticed` in which a driver has read what is new. Linux does it at once, from a work item."""


class Transport(Protocol):
    """What a device may ask of the transport it sits behind."""

    memory: GuestMemory
    queues: list[Queue]
    loop: Loop
    acked: int
    active: bool

    def interrupt_used(self) -> None: ...

    def interrupt_config(self) -> None: ...

    def again(self, index: int) -> None: ...

    def fail(self, reason: str) -> None: ...

    def run(self, call: Callable[[], object]) -> None: ...


class Device:
    """Base class. A device sets the four class attributes and overrides the hooks it needs."""

    kind: int = 0
    """The device's number in section 5."""
    name: str = ""
    """For people and metrics. Unique in a machine: the builder sets it where there are several."""
    queue_sizes: tuple[int, ...] = ()
    """The largest size of each queue; powers of two."""
    features: int = 0
    """The device's own feature bits. The transport adds the general ones."""

    transport: Transport

    # What a device uses.

    @property
    def memory(self) -> GuestMemory:
        return self.transport.memory

    @property
    def queues(self) -> list[Queue]:
        return self.transport.queues

    @property
    def loop(self) -> Loop:
        return self.transport.loop

    @property
    def acked(self) -> int:
        """The feature bits the driver took."""
        return self.transport.acked

    @property
    def active(self) -> bool:
        """DRIVER_OK: the queues may be used."""
        return self.transport.active

    def signal(self, queue: Queue) -> None:
        """Interrupt the driver if it wants to hear of what was pushed on ``queue``. Once per batch, not per request."""
        if queue.wants_interrupt():
            self.transport.interrupt_used()

    def config_changed(self) -> None:
        """`config` gives something new: tell the driver."""
        self.transport.interrupt_config()

    def fail(self, reason: str) -> None:
        """Stop until the driver resets the device. Idempotent; the first reason stays."""
        self.transport.fail(reason)

    def guarded(self, call: Callable[..., object]) -> Callable[..., None]:
        """``call`` for `Loop.watch`, `Loop.timer` …: what it raises makes the device fail, not the monitor."""
        return lambda *arguments: self.transport.run(lambda: call(*arguments))

    def serve(self, queue: Queue, handle: Callable[[Chain], int | None], budget: int = BUDGET) -> None:
        """Answer what is queued: ``handle`` returns the bytes it wrote, or None for *not now*.

        After *not now* the request stays queued, kicks are off, and the device calls `serve` again when it can go on.
        After ``budget`` requests the loop gets its turn first, so that no guest keeps the monitor to itself.
        """
        queue.disable_notify()
        while True:
            while budget and (chain := queue.pop()) is not None:
                written = handle(chain)
                if written is None:
                    queue.put_back(chain)
                    self.signal(queue)
                    return
                queue.push(chain, written)
                budget -= 1
            if not budget:
                self.transport.again(queue.index)
                break
            if not queue.enable_notify():
                break
        self.signal(queue)

    # Hooks.

    def config(self) -> bytes:
        """The configuration space as it is now, always of the same length. Shown to the driver when it is asked for, when
        the driver has written to a register, and by `config_changed`; the driver reads it unnoticed.
        """
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote ``data``, which lies within `config`."""

    def config_noticed(self) -> None:
        """The driver has acknowledged the interrupt of `config_changed`; it will read `config` in a moment."""

    def attach(self, loop: Loop) -> None:
        """Called once, when the device is put behind its transport: watch host descriptors from here on."""

    def activate(self) -> None:
        """DRIVER_OK: features and queues are settled. Also called after `load`, whose work it must not undo."""

    def notify(self, index: int) -> None:
        """Queue ``index`` may hold requests. May come without cause, only while `active`."""

    def reset(self) -> None:
        """The driver is gone: forget its requests, stop what is under way. No guest memory may be touched after this."""

    def quiesce(self) -> None:
        """Finish what is under way, or put it back and ask for it `again`; vcpus stand still.

        `save`, fork or migration follow before the loop's next turn; then the machine may go on.
        """

    def save(self) -> dict[str, Any]:
        """The device's own state as plain data."""
        return {}

    def load(self, document: dict[str, Any]) -> None:
        """Take `save`'s data, which may be forged. Raises StateError, and is then as after `reset`."""

    def reopen(self, given: Mapping[str, Any]) -> None:
        """In a forked child: the descriptors inherited belong to the parent; use those in ``given``."""

    def close(self) -> None:
        """The machine ends. Idempotent."""

    def metrics(self) -> dict[str, int]:
        """Counters since the start."""
        return {}
