"""Receive buffers of the guest, as a card fills them: one packet may take several (MRG_RXBUF, section 5.1.6.4).

How long the next packet is may be known only once it has been read. So buffers are held, popped and not pushed, until
there is room for the longest; those that were not needed wait for the next packet.
"""

from __future__ import annotations

from collections import deque

from posada.vmm.virtio.queue import Chain, Queue, QueueError
from posada.vmm.virtio.views import fill, total

HEADER_SIZE = 12
_COUNT_AT = 10  # num_buffers, the last field of the header
_MAX_VIEWS = 1024  # IOV_MAX
_MAX_HELD = 256
_EMPTY = memoryview(b"")


class RxBuffers:
    """The buffers of ``queue``. ``mergeable``: MRG_RXBUF. ``longest``: bytes of the longest packet, header included."""

    def __init__(self, queue: Queue, *, mergeable: bool, longest: int, valid: bool) -> None:
        self.longest = longest
        self.valid = valid
        """The driver takes our word for it that checksums are right (GUEST_CSUM)."""
        self._queue = queue
        self._mergeable = mergeable
        self._held: deque[tuple[Chain, int]] = deque()
        self._room = 0
        self._done: list[tuple[Chain, int]] = []  # filled, and not shown to the driver yet
        self.packets = self.bytes = self.dropped = 0
        queue.places = True  # for chains that are held while somebody begins to log what is written

    def reserve(self, size: int) -> list[memoryview] | None:
        """Views with room for ``size`` bytes, header included. None: the guest has too few buffers; a kick will come.

        Without MRG_RXBUF: the next buffer, whatever its size. Raises QueueError.
        """
        held = self._held
        if held and held[0][0].epoch != self._queue.epoch:
            self.forget()
        while self._room < size and (self._mergeable or not held):
            chain = self._queue.pop()
            if chain is None:
                if len(held) == self._queue.size:
                    break  # there will never be more
                if self._queue.enable_notify():
                    continue
                return None
            room = chain.writable_size
            if chain.readable or room <= HEADER_SIZE or len(held) >= _MAX_HELD:
                raise QueueError("a receive buffer that is too small, or not ours to write to")
            held.append((chain, room))
            self._room += room
        if len(held) == 1:
            return held[0][0].writable
        views: list[memoryview] = []
        for chain, room in held:
            views += chain.writable
            size -= room
            if size <= 0:
                break
        return views[:_MAX_VIEWS]

    def commit(self, size: int) -> None:
        """``size`` bytes, header included, stand in the views of `reserve`. `publish` must follow."""
        first = self._held[0][0].writable
        count = len(self._done)
        left = size
        while left > 0:
            chain, room = self._held.popleft()
            self._room -= room
            self._done.append((chain, min(room, left)))
            left -= room
        fill(first, (len(self._done) - count).to_bytes(2, "little"), _COUNT_AT)
        self.packets += 1
        self.bytes += size - HEADER_SIZE

    def put(self, header: bytes, frame: memoryview) -> bool:
        """A whole packet, in a ``header`` that says one buffer. False: there are too few. What fits into none is dropped."""
        size = HEADER_SIZE + len(frame)
        if not self._held and (chain := self._queue.pop()) is not None:
            view = chain.writable[0] if chain.writable else _EMPTY
            if len(view) >= size and not chain.readable:  # the usual way is the fast one
                view[:HEADER_SIZE] = header
                view[HEADER_SIZE:size] = frame
                self._done.append((chain, size))
                self.packets += 1
                self.bytes += size - HEADER_SIZE
                return True
            self._queue.put_back(chain)
        views = self.reserve(size)
        if views is None:
            return False
        if total(views) < size:
            self.dropped += 1
            return True
        fill(views, header)
        fill(views, frame, HEADER_SIZE)
        self.commit(size)
        return True

    def publish(self) -> None:
        """Show the driver what was filled, all at once: a merged packet is never seen in part, and used indices are few."""
        if self._done:
            self._queue.push_together(self._done)
            self._done.clear()

    def give_back(self) -> None:
        """Put the held buffers back: a save or fork follows."""
        while self._held:
            self._queue.put_back(self._held.pop()[0])
        self._room = 0

    def forget(self) -> None:
        """The driver is gone, or has taken the queue away."""
        self._held.clear()
        self._room = 0
