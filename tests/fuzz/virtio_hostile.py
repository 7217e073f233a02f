"""A hostile driver in front of a real device: `run` takes any bytes as what it does, and fails only on a bug.

The bytes are a program: an opcode, then its operands (`Program`). Whatever it does, these hold: nothing but a guest's
fault is raised in the device, and it becomes NEEDS_RESET with a reason in printable words; the memory around the guest's
stays as it is; the device comes to an end of its work; reset, it serves an honest driver.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from posada.errors import StateError
from posada.vmm.loop import Loop
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.mmio import CONFIG, Register
from posada.vmm.virtio.queue import INDIRECT, NEXT, WRITE
from posada.vmm.virtio.testing import FakeDriver

MEMORY = 2 << 20
CANARY = b"\xc3" * 4096
REGISTERS = [*Register, 0x0AC, 0x0C0, 0x001, 0xFFC]


class ShiftingMemory(GuestMemory):
    """Memory that another vcpu changes while the device looks: ``shift`` runs after some of the looks."""

    shift: Callable[[], None] | None = None

    def view(self, address: int, length: int) -> memoryview:
        found = super().view(address, length)
        if self.shift is not None:
            shift, self.shift = self.shift, None
            shift()
        return found


class World:
    """A device with its surroundings. ``honest`` checks that it serves; ``poke`` does something at its host side."""

    def __init__(self) -> None:
        self.device = self.make()

    def make(self) -> Device:
        raise NotImplementedError

    def honest(self, driver: FakeDriver) -> None:
        raise NotImplementedError

    def request(self, program: Program, queue: int) -> tuple[list[bytes], list[int]]:
        """Buffers of a request that is almost right."""
        return [program.bytes(program.byte() % 40)], [program.byte() * 16, program.byte()]

    def poke(self, program: Program) -> None:
        pass

    def settle(self) -> None:
        """The host's side does what the device waits for in `Device.quiesce`."""

    def close(self) -> None:
        self.device.close()


