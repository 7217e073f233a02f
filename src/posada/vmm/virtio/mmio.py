"""The MMIO transport (virtio 1.2, section 4.2): the registers of one device, version 2.

`TABLE` below is table 4.1 of the specification. Registers are 32 bits wide and accessed as such; the configuration space
from 0x100 on takes any access of 1 to 8 bytes. Everything else reads as 0 and ignores writes.
"""

from __future__ import annotations

import os
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
    """A `posada.vmm.bus.Bus` device of `SIZE` bytes in front of ``device``; ``line`` is its interrupt."""

    def __init__(self, device: Device, memory: GuestMemory, line: Callable[[], object], loop: Loop) -> None:
        super().__init__(device, memory, line, loop)
        self._reads: dict[int, Callable[[], int]] = {
            Register.MAGIC: lambda: MAGIC,
            Register.VERSION: lambda: 2,
            Register.DEVICE_ID: lambda: self.device.kind,
            Register.VENDOR_ID: lambda: VENDOR,
            Register.DEVICE_FEATURES: lambda: _word(self.features, self._device_sel),
            Register.QUEUE_SIZE_MAX: lambda: self.queues[self._queue_sel].max_size if self._selected else 0,
            Register.QUEUE_READY: lambda: int(self._selected and self.queues[self._queue_sel].ready),
            Register.INTERRUPT_STATUS: lambda: self.interrupt_status,
            Register.STATUS: lambda: int(self.status),
            Register.CONFIG_GENERATION: lambda: self.generation,
            # No device has shared memory: a region that is not there has length and address -1 (section 4.2.2.1).
            Register.SHM_LEN_LOW: lambda: 0xFFFF_FFFF,
            Register.SHM_LEN_HIGH: lambda: 0xFFFF_FFFF,
            Register.SHM_BASE_LOW: lambda: 0xFFFF_FFFF,
            Register.SHM_BASE_HIGH: lambda: 0xFFFF_FFFF,
        }
        self._writes: dict[int, Callable[[int], object]] = {
            Register.DEVICE_FEATURES_SEL: partial(setattr, self, "_device_sel"),
            Register.DRIVER_FEATURES_SEL: partial(setattr, self, "_driver_sel"),
            Register.DRIVER_FEATURES: self._write_features,
            Register.QUEUE_SEL: partial(setattr, self, "_queue_sel"),
            Register.QUEUE_SIZE: self._write_size,
            Register.QUEUE_READY: lambda value: self.set_ready(self._queue_sel, bool(value & 1)),
            Register.QUEUE_NOTIFY: self._write_notify,
            Register.INTERRUPT_ACK: self.acknowledge,
            Register.STATUS: self.set_status,
            **{register: partial(self._write_address, *field) for register, field in _ADDRESSES.items()},
        }

    def watch_kicks(self, index: int, fd: int) -> None:
        """Queue ``index``'s kicks come on this eventfd (KVM's ioeventfd on QUEUE_NOTIFY with this number as data)."""

        def kicked(_: int) -> None:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
            self.notify(index)

        self.loop.watch(fd, kicked)

    def read(self, offset: int, size: int) -> int:
        """A read by a vcpu, ``size`` 1 to 8."""
        if offset >= CONFIG:
            at = offset - CONFIG
            return int.from_bytes(self.device.config()[at : at + size], "little")
        register = self._reads.get(offset)
        return register() if register is not None and size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A write by a vcpu, ``size`` 1 to 8."""
        if offset >= CONFIG:
            at = offset - CONFIG
            if at + size <= len(self.device.config()):
                self.run(partial(self.device.write_config, at, value.to_bytes(size, "little")))
            else:
                self._refuse()
            return
        register = self._writes.get(offset)
        if register is not None and size == 4:
            register(value)
        else:
            self._refuse()

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

    @property
    def _selected(self) -> bool:
        return self._queue_sel < len(self.queues)

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

    def _write_notify(self, value: int) -> None:
        if value < len(self.queues):
            self.again(value)  # devices run on the loop's thread, and this may be a vcpu's


def _word(value: int, select: int) -> int:
    return value >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
