"""Memory balloon (virtio 1.2, section 5.5): the guest gives pages back to the host, and takes them again.

- `set_target` asks the guest to inflate or deflate; what it puts into the balloon is discarded. With deflate-on-oom a
  guest in need helps itself. Pages it takes back need no work: the host gives fresh ones when they are touched.
- Free page reporting: the guest tells which pages it does not use, without being asked; they are discarded too.
- Statistics: the driver leaves one buffer with us; giving it back (`poll`) makes it come again, filled anew. That is done
  whenever somebody reads them, not by a timer: an idle machine stays idle.

A discarded page keeps nothing (see `GuestMemory.discard`), which is why PAGE_POISON is not offered: a guest that counts
on the content of free pages then doesn't report them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from posada.vmm import state
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Chain, Queue

PAGE = 4096  # the unit of the protocol, whatever the guest's pages are

STATS_VQ = 1 << 1
DEFLATE_ON_OOM = 1 << 2
REPORTING = 1 << 5

STATISTICS = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory", "available_memory",
    "disk_caches", "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip
"""Names of the statistics by tag (section 5.5.6.4). Bytes, or events since the guest's boot."""

_CONFIG = struct.Struct("<II")  # num_pages, actual
_STATISTIC = struct.Struct("<HQ")
_MAX_PAGES = 1024  # of one inflate request: a page full of numbers; Linux sends 256
_MAX_STATISTICS = 64
_BUDGET = 8  # requests per turn: each costs up to _MAX_PAGES calls of madvise(2)


class Balloon(Device):
    kind = 5
    name = "balloon"
    queue_sizes = (128, 128, 16, 64)
    features = STATS_VQ | DEFLATE_ON_OOM | REPORTING

    def __init__(self) -> None:
        self._target = self._actual = 0  # pages in the balloon: wanted; and what the driver says
        self._held: Chain | None = None
        self._statistics: dict[str, int] = {}
        self._discarded = 0

    # For the monitor.

    def set_target(self, size: int) -> None:
        """Leave the guest ``size`` bytes of its memory. Raises ValueError. The guest follows when it can."""
        if not 0 < size <= self.memory.size:
            raise ValueError(f"a machine of {self.memory.size} bytes cannot have {size}")
        self._target = (self.memory.size - size) // PAGE
        self.config_changed()

    @property
    def inflated(self) -> int:
        """Bytes in the balloon, as the driver says."""
        return self._actual * PAGE

    def poll(self) -> None:
        """Ask the driver for new statistics; `metrics` has them once it has answered."""
        if self._held is not None and self.active:
            held, self._held = self._held, None
            queue = self.queues[2]
            queue.push(held, 0)
            self.signal(queue)

    def metrics(self) -> dict[str, int]:
        """The statistics are the last ones we got; this asks for newer ones."""
        self.poll()
        return {
            "target_pages": self._target,
            "actual_pages": self._actual,
            "discarded_bytes": self._discarded,
            **self._statistics,
        }

    # For the transport.

    def config(self) -> bytes:
        return _CONFIG.pack(self._target, self._actual)

    def write_config(self, offset: int, data: bytes) -> None:
        """Only ``actual`` is the driver's to write."""
        changed = bytearray(self.config())
        changed[offset : offset + len(data)] = data
        self._actual = _CONFIG.unpack(changed)[1]

    def activate(self) -> None:
        # Section 5.5.2 numbers five queues; drivers (Linux) count only those whose feature they took.
        self._handlers = [self._inflate, self._deflate]
        if self.acked & STATS_VQ:
            self._handlers.append(self._take_statistics)
        if self.acked & REPORTING:
            self._handlers.append(self._report)
        for queue, handler in zip(self.queues, self._handlers, strict=False):
            queue.places = handler == self._report

    def notify(self, index: int) -> None:
        if index < len(self._handlers):
            self._handlers[index](self.queues[index])

    def reset(self) -> None:
        self._held = None
        self._actual = 0
        self._statistics = {}

    def quiesce(self) -> None:
        if self._held is not None:
            self.queues[2].put_back(self._held)
            self._held = None
            self.transport.again(2)

    def save(self) -> dict[str, Any]:
        return {"target": self._target, "actual": self._actual}

    def load(self, document: dict[str, Any]) -> None:
        self._target = state.integer(document, "target", 0, self.memory.size // PAGE)
        self._actual = state.integer(document, "actual", 0, 0xFFFF_FFFF)

    # The queues.

    def _inflate(self, queue: Queue) -> None:
        self.serve(queue, lambda request: self._give_back(queue, _page_ranges(request)), _BUDGET)

    def _deflate(self, queue: Queue) -> None:
        self.serve(queue, lambda request: 0)

    def _report(self, queue: Queue) -> None:
        """The pages are the request's writable buffers themselves."""
        self.serve(queue, lambda request: self._give_back(queue, request.places), _BUDGET)

    def _give_back(self, queue: Queue, ranges: Iterable[tuple[int, int]]) -> int:
        for address, length in ranges:
            self.memory.discard(address, length)
            self._discarded += length
            if queue.written is not None:
                queue.written(address, length)
        return 0

    def _take_statistics(self, queue: Queue) -> None:
        """Keep the newest buffer. There should be only one: the rest goes back at once."""
        queue.disable_notify()
        for _ in range(queue.size):
            request = queue.pop()
            if request is None:
                break
            if self._held is not None:
                queue.push(self._held, 0)
            self._held = request
            data = request.read_all(_MAX_STATISTICS * _STATISTIC.size)
            whole = len(data) // _STATISTIC.size * _STATISTIC.size
            for tag, value in _STATISTIC.iter_unpack(data[:whole]):
                if tag < len(STATISTICS):
                    self._statistics[STATISTICS[tag]] = value
        if queue.enable_notify():
            self.transport.again(queue.index)
        self.signal(queue)


def _page_ranges(request: Chain) -> Iterator[tuple[int, int]]:
    """The pages an inflate request lists, joined into (address, length)."""
    data = request.read_all(4 * _MAX_PAGES)
    pages = sorted(set(memoryview(data)[: len(data) & ~3].cast("I")))  # hosts are little-endian, as virtio is
    first = 0
    for at in range(1, len(pages) + 1):
        if at == len(pages) or pages[at] != pages[at - 1] + 1:
            yield pages[first] * PAGE, (at - first) * PAGE
            first = at