class Program:
    """Reads operands off the fuzzer's bytes; zeroes when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def more(self) -> bool:
        return self.at < len(self.data)

    def bytes(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece.ljust(count, b"\0")

    def byte(self) -> int:
        return self.bytes(1)[0]

    def word(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def pick(self, values: list[Any]) -> Any:
        return values[self.byte() % len(values)]

    def number(self) -> int:
        """A value that tends to be at some edge."""
        kind = self.byte()
        if kind < 40:
            return self.word(8)
        edges = [0, 1, 2, 15, 16, 64, 4096, 0x7FFF, 0xFFFF, MEMORY - 1, MEMORY, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 63]
        return max(0, edges[kind % len(edges)] + self.byte() % 5 - 2) & 0xFFFF_FFFF_FFFF_FFFF


class Hostile:
    """Runs one program against one world."""

    def __init__(self, world: World, program: Program) -> None:
        self.world = world
        self.program = program
        self.memory = ShiftingMemory.anonymous(MEMORY)
        self.guards = self._place_guards()
        features = (1 << 64) - 1 if program.byte() & 1 else program.word(8) | 1 << 32
        self.driver = FakeDriver(world.device, memory=self.memory, size=8, features=features)
        self.operations = [
            self.descriptor, self.descriptor, self.indirect_table, self.offer, self.offer, self.offer, self.kick, self.kick,
            self.almost_right, self.almost_right, self.register, self.config, self.scribble, self.avail_index, self.shift,
            self.collect, self.restart, self.status, self.poke, self.move, self.forge, self.pause,
        ]  # fmt: skip

    def run(self) -> None:
        while self.program.more:
            self.program.pick(self.operations)()
            self.check()
        self.memory.shift = None
        self.driver.spin()
        self.check()
        self.driver.features = (1 << 64) - 1
        self.driver.start()
        self.world.honest(self.driver)
        assert not self.driver.needs_reset, self.driver.transport.reason
        self.check()

    def check(self) -> None:
        transport = self.driver.transport
        if self.driver.needs_reset:
            assert transport.reason.isprintable() and 0 < len(transport.reason) < 300
            assert not transport.active
        assert all(self.memory.mapping[at : at + 4096] == CANARY for at in self.guards), "outside guest memory"

    @property
    def queue(self) -> int:
        return self.program.byte() % len(self.driver.rings)

    def descriptor(self) -> None:
        program = self.program
        address = program.pick([program.number, lambda: 0x100000 + program.word(2), lambda: MEMORY - program.byte()])()
        self.driver.descriptor(
            program.byte() % 8,
            address,
            program.number() & 0xFFFF_FFFF if program.byte() & 1 else program.byte(),
            program.pick([0, WRITE, NEXT, NEXT, WRITE | NEXT, INDIRECT, 0xFFFF]),
            program.byte() % 10,
            queue=self.queue,
        )

    def indirect_table(self) -> None:
        """A descriptor with a table of up to 4 entries behind it."""
        program, queue, base = self.program, self.queue, 0x180000
        count = program.byte() % 5
        for at in range(count):
            flags = program.pick([NEXT, NEXT, NEXT | WRITE, WRITE, 0, INDIRECT])
            entry = (
                0x190000 + program.word(2),
                program.byte(),
                flags,
                at + 1 if program.byte() & 7 else program.byte(),
            )
            self.memory.write(base + 16 * at, entry[0].to_bytes(8, "little") + entry[1].to_bytes(4, "little"))
            self.memory.write(base + 16 * at + 12, bytes([entry[2], 0, entry[3], 0]))
        length = 16 * count if program.byte() & 7 else program.word(4)
        self.driver.descriptor(program.byte() % 8, base, length, INDIRECT, 0, queue=queue)

    def offer(self) -> None:
        head = self.program.byte()
        self.driver.offer(head % 8 if head < 250 else head * 257, queue=self.queue)

    def kick(self) -> None:
        if self.program.byte() & 1:
            self.driver.kick(self.program.byte() % 6)
        else:
            self.driver.write(Register.QUEUE_NOTIFY, self.program.byte() % 6)
            self.driver.spin()

    def almost_right(self) -> None:
        queue = self.queue
        ring = self.driver.rings[queue]
        readable, writable = self.world.request(self.program, queue)
        if self.driver._free > 0x100000:
            self.driver._free = self.driver._heap  # over requests that are still under way
        if len(readable) + len(writable) <= len(ring.free):
            self.driver.put(readable, writable, queue, indirect=bool(self.program.byte() & 1 and ring.free))
            self.driver.kick(queue)

    def register(self) -> None:
        offset = self.program.pick(REGISTERS)
        size = self.program.pick([4, 4, 4, 1, 2, 8])
        self.driver.transport.write(offset, size, self.program.number() & (1 << 8 * size) - 1)
        assert 0 <= self.driver.transport.read(offset, size) < 1 << 8 * size

    def config(self) -> None:
        at, size = CONFIG + self.program.byte() % 64, self.program.byte() % 8 + 1
        assert 0 <= self.driver.transport.read(at, size) < 1 << 8 * size
        self.driver.transport.write(at, size, self.program.word(size))

    def scribble(self) -> None:
        """Into the rings themselves, or anywhere."""
        ring = self.driver.rings[self.queue]
        place = self.program.pick([ring.desc, ring.avail, ring.used, self.program.word(3) % (MEMORY - 64)])
        self.memory.write(place + self.program.byte() % 64, self.program.bytes(self.program.byte() % 16))

    def avail_index(self) -> None:
        ring = self.driver.rings[queue := self.queue]
        self.driver.set_avail(ring.next_avail + self.program.word(2) & 0xFFFF, queue=queue)

    def shift(self) -> None:
        """Change memory right after the device's next look at it."""
        place, data = self.program.word(3) % (MEMORY - 64), self.program.bytes(16)
        ring = self.driver.rings[self.queue]
        place = self.program.pick([place, ring.desc, ring.avail, 0x180000])
        self.memory.shift = lambda: self.memory.write(place, data)

    def collect(self) -> None:
        """As far as the rings still make sense to the driver."""
        queue = self.queue
        try:
            self.driver.collect(queue)
        except (KeyError, AssertionError):
            pass

    def restart(self) -> None:
        self.memory.shift = None
        self.driver.start()

    def status(self) -> None:
        self.driver.write(Register.STATUS, self.program.byte())

    def poke(self) -> None:
        self.world.poke(self.program)
        self.driver.spin()

    def pause(self) -> None:
        """As around a snapshot of a machine that goes on."""
        self.world.settle()
        self.driver.device.quiesce()
        self.driver.transport.save()
        self.driver.transport.kick()
        self.driver.spin()

    def move(self) -> None:
        self.world.settle()
        old = self.world.device
        old.quiesce()
        self.world.device = self.world.make()
        driver = self.driver
        try:
            self.driver = driver.moved(self.world.device)
        except StateError:  # the guest moved its own rings out of memory, say: the machine is lost, not the monitor
            self.driver = FakeDriver(self.world.device, memory=self.memory, size=8)
        old.close()
        driver.loop.close()

    def forge(self) -> None:
        """Load a saved state with one value changed."""
        document = self.driver.transport.save()
        target: dict[str, Any] = document
        while True:
            key = self.program.pick(sorted(target))
            value = target[key]
            if isinstance(value, list) and value:
                value = self.program.pick(value)
            if not isinstance(value, dict) or not value:
                break
            target = value
        target[key] = self.program.pick([None, -1, True, "x", b"x", [], {}, self.program.number()])
        other = self.world.make()
        loop = Loop()
        try:
            FakeDriver(other, memory=self.memory, start=False, loop=loop).transport.load(document)
        except StateError:
            pass
        other.close()
        loop.close()
        self.rejoin()

    def rejoin(self) -> None:
        """A host side that `make` replaced belongs to the device it made: start over with a new one."""
        self.world.device.close()
        self.driver.loop.close()
        self.world.device = self.world.make()
        self.driver = FakeDriver(self.world.device, memory=self.memory, size=8)

    def _place_guards(self) -> list[int]:
        """The pages right before and behind guest memory, inside its mapping, filled with a pattern."""
        region = self.memory.regions[0]
        around = [region.offset - 4096, region.offset + region.size]
        inside = [at for at in around if 0 <= at <= len(self.memory.mapping) - 4096]
        assert inside, "no room for guards"
        for at in inside:
            self.memory.mapping[at : at + 4096] = CANARY
        return inside

    def close(self) -> None:
        self.world.close()
        self.driver.loop.close()


def run(world: type[World], data: bytes) -> None:
    """One program. AssertionError, or whatever the device raised, is a bug."""
    hostile = Hostile(world(), Program(data))
    try:
        hostile.run()
    finally:
        hostile.close()


def quiet() -> None:
    """Failures of devices are what this is about; stderr need not hear of each."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
