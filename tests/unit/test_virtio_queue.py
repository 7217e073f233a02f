"""The split queue against rings written by hand: what a driver may do works, what it may not is a QueueError."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest

from posada.errors import StateError
from posada.vmm.memory import GIB, GuestMemory
from posada.vmm.virtio.queue import DESCRIPTOR, INDIRECT, MAX_CHAIN, NEXT, WRITE, Queue, QueueError

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


@pytest.fixture
def rings() -> Rings:
    return Rings()


def test_nothing_queued(rings: Rings) -> None:
    assert rings.queue.pop() is None


def test_a_chain_of_three(rings: Rings) -> None:
    rings.memory.write(DATA, b"question")
    rings.desc(2, DATA, 8, NEXT, 5)
    rings.desc(5, DATA + 64, 4, NEXT | WRITE, 0)
    rings.desc(0, DATA + 128, 8, WRITE)
    rings.offer(2)
    chain = rings.queue.pop()
    assert chain is not None
    assert chain.read_all(8) == b"question"
    assert [len(view) for view in chain.writable] == [4, 8]
    assert chain.writable_size == 12
    assert chain.write(b"ans") == 3
    assert chain.write(b"wer and more") == 9
    assert rings.memory.read(DATA + 64, 4) == b"answ"
    assert rings.memory.read(DATA + 128, 8) == b"er and m"
    assert chain.write(b"x") == 0
    rings.queue.push(chain, 12)
    assert rings.used_index == 1
    assert rings.used(0) == (2, 12)
    assert rings.queue.pop() is None


def test_read_all_is_bounded(rings: Rings) -> None:
    rings.desc(0, DATA, 9)
    rings.offer(0)
    chain = rings.queue.pop()
    assert chain is not None
    with pytest.raises(QueueError, match="9 bytes"):
        chain.read_all(8)


def test_indices_wrap_at_the_ring_and_at_65536(rings: Rings) -> None:
    for index in range(SIZE):
        rings.desc(index, DATA + index, 1)
    for turn in range(0x10000 // 5 + 10):
        heads = [(turn + at) % SIZE for at in range(5)]
        rings.offer(*heads)
        for head in heads:
            chain = rings.queue.pop()
            assert chain is not None
            assert chain.head == head
            rings.queue.push(chain, head)
        assert rings.queue.pop() is None
        assert rings.used_index == (turn + 1) * 5 & 0xFFFF
        assert rings.used((turn + 1) * 5 - 1) == (heads[-1], heads[-1])


def test_entries_that_come_while_a_batch_is_handled(rings: Rings) -> None:
    for index in range(SIZE):
        rings.desc(index, DATA, 1)
    rings.offer(0, 1)
    assert rings.queue.pop().head == 0  # type: ignore[union-attr]
    rings.offer(2)
    assert [rings.queue.pop().head for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    assert rings.queue.pop() is None


def test_answers_in_any_order(rings: Rings) -> None:
    for index in range(3):
        rings.desc(index, DATA, 1)
    rings.offer(0, 1, 2)
    chains = [rings.queue.pop() for _ in range(3)]
    for chain in reversed(chains):
        assert chain is not None
        rings.queue.push(chain, 0)
    assert [rings.used(at)[0] for at in range(3)] == [2, 1, 0]


def test_put_back(rings: Rings) -> None:
    rings.desc(3, DATA, 1)
    rings.desc(4, DATA, 1)
    rings.offer(3, 4)
    first = rings.queue.pop()
    assert first is not None
    rings.queue.put_back(first)
    again = rings.queue.pop()
    assert again is not None
    assert again.head == 3
    assert rings.queue.pop().head == 4  # type: ignore[union-attr]


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


class TestInterrupts:
    def push(self, rings: Rings, count: int = 1) -> None:
        for _ in range(count):
            rings.desc(0, DATA, 1)
            rings.offer(0)
            chain = rings.queue.pop()
            assert chain is not None
            rings.queue.push(chain, 0)

    def test_by_index(self, rings: Rings) -> None:
        assert not rings.queue.wants_interrupt()
        rings.want_interrupt_at(2)
        self.push(rings, 2)
        assert not rings.queue.wants_interrupt()
        self.push(rings)
        assert rings.queue.wants_interrupt()
        assert not rings.queue.wants_interrupt()  # told once
        self.push(rings, 3)
        assert not rings.queue.wants_interrupt()  # the index is behind us

    def test_a_batch_that_passes_the_index(self, rings: Rings) -> None:
        rings.want_interrupt_at(1)
        self.push(rings, 5)
        assert rings.queue.wants_interrupt()

    def test_by_flag(self) -> None:
        rings = Rings(event_idx=False)
        self.push(rings)
        assert rings.queue.wants_interrupt()
        rings.memory.put_u16(AVAIL, 1)
        self.push(rings)
        assert not rings.queue.wants_interrupt()


class TestKicks:
    def test_by_index(self, rings: Rings) -> None:
        rings.desc(0, DATA, 1)
        rings.offer(0)
        assert rings.queue.enable_notify()  # there is one already
        rings.queue.disable_notify()
        assert rings.queue.pop() is not None
        assert not rings.queue.enable_notify()
        assert rings.wants_kick_at == 1
        rings.offer(0)
        assert rings.queue.enable_notify()

    def test_by_flag(self) -> None:
        rings = Rings(event_idx=False)
        rings.queue.disable_notify()
        assert rings.memory.u16(USED) == 1
        assert not rings.queue.enable_notify()
        assert rings.memory.u16(USED) == 0


def test_chains_of_a_reset_queue_are_stale(rings: Rings) -> None:
    rings.desc(0, DATA, 1)
    rings.offer(0)
    chain = rings.queue.pop()
    assert chain is not None
    rings.queue.stop()
    rings.queue.start(**rings.features)
    rings.queue.push(chain, 1)
    rings.queue.put_back(chain)
    assert rings.used_index == 0
    assert rings.queue.pop().head == 0  # type: ignore[union-attr]


def test_a_stopped_queue_touches_nothing(rings: Rings) -> None:
    before = rings.memory.read(0, 1 << 20)
    rings.queue.stop()
    assert rings.queue.pop() is None
    rings.queue.disable_notify()
    assert rings.queue.enable_notify() is False
    assert rings.queue.wants_interrupt() is False
    assert rings.memory.read(0, 1 << 20) == before


def test_writes_are_told() -> None:
    """KVM's dirty log does not see what this process writes."""
    rings = Rings()
    told: list[tuple[int, int]] = []
    rings.queue.written = lambda address, length: told.append((address, length))
    rings.desc(0, DATA, 4, NEXT, 1)
    rings.desc(1, DATA + 64, 8, WRITE)
    rings.offer(0)
    chain = rings.queue.pop()
    assert chain is not None
    assert told == []
    rings.queue.push(chain, 8)
    assert told == [(USED, 6 + 8 * SIZE), (DATA + 64, 8)]


