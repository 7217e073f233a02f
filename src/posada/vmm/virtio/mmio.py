"""The MMIO transport (virtio 1.2, section 4.2): the registers of one device, version 2.

Registers are 32 bits wide and written as such; the configuration space from 0x100 on takes any write of 1 to 8 bytes that
lies within it. Everything else reads as 0 and ignores writes.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

from posada.vmm import state
from posada.vmm.loop import Loop
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.transport import Transport

SIZE = 0x1000
CONFIG = 0x100
MAGIC = 0x74726976  # "virt"
VENDOR = 0x41534F50  # "POSA"


class Register(IntEnum):
    """Offsets, table 4.1."""

    MAGIC = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_SIZE_MAX = 0x034
    QUEUE_SIZE = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    CONFIG_GENERATION = 0x0FC


_ADDRESSES = {
    Register.QUEUE_DESC_LOW: ("desc", 0),
    Register.QUEUE_DESC_HIGH: ("desc", 32),
    Register.QUEUE_DRIVER_LOW: ("avail", 0),
    Register.QUEUE_DRIVER_HIGH: ("avail", 32),
    Register.QUEUE_DEVICE_LOW: ("used", 0),
    Register.QUEUE_DEVICE_HIGH: ("used", 32),
}


class MmioTransport(Transport):
    """A `posada.vmm.bus.Bus` device of `SIZE` bytes in front of ``device``; ``line`` is its interrupt.

    What the registers read as always stands in ``page`` (`SIZE` bytes), so that the guest can be given it as read-only
    memory and reads them without an exit; `posada.vmm.virtio.pages` says how, and what follows from that.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        line: Callable[[], object],
        loop: Loop,
        page: memoryview | None = None,
    ) -> None:
        self._page = memoryview(bytearray(SIZE)) if page is None else page
        self._words = self._page.cast("I")
        self._writes: dict[int, Callable[[int], object]] = {
            Register.DEVICE_FEATURES_SEL: partial(setattr, self, "_device_sel"),
            Register.DRIVER_FEATURES_SEL: partial(setattr, self, "_driver_sel"),
            Register.DRIVER_FEATURES: self._write_features,
            Register.QUEUE_SEL: partial(setattr, self, "_queue_sel"),
            Register.QUEUE_SIZE: self._write_size,
            Register.QUEUE_READY: lambda value: self.set_ready(self._queue_sel, bool(value & 1)),
            Register.INTERRUPT_ACK: self.acknowledge,
            Register.STATUS: self.set_status,
            **{register: partial(self._write_address, *field) for register, field in _ADDRESSES.items()},
        }
        super().__init__(device, memory, line, loop)
        for register, value in (
            (Register.MAGIC, MAGIC),
            (Register.VERSION, 2),
            (Register.DEVICE_ID, device.kind),
            (Register.VENDOR_ID, VENDOR),
            # No device has shared memory: a region that is not there has length and address -1 (section 4.2.2.1).
            (Register.SHM_LEN_LOW, 0xFFFF_FFFF),
            (Register.SHM_LEN_HIGH, 0xFFFF_FFFF),
            (Register.SHM_BASE_LOW, 0xFFFF_FFFF),
            (Register.SHM_BASE_HIGH, 0xFFFF_FFFF),
        ):
            self._words[register >> 2] = value
        self.show()

    def watch_kicks(self, index: int, fd: int) -> None:
        """Queue ``index``'s kicks come on this eventfd (KVM's ioeventfd on QUEUE_NOTIFY with this number as data)."""
        # Edge-triggered: each kick is an event, and nobody has to read the count.
        self.loop.watch(fd, lambda _: self.notify(index), select.EPOLLIN | select.EPOLLET)

    def read(self, offset: int, size: int) -> int:
        """A read by a vcpu, ``size`` 1 to 8."""
        return int.from_bytes(self._page[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A write by a vcpu, ``size`` 1 to 8."""
        if offset == Register.QUEUE_NOTIFY:
            if value < len(self.queues):
                self.again(value)  # devices run on the loop's thread, and this may be a vcpu's
            return
        if offset >= CONFIG:
            at = offset - CONFIG
            if at + size <= len(self.device.config()):
                self.run(partial(self.device.write_config, at, value.to_bytes(size, "little")))
            else:
                self._refuse()
        elif (register := self._writes.get(offset)) is not None and size == 4:
            register(value)
        else:
            self._refuse()
        self.show()

    def show(self) -> None:
        words, config = self._words, self.device.config()
        space = self._page[CONFIG : CONFIG + len(config)]
        if space != config:  # the guest may be reading: don't touch what is right
            space[:] = config
        queue = self.queues[self._queue_sel] if self._queue_sel < len(self.queues) else None
        words[Register.DEVICE_FEATURES >> 2] = _word(self.features, self._device_sel)
        words[Register.QUEUE_SIZE_MAX >> 2] = queue.max_size if queue else 0
        words[Register.QUEUE_READY >> 2] = int(queue.ready) if queue else 0
        words[Register.CONFIG_GENERATION >> 2] = self.generation
        words[Register.STATUS >> 2] = self.status
        words[Register.INTERRUPT_STATUS >> 2] = self.interrupt_status

    def show_interrupt(self) -> None:
        self._words[Register.INTERRUPT_STATUS >> 2] = self.interrupt_status

    def save(self) -> dict[str, Any]:
        selectors = {"device_sel": self._device_sel, "driver_sel": self._driver_sel, "queue_sel": self._queue_sel}
        return super().save() | selectors

    def _load(self, document: dict[str, Any]) -> None:
        super()._load(document)
        self._device_sel, self._driver_sel, self._queue_sel = (
            state.integer(document, key, 0, 0xFFFF_FFFF) for key in ("device_sel", "driver_sel", "queue_sel")
        )

    def _clear(self) -> None:
        super()._clear()
        self._device_sel = self._driver_sel = self._queue_sel = 0

    def _write_features(self, value: int) -> None:
        if self._driver_sel < 2:
            shift = 32 * self._driver_sel
            self.set_features(self.acked & ~(0xFFFF_FFFF << shift) | value << shift)
        elif value:
            self._refuse()

    def _write_size(self, value: int) -> None:
        queue = self.configurable(self._queue_sel)
        if queue is not None and not queue.ready:
            queue.size = value  # `Queue.start` checks it

    def _write_address(self, field: str, shift: int, value: int) -> None:
        queue = self.configurable(self._queue_sel)
        if queue is not None and not queue.ready:
            other = getattr(queue, field) & ~(0xFFFF_FFFF << shift)
            setattr(queue, field, other | value << shift)


def _word(value: int, select: int) -> int:
    return value >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
