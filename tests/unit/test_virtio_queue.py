"""The split queue against rings written by hand: what a driver may do works, what it may not is a QueueError."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest
from virtio_kit import AVAIL, DATA, SIZE, USED, Rings

from posada.errors import StateError
from posada.vmm.memory import GuestMemory
from posada.vmm.virtio.queue import NEXT, WRITE, Queue, QueueError


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
