"""For tests of virtio: rings written by hand, and a device that writes down what happens to it."""

from __future__ import annotations

from typing import Any

from posada.errors import StateError
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import DESCRIPTOR, Queue
from posada.vmm.virtio.transport import Status

DESC, AVAIL, USED, DATA = 0x1000, 0x6000, 0x8000, 0x10000
SIZE = 8


class Rings:
    """A queue and its three rings, at fixed places."""

    def __init__(self, size: int = SIZE, **features: bool) -> None:
        self.memory = GuestMemory.anonymous(1 << 20)
        self.queue = Queue(self.memory, 0, 1024)
        self.queue.size = size
        self.queue.desc, self.queue.avail, self.queue.used = DESC, AVAIL, USED
        self.size = size
        self.features = {"indirect": True, "event_idx": True} | features
        self.queue.start(**self.features)

    def desc(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(DESC + 16 * index, DESCRIPTOR.pack(address, length, flags, following))

    def offer(self, *heads: int) -> None:
        index = self.memory.u16(AVAIL + 2)
        for at, head in enumerate(heads):
            self.memory.put_u16(AVAIL + 4 + 2 * ((index + at) % self.size), head)
        self.memory.put_u16(AVAIL + 2, index + len(heads) & 0xFFFF)

    def used(self, at: int) -> tuple[int, int]:
        entry = USED + 4 + 8 * (at % self.size)
        return self.memory.u32(entry), self.memory.u32(entry + 4)

    @property
    def used_index(self) -> int:
        return self.memory.u16(USED + 2)

    def want_interrupt_at(self, index: int) -> None:
        self.memory.put_u16(AVAIL + 4 + 2 * self.size, index)

    @property
    def wants_kick_at(self) -> int:
        return self.memory.u16(USED + 4 + 8 * self.size)


ALL = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class Probe(Device):
    """Writes down what its transport does to it; answers each request with one byte, its request's number."""

    kind = 42
    name = "probe"
    queue_sizes = (64, 16)
    features = 1 << 3 | 1 << 40

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.space = bytearray(b"configur")
        self.error: Exception | None = None
        self.answers = 0

    def config(self) -> bytes:
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        self.space[offset : offset + len(data)] = data

    def config_noticed(self) -> None:
        self.calls.append("noticed")

    def activate(self) -> None:
        self.calls.append("activate")

    def reset(self) -> None:
        self.calls.append("reset")

    def notify(self, index: int) -> None:
        self.calls.append(index)
        if self.error is not None:
            raise self.error
        queue = self.queues[index]
        while (chain := queue.pop()) is not None:
            queue.push(chain, chain.write(bytes([self.answers & 0xFF])))
            self.answers += 1
        self.signal(queue)

    def save(self) -> dict[str, Any]:
        return {"answers": self.answers}

    def load(self, document: dict[str, Any]) -> None:
        if document.get("answers") == "forged":
            raise StateError("forged")
        self.answers = document["answers"]
