"""The split virtqueue (virtio 1.2, section 2.7), device side, with indirect descriptors and event index.

Everything in guest memory is hostile and changes while we look at it: each field is read once, and what was read is
checked. `QueueError` says what the driver did; the transport then stops the device (NEEDS_RESET).

**Widths.** The indices of the rings are read and written through memoryviews cast to ``H``: CPython does that with one
load or store of two bytes (a ``memcpy`` of constant size), so an index is never torn.

**Order.** The bytes of a buffer, its entry in the used ring and the used index must become visible in this order; loads
of the available index and of what it covers must happen in this order. x86 (TSO) keeps stores among themselves and loads
among themselves in program order, and the interpreter runs these C calls in the order written, so nothing is needed. But
x86 does let a *load* overtake an earlier *store*, and two places need that not to happen:

- `enable_notify` stores the index it wants to be kicked at, then looks whether more came meanwhile;
- `wants_interrupt` runs after the used index was stored, and looks whether the driver wants to know.

Without a fence both sides could miss each other's store, and the queue would sleep for ever. `_fence` takes and releases
an uncontended lock. In CPython that is ``sem_trywait`` and ``sem_post`` (3.14: a PyMutex), and each of them contains a
``lock cmpxchg``: a full barrier on x86 (Intel SDM vol. 3, 9.2.3.8: *loads and stores are not reordered with locked
instructions*). tests/unit/test_virtio_queue.py looks for the instruction. On arm64 the other places need fences as well.
"""

from __future__ import annotations

import _thread
from array import array
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any

from posada.vmm import state
from posada.vmm.memory import BadAddress, GuestMemory
from posada.vmm.state import StateError

MAX_CHAIN = 1024
"""Buffers of one chain, at most: what preadv(2) takes (IOV_MAX), and QEMU's bound too."""
MAX_SIZE = MAX_CHAIN
"""Entries of the largest queue a device may have. The specification allows more."""

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_NOTIFY = 1  # used.flags
NO_INTERRUPT = 1  # avail.flags

DESCRIPTOR = Struct("<QIHH")  # address, length, flags, next
_USED = Struct("<II")  # head, bytes written

_LONG = 8  # descriptors in an indirect table
# Flags and next of all descriptors but the last, in such a table as drivers make it, and of the last.
_ASKS = array("I", (at << 16 | NEXT for at in range(1, MAX_CHAIN))).tobytes()
_ANSWERS = array("I", (at << 16 | (NEXT | WRITE if at > 1 else NEXT) for at in range(1, MAX_CHAIN))).tobytes()
_LAST = array("I", [WRITE]).tobytes()
_MAX_BYTES = (1 << 32) - 1  # section 2.7.4: no chain is longer, its length must fit into the used ring


class QueueError(Exception):
    """The driver broke the rules of the queue. The device cannot go on before it is reset."""


