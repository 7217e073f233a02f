"""A guest driver in Python, for tests: it negotiates, makes queues and sends requests, with no guest and no KVM.

::

    driver = FakeDriver(Rng())                    # negotiated, DRIVER_OK
    assert len(driver.send(writable=[64])) == 64  # one request, kicked and answered

`put`, `kick` and `collect` are the steps of `send`. `descriptor`, `offer` and `set_avail` write into the rings what no
real driver would. Device code that raises something other than a guest's fault raises through into the test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from posada.proto import cbor
from posada.vmm.loop import Loop
from posada.vmm.memory import BadAddress, GuestMemory
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.mmio import CONFIG, MmioTransport, Register
from posada.vmm.virtio.queue import DESCRIPTOR, INDIRECT, NEXT, WRITE, QueueError
from posada.vmm.virtio.transport import EVENT_IDX, Status

PAGE = 4096
MAX_TURNS = 10_000


class StrictTransport(MmioTransport):
    """Only a guest's fault becomes NEEDS_RESET; an error of ours is the test's."""

    def run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (QueueError, BadAddress) as error:
            self.fail(str(error))


class Request(NamedTuple):
    """What was put into a queue: where its writable buffers are, as (address, size)."""

    head: int
    writable: tuple[tuple[int, int], ...]


class Done(NamedTuple):
    """A request that came back: ``written`` as the device says, and that many bytes of its writable buffers."""

    head: int
    written: int
    data: bytes


class Ring:
    """The driver's view of one queue. Addresses are guest-physical."""

    def __init__(self, size: int, desc: int, avail: int, used: int) -> None:
        self.size = size
        self.desc, self.avail, self.used = desc, avail, used
        self.free = list(range(size - 1, -1, -1))
        self.next_avail = self.seen = 0
        self.requests: dict[int, tuple[Request, list[int]]] = {}  # head → request, descriptors it took


