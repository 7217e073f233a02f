"""The split queue against rings that no honest driver writes: each is a QueueError. And indirect tables, right and wrong."""

from __future__ import annotations

import pytest
from virtio_kit import AVAIL, DATA, DESC, SIZE, USED, Rings

from posada.vmm.memory import GIB, GuestMemory
from posada.vmm.virtio.queue import DESCRIPTOR, INDIRECT, MAX_CHAIN, NEXT, WRITE, Queue, QueueError


@pytest.fixture
def rings() -> Rings:
    return Rings()


class TestIndirect:
    def table(self, rings: Rings, *entries: tuple[int, int, int, int]) -> None:
        rings.memory.write(0x20000, b"".join(DESCRIPTOR.pack(*entry) for entry in entries))

    def test_alone_and_behind_direct_ones(self, rings: Rings) -> None:
        self.table(rings, (DATA, 4, NEXT, 2), (0, 0, 0, 0), (DATA + 64, 8, WRITE, 0))
        rings.desc(0, 0x20000, 48, INDIRECT | WRITE)  # section 2.7.5.3.2: WRITE means nothing here
        rings.desc(1, DATA + 32, 2, NEXT, 0)
        rings.offer(0, 1)
        assert rings.queue.pop().readable_size == 4  # type: ignore[union-attr]
        chain = rings.queue.pop()
        assert chain is not None
        assert [len(view) for view in chain.readable] == [2, 4]
        assert chain.writable_size == 8

    @pytest.mark.parametrize("length", [0, 8, 17, 16 * (MAX_CHAIN + 1), 0xFFFF_FFF0])
    def test_a_table_of_no_size(self, rings: Rings, length: int) -> None:
        rings.desc(0, 0x20000, length, INDIRECT)
        rings.offer(0)
        with pytest.raises(QueueError, match="indirect table"):
            rings.queue.pop()

    def test_a_table_outside_memory(self, rings: Rings) -> None:
        rings.desc(0, (1 << 20) - 16, 32, INDIRECT)
        rings.offer(0)
        with pytest.raises(QueueError, match="outside memory"):
            rings.queue.pop()

    def test_nested(self, rings: Rings) -> None:
        self.table(rings, (0x20000, 16, INDIRECT, 0))
        rings.desc(0, 0x20000, 16, INDIRECT)
        rings.offer(0)
        with pytest.raises(QueueError, match="where none may be"):
            rings.queue.pop()

    def test_with_next(self, rings: Rings) -> None:
        self.table(rings, (DATA, 4, 0, 0))
        rings.desc(0, 0x20000, 16, INDIRECT | NEXT, 1)
        rings.offer(0)
        with pytest.raises(QueueError, match="where none may be"):
            rings.queue.pop()

    def test_not_negotiated(self) -> None:
        rings = Rings(indirect=False)
        rings.desc(0, 0x20000, 16, INDIRECT)
        rings.offer(0)
        with pytest.raises(QueueError, match="where none may be"):
            rings.queue.pop()

    def test_a_loop_inside(self, rings: Rings) -> None:
        self.table(rings, (DATA, 4, NEXT, 1), (DATA, 4, NEXT, 0))
        rings.desc(0, 0x20000, 32, INDIRECT)
        rings.offer(0)
        with pytest.raises(QueueError, match="loop"):
            rings.queue.pop()

    def test_next_beyond_the_table(self, rings: Rings) -> None:
        self.table(rings, (DATA, 4, NEXT, 2), (DATA, 4, 0, 0))
        rings.desc(0, 0x20000, 32, INDIRECT)
        rings.offer(0)
        with pytest.raises(QueueError, match="descriptor 2 of 2"):
            rings.queue.pop()

    def test_never_more_buffers_than_preadv_takes(self) -> None:
        rings = Rings(size=1024)
        for index in range(1023):
            rings.desc(index, DATA, 1, NEXT, index + 1)
        self.table(rings, (DATA, 1, 0, 0), (DATA, 1, 0, 0))
        rings.desc(1023, 0x20000, 16, INDIRECT)
        rings.offer(0)
        assert len(rings.queue.pop().readable) == MAX_CHAIN  # type: ignore[union-attr]
        rings.desc(1023, 0x20000, 32, INDIRECT)
        rings.offer(0)
        with pytest.raises(QueueError, match="indirect table"):
            rings.queue.pop()