class TestSavedState:
    def test_goes_on_where_it_was(self, rings: Rings) -> None:
        for index in range(3):
            rings.desc(index, DATA + index, 1)
        rings.offer(0, 1, 2)
        first = rings.queue.pop()
        assert first is not None
        rings.queue.push(first, 0)
        other = Queue(rings.memory, 0, 1024)
        other.load(rings.queue.save())
        assert other.save() == rings.queue.save()
        second = other.pop()
        assert second is not None
        assert second.head == 1
        other.push(second, 1)
        assert rings.used_index == 2
        assert rings.used(1) == (1, 1)

    def test_a_queue_that_was_never_set_up(self) -> None:
        memory = GuestMemory.anonymous(1 << 20)
        queue = Queue(memory, 0, 64)
        queue.load(Queue(memory, 0, 64).save())
        assert not queue.ready

    @pytest.mark.parametrize(
        "forged",
        [
            {"size": 3}, {"size": 1 << 40}, {"size": -1}, {"size": True}, {"desc": 1 << 64}, {"desc": 1 << 40},
            {"avail": None}, {"used": (1 << 20) - 4}, {"ready": 1}, {"next_avail": 0x10000}, {"next_avail": 9},
            {"next_used": 1}, {"signalled": -1}, {"event_idx": "yes"}, {"indirect": None},
        ],
    )  # fmt: skip
    def test_forged(self, rings: Rings, forged: dict[str, object]) -> None:
        with pytest.raises(StateError):
            Queue(rings.memory, 0, 1024).load(rings.queue.save() | forged)

    @pytest.mark.parametrize("key", sorted(Queue(GuestMemory.anonymous(4096), 0, 1).save()))
    def test_missing(self, rings: Rings, key: str) -> None:
        document = rings.queue.save()
        del document[key]
        with pytest.raises(StateError):
            Queue(rings.memory, 0, 1024).load(document)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.thread_info.lock != "semaphore" or sys.version_info >= (3, 14),
    reason="the lock is not made of a semaphore here",
)
@pytest.mark.parametrize("function", ["sem_trywait", "sem_post"])
def test_the_fence_is_a_locked_instruction(function: str) -> None:
    address = ctypes.cast(getattr(ctypes.CDLL(None), function), ctypes.c_void_p).value
    assert address is not None
    # SAFETY: code of libc, mapped readable; the smallest of the two functions is longer than 32 bytes.
    code = ctypes.string_at(address, 48)
    assert b"\xf0\x48\x0f\xb1" in code or b"\xf0\x0f\xb1" in code  # lock cmpxchg


def test_the_fence_is_never_contended(rings: Rings) -> None:
    assert rings.queue._barrier.acquire(blocking=False)
    rings.queue._barrier.release()