class FakeDriver:
    """Drives ``device`` over a `GuestMemory` of ``memory_size`` bytes. ``size``: entries per queue, at most its maximum.

    ``features``: what the driver takes of the offer (default: all).
    """

    def __init__(
        self,
        device: Device,
        *,
        memory: GuestMemory | None = None,
        memory_size: int = 16 << 20,
        size: int | None = None,
        features: int = (1 << 64) - 1,
        loop: Loop | None = None,
        start: bool = True,
    ) -> None:
        self.device = device
        self.memory = memory or GuestMemory.anonymous(memory_size)
        self.loop = loop or Loop()
        self.interrupts = 0
        self.transport = StrictTransport(device, self.memory, self._interrupt, self.loop)
        self.size = size
        self.features = features
        self.rings: list[Ring] = []
        if start:
            self.start()

    def start(self) -> None:
        """Reset and negotiate, up to DRIVER_OK."""
        self.negotiate()
        self.make_queues()
        self.add_status(Status.DRIVER_OK)
        self.spin()

    def negotiate(self) -> None:
        """Up to FEATURES_OK. AssertionError if the device refuses the features."""
        self.write(Register.STATUS, 0)
        self.add_status(Status.ACKNOWLEDGE)
        self.add_status(Status.DRIVER)
        for half in (0, 1):
            self.write(Register.DEVICE_FEATURES_SEL, half)
            self.write(Register.DRIVER_FEATURES_SEL, half)
            wanted = self.features >> 32 * half & 0xFFFF_FFFF
            self.write(Register.DRIVER_FEATURES, self.read(Register.DEVICE_FEATURES) & wanted)
        self.add_status(Status.FEATURES_OK)
        assert self.read(Register.STATUS) & Status.FEATURES_OK, "the device refuses the features"

    def make_queues(self) -> None:
        """Lay out the rings from page 1 on, and enable every queue."""
        self.rings = []
        self._free = PAGE
        for index in range(len(self.device.queue_sizes)):
            self.write(Register.QUEUE_SEL, index)
            size = min(self.size or 1 << 16, self.read(Register.QUEUE_SIZE_MAX))
            ring = Ring(size, self.allocate(16 * size), self.allocate(6 + 2 * size), self.allocate(6 + 8 * size))
            self.rings.append(ring)
            self.memory.write(ring.avail, bytes(6 + 2 * size))
            self.memory.write(ring.used, bytes(6 + 8 * size))
            self.write(Register.QUEUE_SIZE, size)
            for register, address in (
                (Register.QUEUE_DESC_LOW, ring.desc),
                (Register.QUEUE_DRIVER_LOW, ring.avail),
                (Register.QUEUE_DEVICE_LOW, ring.used),
            ):
                self.write(register, address & 0xFFFF_FFFF)
                self.write(Register(register + 4), address >> 32)
            self.write(Register.QUEUE_READY, 1)
        self._heap = self._free

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes, page-aligned, never freed before the heap is empty."""
        address = self._free
        self._free += -(-size // PAGE) * PAGE
        assert self._free <= self.memory.regions[0].size, "FakeDriver: out of guest memory"
        return address

    # Requests.

    def send(self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), queue: int = 0) -> bytes:
        """One request, kicked and answered: what the device wrote. AssertionError if it does not answer at once."""
        head = self.put(readable, writable, queue).head
        self.kick(queue)
        for done in self.collect(queue):
            if done.head == head:
                return done.data
        raise AssertionError(f"{self.device.name} gave no answer: {self.transport.reason or 'request pending'}")

    def put(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), queue: int = 0, *, indirect: bool = False
    ) -> Request:
        """Queue one request without a kick. Writable buffers are filled with 0xEE first."""
        ring = self.rings[queue]
        if not ring.requests and not any(other.requests for other in self.rings):
            self._free = self._heap
        buffers: list[tuple[int, int, int]] = []
        for data in readable:
            buffers.append((self.allocate(len(data)), len(data), 0))
            self.memory.write(buffers[-1][0], data)
        for size in writable:
            buffers.append((self.allocate(size), size, WRITE))
            self.memory.write(buffers[-1][0], b"\xee" * size)
        slots = [ring.free.pop() for _ in range(1 if indirect else len(buffers))]
        if indirect:
            table = self.allocate(16 * len(buffers))
            self._chain(table, list(range(len(buffers))), buffers)
            self.descriptor(slots[0], table, 16 * len(buffers), INDIRECT, 0, queue=queue)
        else:
            self._chain(ring.desc, slots, buffers)
        request = Request(slots[0], tuple((address, size) for address, size, flags in buffers if flags))
        ring.requests[request.head] = (request, slots)
        self.offer(request.head, queue=queue)
        return request

    def kick(self, queue: int = 0) -> None:
        """Notify, as an ioeventfd would, and let the loop work."""
        self.transport.notify(queue)
        self.spin()

    def collect(self, queue: int = 0) -> list[Done]:
        """What came back since the last call. Asks for an interrupt at the next one."""
        ring = self.rings[queue]
        found = []
        while ring.seen != self.memory.u16(ring.used + 2):
            entry = ring.used + 4 + 8 * (ring.seen % ring.size)
            head, written = self.memory.u32(entry), self.memory.u32(entry + 4)
            ring.seen = ring.seen + 1 & 0xFFFF
            request, slots = ring.requests.pop(head)
            ring.free.extend(reversed(slots))
            data = b"".join(self.memory.read(address, size) for address, size in request.writable)
            assert written <= len(data), "the device says it wrote more than there is room for"
            found.append(Done(head, written, data[:written]))
        self.memory.put_u16(ring.avail + 4 + 2 * ring.size, ring.seen)
        return found

    def kick_wanted(self, queue: int = 0) -> bool:
        """Whether the device asked for a kick at the next request."""
        ring = self.rings[queue]
        if self.transport.acked & EVENT_IDX:
            return self.memory.u16(ring.used + 4 + 8 * ring.size) == ring.next_avail
        return not self.memory.u16(ring.used) & 1

    # Raw access.

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int, *, queue: int = 0) -> None:
        """Write one descriptor, whatever it says."""
        self.memory.write(self.rings[queue].desc + 16 * index, DESCRIPTOR.pack(address, length, flags, following))

    def offer(self, head: int, *, queue: int = 0) -> None:
        """Put ``head`` into the available ring and count its index up."""
        ring = self.rings[queue]
        self.memory.put_u16(ring.avail + 4 + 2 * (ring.next_avail % ring.size), head)
        self.set_avail(ring.next_avail + 1 & 0xFFFF, queue=queue)

    def set_avail(self, index: int, *, queue: int = 0) -> None:
        """Set the available index."""
        self.rings[queue].next_avail = index
        self.memory.put_u16(self.rings[queue].avail + 2, index)

    def read(self, register: int) -> int:
        return self.transport.read(register, 4)

    def write(self, register: int, value: int) -> None:
        self.transport.write(register, 4, value)

    def add_status(self, status: Status) -> None:
        self.write(Register.STATUS, self.read(Register.STATUS) | status)

    def config(self, length: int | None = None) -> bytes:
        """The configuration space, read byte by byte."""
        count = len(self.device.config()) if length is None else length
        return bytes(self.transport.read(CONFIG + at, 1) for at in range(count))

    # The world around.

    @property
    def needs_reset(self) -> bool:
        return bool(self.read(Register.STATUS) & Status.NEEDS_RESET)

    def spin(self) -> None:
        """Let the loop do what is ready, without waiting. AssertionError if the device never comes to an end."""
        for _ in range(MAX_TURNS):
            self.loop.stop()
            self.loop.run()
            if not self.transport.pending:
                return
        raise AssertionError(f"{self.device.name} is still busy after {MAX_TURNS} turns of the loop")

    def until(self, condition: Callable[[], object], timeout: float = 5.0) -> None:
        """Run the loop until ``condition`` holds. AssertionError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "FakeDriver.until: it never held"
            self.loop.timer(0.002, self.loop.stop)
            self.loop.run()

    def moved(self, device: Device) -> FakeDriver:
        """The same guest on ``device``, of the same kind, which loads what this one saves (through CBOR)."""
        self.device.quiesce()
        other = FakeDriver(device, memory=self.memory, size=self.size, features=self.features, start=False)
        other.transport.load(cbor.decode_map(cbor.encode(self.transport.save())))
        other.rings = self.rings
        other._free, other._heap = self._free, self._heap
        other.transport.kick()
        other.spin()
        return other

    def _interrupt(self) -> None:
        self.interrupts += 1

    def _chain(self, table: int, slots: list[int], buffers: list[tuple[int, int, int]]) -> None:
        for at, (slot, (address, length, flags)) in enumerate(zip(slots, buffers, strict=True)):
            last = at + 1 == len(slots)
            following = 0 if last else slots[at + 1]
            self.memory.write(
                table + 16 * slot, DESCRIPTOR.pack(address, length, flags | (0 if last else NEXT), following)
            )