class TestMalformed:
    def refuse(self, rings: Rings, words: str, head: int = 0) -> None:
        rings.offer(head)
        with pytest.raises(QueueError, match=words):
            rings.queue.pop()

    def test_head_beyond_the_table(self, rings: Rings) -> None:
        self.refuse(rings, "descriptor 8 of 8", head=8)

    def test_next_beyond_the_table(self, rings: Rings) -> None:
        rings.desc(0, DATA, 1, NEXT, 0xFFFF)
        self.refuse(rings, "descriptor 65535 of 8")

    def test_a_loop(self, rings: Rings) -> None:
        rings.desc(0, DATA, 1, NEXT, 1)
        rings.desc(1, DATA, 1, NEXT, 0)
        self.refuse(rings, "loop")

    def test_itself(self, rings: Rings) -> None:
        rings.desc(0, DATA, 1, NEXT, 0)
        self.refuse(rings, "loop")

    def test_the_longest_chain_is_no_loop(self, rings: Rings) -> None:
        for index in range(SIZE):
            rings.desc(index, DATA, 1, NEXT if index < SIZE - 1 else 0, index + 1)
        rings.offer(0)
        assert rings.queue.pop().readable_size == SIZE  # type: ignore[union-attr]

    def test_readable_behind_writable(self, rings: Rings) -> None:
        rings.desc(0, DATA, 1, WRITE | NEXT, 1)
        rings.desc(1, DATA, 1)
        self.refuse(rings, "readable buffer behind a writable")

    @pytest.mark.parametrize(
        ("address", "length"),
        [((1 << 20) - 4, 5), (1 << 20, 1), ((1 << 64) - 1, 1), ((1 << 64) - 1, 0xFFFF_FFFF), (0, (1 << 20) + 1)],
    )
    def test_outside_memory(self, rings: Rings, address: int, length: int) -> None:
        rings.desc(0, address, length)
        self.refuse(rings, "outside memory")

    def test_the_index_runs_away(self, rings: Rings) -> None:
        rings.memory.put_u16(AVAIL + 2, SIZE + 1)
        with pytest.raises(QueueError, match="9 new requests in a ring of 8"):
            rings.queue.pop()

    def test_the_index_goes_back(self, rings: Rings) -> None:
        rings.desc(0, DATA, 1)
        rings.offer(0)
        rings.queue.pop()
        rings.memory.put_u16(AVAIL + 2, 0)
        with pytest.raises(QueueError, match="65535 new requests"):
            rings.queue.pop()


def test_across_the_gap_is_refused() -> None:
    memory = GuestMemory.anonymous(3 * GIB + (1 << 20))
    queue = Queue(memory, 0, SIZE)
    queue.desc, queue.avail, queue.used = DESC, AVAIL, 4 * GIB  # rings may lie on both sides
    queue.start()
    memory.write(DESC, DESCRIPTOR.pack(3 * GIB - 4, 8, WRITE, 0))
    memory.write(DESC + 16, DESCRIPTOR.pack(4 * GIB + 4096, 8, WRITE, 0))
    memory.write(AVAIL + 2, b"\1\0\1\0")
    chain = queue.pop()
    assert chain is not None
    chain.write(b"12345678")
    queue.push(chain, 8)
    assert memory.read(4 * GIB + 4096, 8) == b"12345678"
    assert memory.u16(4 * GIB + 2) == 1
    memory.write(AVAIL + 2, b"\2\0\1\0\0\0")
    with pytest.raises(QueueError, match="outside memory"):
        queue.pop()


def test_a_chain_is_shorter_than_4_gib() -> None:
    memory = GuestMemory.anonymous(3 * GIB)
    queue = Queue(memory, 0, SIZE)
    queue.desc, queue.avail, queue.used = DESC, AVAIL, USED
    queue.start()
    memory.write(DESC, DESCRIPTOR.pack(0, 2 * GIB, NEXT, 1) + DESCRIPTOR.pack(0, 2 * GIB, 0, 0))
    memory.write(AVAIL + 2, b"\1\0\0\0")
    with pytest.raises(QueueError, match="4294967296 bytes"):
        queue.pop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 0}, "size 0"),
        ({"size": 6}, "size 6"),
        ({"size": 2048}, "size 2048"),
        ({"desc": DESC + 8}, "not aligned"),
        ({"avail": AVAIL + 1}, "not aligned"),
        ({"used": USED + 2}, "not aligned"),
        ({"desc": (1 << 20) - 64}, "outside memory"),
        ({"avail": 1 << 63}, "outside memory"),
        ({"used": (1 << 64) - 4}, "outside memory"),
    ],
)
def test_what_start_refuses(change: dict[str, int], words: str) -> None:
    queue = Queue(GuestMemory.anonymous(1 << 20), 0, 1024)
    for name, value in ({"size": 8, "desc": DESC, "avail": AVAIL, "used": USED} | change).items():
        setattr(queue, name, value)
    with pytest.raises(QueueError, match=words):
        queue.start()
    assert not queue.ready


def test_rings_may_end_where_memory_ends() -> None:
    queue = Queue(GuestMemory.anonymous(1 << 20), 0, 1024)
    queue.size, queue.desc, queue.avail = 2, DESC, AVAIL
    queue.used = (1 << 20) - (6 + 2 * 8) & ~3
    queue.start(event_idx=True)
    assert queue.enable_notify() is False
