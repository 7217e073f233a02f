"""Long indirect tables are read in one go where they are as drivers make them: with the same outcome as step by step."""

from __future__ import annotations

import random

import pytest

from posada.vmm.virtio import queue as queue_module
from posada.vmm.virtio.queue import DESCRIPTOR, INDIRECT, NEXT, WRITE, Chain, QueueError
from posada.vmm.virtio.rng import Rng
from posada.vmm.virtio.testing import FakeDriver

MEMORY = 1 << 20
TABLE = 1 << 19


def popped(driver: FakeDriver, count: int) -> tuple[list[bytes], list[bytes]] | str:
    """The request that one indirect table of ``count`` descriptors makes, or why it is none."""
    driver.start()
    driver.descriptor(0, TABLE, 16 * count, INDIRECT, 0)
    driver.offer(0)
    try:
        chain = driver.device.queues[0].pop()
    except QueueError as error:
        return str(error)
    assert isinstance(chain, Chain)
    return [bytes(view) for view in chain.readable], [bytes(view) for view in chain.writable]


@pytest.mark.parametrize("seed", range(60))
def test_the_same_either_way(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    driver = FakeDriver(Rng(), memory_size=MEMORY)
    driver.memory.write(TABLE + (1 << 16), chance.randbytes(MEMORY - TABLE - (1 << 16)))
    count = chance.choice([2, 8, 9, 100, 256, 1023])
    first = chance.choice([1, count - 1, count, chance.randrange(count)])
    table = []
    for at in range(count):
        address, length = chance.randrange(TABLE + (1 << 16), MEMORY - 512), chance.choice([0, 1, 512])
        table.append([address, length, NEXT | (WRITE if at >= first else 0), at + 1])
    table[-1][2:] = [table[-1][2] & ~NEXT, 0]
    if chance.random() < 0.5:
        at, field = chance.randrange(count), chance.randrange(4)
        table[at][field] = chance.choice([0, 1, 3, count, 0xFFFF, MEMORY - 100, table[at][field] ^ 1])
        table[at][2] &= 0xFFFF
        table[at][3] &= 0xFFFF
    driver.memory.write(TABLE, b"".join(DESCRIPTOR.pack(*entry) for entry in table))
    quick = popped(driver, count)
    monkeypatch.setattr(queue_module, "_LONG", 1 << 20)
    assert quick == popped(driver, count)