class Chain:
    """One request: what the driver wrote for us (``readable``), then room for our answer (``writable``).

    The views are guest memory itself: the driver may change it at any time, so copy before you check. They die with
    the request: drop the chain once it is pushed, and all chains in `Device.reset`.
    """

    __slots__ = ("_at", "_view", "epoch", "head", "places", "readable", "writable")

    def __init__(self, head: int, epoch: int) -> None:
        self.head = head
        self.epoch = epoch
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.places: list[tuple[int, int]] = []
        """Guest address and length of each writable buffer, if `Queue.places` asks for them."""
        self._view = 0  # where `write` goes on: index of the view, and offset in it
        self._at = 0

    @property
    def readable_size(self) -> int:
        return sum(map(len, self.readable))

    @property
    def writable_size(self) -> int:
        return sum(map(len, self.writable))

    def read_all(self, limit: int) -> bytes:
        """A copy of everything readable. Raises QueueError if that is more than ``limit`` bytes."""
        if self.readable_size > limit:
            raise QueueError(f"a request of {self.readable_size} bytes, where at most {limit} make sense")
        return b"".join(self.readable)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Copy ``data`` behind what was written before. Returns how much of it there was room for, in bytes."""
        source = memoryview(data).cast("B")
        done = 0
        while done < len(source) and self._view < len(self.writable):
            view = self.writable[self._view]
            count = min(len(view) - self._at, len(source) - done)
            view[self._at : self._at + count] = source[done : done + count]
            done += count
            self._at += count
            if self._at == len(view):
                self._view += 1
                self._at = 0
        return done


class Queue:
    """One queue. The driver sets `size` and the three addresses, then `start` checks them; `stop` forgets the rings.

    Sizes are in entries, addresses guest-physical, indices modulo 2^16 as in the rings.
    """

    def __init__(self, memory: GuestMemory, index: int, max_size: int) -> None:
        if not 1 <= max_size <= MAX_SIZE or max_size & (max_size - 1):
            raise ValueError(f"queue size {max_size} is not a power of two up to {MAX_SIZE}")
        self.memory = memory
        self.index = index
        self.max_size = max_size
        self.written: Callable[[int, int], object] | None = None
        """Told (address, length) of guest memory that the device may have changed: KVM's dirty log does not see it."""
        self.places = False
        """Whether a device needs `Chain.places`."""
        self.epoch = 0
        self._barrier = _thread.allocate_lock()
        self.clear()

    def clear(self) -> None:
        """As after power-on."""
        self.stop()
        self.size = self.max_size
        self.desc = self.avail = self.used = 0

    def stop(self) -> None:
        """Forget the rings. Chains still out are stale from now on: pushing them does nothing."""
        self.ready = False
        self.epoch += 1
        self.event_idx = self.indirect = False
        self._heads: list[int] = []  # fetched and not popped yet, last first
        self._next_avail = self._next_used = self._signalled = 0
        self._table = self._entries = memoryview(b"")
        self._avail = self._ring = self._used = memoryview(b"").cast("H")

    def start(self, *, event_idx: bool = False, indirect: bool = False) -> None:
        """Check what the driver configured and look at its rings from now on. Raises QueueError.

        Each ring lies in one piece of RAM; the alignments are those of section 2.7.
        """
        size = self.size
        if not 1 <= size <= self.max_size or size & (size - 1):
            raise QueueError(f"queue {self.index}: size {size} is not a power of two up to {self.max_size}")
        if self.desc % 16 or self.avail % 2 or self.used % 4:
            raise QueueError(f"queue {self.index}: a ring is not aligned")
        try:
            table = self.memory.view(self.desc, 16 * size)
            avail = self.memory.view(self.avail, 6 + 2 * size)
            used = self.memory.view(self.used, 6 + 8 * size)
        except BadAddress as error:
            raise QueueError(f"queue {self.index}: a ring is outside memory: {error}") from error
        self._table = table
        self._avail = avail.cast("H")  # flags, idx, ring…, used_event
        self._ring = self._avail[2 : 2 + size]
        self._used = used.cast("H")  # flags, idx, ring…, avail_event
        self._entries = used[4 : 4 + 8 * size]
        self.event_idx = event_idx
        self.indirect = indirect
        self.ready = True

    def pop(self) -> Chain | None:
        """The next request, or None if there is none now (or the queue is not in use). Raises QueueError."""
        if not self._heads and not self._fetch():
            return None
        head = self._heads.pop()
        self._next_avail = self._next_avail + 1 & 0xFFFF
        chain = Chain(head, self.epoch)
        try:
            self._walk(chain)
        except BadAddress as error:
            raise QueueError(f"queue {self.index}: a buffer is outside memory: {error}") from error
        return chain

    def put_back(self, chain: Chain) -> None:
        """Undo the last `pop`: the next one gives the same request again."""
        if chain.epoch == self.epoch:
            self._heads.append(chain.head)
            self._next_avail = self._next_avail - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """Give a request back; ``written`` bytes of its writable part hold the answer. Any order is allowed."""
        if chain.epoch != self.epoch:
            return  # the queue was reset meanwhile: this memory is the driver's again
        at = self._next_used
        _USED.pack_into(self._entries, (at & self.size - 1) << 3, chain.head, written)
        self._next_used = at = at + 1 & 0xFFFF
        self._used[1] = at
        if self.written is not None:
            self._touch_ring()
            for place in chain.places:
                self.written(*place)

    def push_together(self, done: Sequence[tuple[Chain, int]]) -> None:
        """As `push` for each (chain, written), but the driver sees all of them at once, or none yet."""
        at = self._next_used
        for chain, written in done:
            if chain.epoch != self.epoch:
                continue
            _USED.pack_into(self._entries, (at & self.size - 1) << 3, chain.head, written)
            at = at + 1 & 0xFFFF
        if at == self._next_used:
            return
        self._next_used = self._used[1] = at
        if self.written is not None:
            self._touch_ring()
            for chain, _ in done:
                for place in chain.places:
                    self.written(*place)

    def wants_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call (section 2.7.7)."""
        if not self.ready or self._next_used == self._signalled:
            return False
        before, self._signalled = self._signalled, self._next_used
        self._fence()
        if self.event_idx:
            event = self._avail[2 + self.size]
            return (self._next_used - event - 1 & 0xFFFF) < (self._next_used - before & 0xFFFF)
        return not self._avail[0] & NO_INTERRUPT

    def disable_notify(self) -> None:
        """Tell the driver that kicks are not needed: we are looking anyway. A hint; kicks may still come."""
        if self.ready and not self.event_idx:  # with event_idx, an index left behind says it (section 2.7.10)
            self._used[0] = NO_NOTIFY
            self._touch_ring()

    def enable_notify(self) -> bool:
        """Ask for a kick at the next request. True: there is one already, and no kick will come for it."""
        if not self.ready:
            return False
        if self.event_idx:
            self._used[2 + 4 * self.size] = self._next_avail
        else:
            self._used[0] = 0
        self._touch_ring()
        self._fence()
        return self._avail[1] != self._next_avail

    def save(self) -> dict[str, Any]:
        """Plain data. The rings are in guest memory; chains popped and not pushed yet are lost: quiesce first."""
        return {
            "size": self.size,
            "desc": self.desc,
            "avail": self.avail,
            "used": self.used,
            "ready": self.ready,
            "event_idx": self.event_idx,
            "indirect": self.indirect,
            "next_avail": self._next_avail,
            "next_used": self._next_used,
            "signalled": self._signalled,
        }

    def load(self, document: dict[str, Any]) -> None:
        """Go on where `save` was called, over the same guest memory. Raises StateError."""
        self.clear()
        self.size = state.integer(document, "size", 0, 0xFFFF_FFFF)
        self.desc, self.avail, self.used = (
            state.integer(document, key, 0, (1 << 64) - 1) for key in ("desc", "avail", "used")
        )
        next_avail, next_used, signalled = (
            state.integer(document, key, 0, 0xFFFF) for key in ("next_avail", "next_used", "signalled")
        )
        if not state.boolean(document, "ready"):
            return
        try:
            self.start(event_idx=state.boolean(document, "event_idx"), indirect=state.boolean(document, "indirect"))
        except QueueError as error:
            raise StateError(str(error)) from error
        if (next_avail - next_used & 0xFFFF) > self.size:
            raise StateError(f"queue {self.index}: more requests are under way than it has entries")
        self._next_avail, self._next_used, self._signalled = next_avail, next_used, signalled

    def _fetch(self) -> bool:
        """Read every new entry of the available ring, at most one ring full."""
        if not self.ready:
            return False
        index = self._avail[1]
        count = index - self._next_avail & 0xFFFF
        if not count:
            return False
        if count > self.size:
            raise QueueError(f"queue {self.index}: {count} new requests in a ring of {self.size}")
        first = self._next_avail & self.size - 1
        heads = self._ring[first : first + count].tolist()
        if len(heads) < count:
            heads += self._ring[: count - len(heads)].tolist()
        heads.reverse()
        self._heads = heads
        return True

    def _walk(self, chain: Chain) -> None:
        """Follow one chain from its head and check each descriptor. Raises QueueError, BadAddress."""
        view, unpack = self.memory.view, DESCRIPTOR.unpack_from
        readable, writable = chain.readable, chain.writable
        places = self.places or self.written is not None
        table, count, index = self._table, self.size, chain.head
        left = count  # a longer walk has been somewhere twice
        total = 0
        while True:
            if index >= count:
                raise QueueError(f"queue {self.index}: descriptor {index} of {count}")
            address, length, flags, index = unpack(table, index << 4)
            if flags & INDIRECT:
                count = length >> 4
                if not self.indirect or table is not self._table or flags & NEXT:
                    raise QueueError(f"queue {self.index}: an indirect descriptor where none may be")
                if length & 15 or not 1 <= count <= MAX_CHAIN - len(readable) - len(writable):
                    raise QueueError(f"queue {self.index}: an indirect table of {length} bytes")
                table, left, index = view(address, length), count, 0
                if count >= _LONG and not (places or readable or writable) and self._walk_straight(chain, table, count):
                    return
                continue
            total += length
            if flags & WRITE:
                writable.append(view(address, length))
                if places:
                    chain.places.append((address, length))
            elif writable:
                raise QueueError(f"queue {self.index}: a readable buffer behind a writable one")
            else:
                readable.append(view(address, length))
            if not flags & NEXT:
                break
            left -= 1
            if not left:
                raise QueueError(f"queue {self.index}: a chain that is a loop")
        if total > _MAX_BYTES:
            raise QueueError(f"queue {self.index}: a chain of {total} bytes")

    def _walk_straight(self, chain: Chain, table: memoryview, count: int) -> bool:
        """`_walk` for a long indirect table as drivers write it: first to last, in low memory. False: look again, closely.

        Three times as fast: a request of 1 MiB often has 256 buffers.
        """
        words = table.cast("I")
        addresses, lengths, links = table.cast("Q")[::2].tolist(), words[2::4].tolist(), words[3::4].tobytes()
        if links[-4:] != _LAST or sum(lengths) > _MAX_BYTES:
            return False
        if links[:-4] == _ANSWERS[: len(links) - 4]:  # a header, then room for the answer
            first = 1
        elif links[:-4] == _ASKS[: len(links) - 4]:  # all of it readable but the status
            first = count - 1
        else:
            return False
        views = self.memory.views(addresses, lengths)
        if views is None:
            return False
        chain.readable, chain.writable = views[:first], views[first:]
        return True

    def _touch_ring(self) -> None:
        if self.written is not None:
            self.written(self.used, 6 + 8 * self.size)

    def _fence(self) -> None:
        """A full memory barrier; the module's docstring says why this is one."""
        self._barrier.acquire()
        self._barrier.release()
