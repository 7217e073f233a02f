"""Block device (virtio 1.2, section 5.2) in front of a `posada.vmm.block.disk.Disk`.

A request is a header, data, and a status byte: the driver's writable part ends with it. Data goes straight between the
disk's file and guest memory. Requests are answered in the loop; what a kick brought gets one interrupt. Two things take
longer than the loop should wait:

- *reads of what the host has not in memory*: those of one kick are started together and answered last;
- *flushes*, where the host's disk is slow: a thread waits for it (`posada.vmm.block.worker`). Until then the device
  takes no other request, so nothing changes under the flush; the rest of the machine goes on.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from enum import IntEnum
from functools import partial
from struct import Struct
from typing import Any

from posada.errors import ImageError, StateError
from posada.vmm import state
from posada.vmm.block.chain import overlay, reopen
from posada.vmm.block.disk import Cold, Disk, total
from posada.vmm.block.file import File
from posada.vmm.block.worker import Worker
from posada.vmm.loop import Loop
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Chain, Queue, QueueError

SECTOR = 512
"""Section 5.2.6: the unit of every sector number, whatever the block size."""
QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2
"""Data buffers of one request: with header and status it fits into the queue without an indirect table."""
MAX_SEGMENTS = 16
MAX_CLEAR = 1 << 19
"""Segments of one discard or write-zeroes request, and sectors of one segment (256 MiB): bounds its time."""
MAX_TURN = 16 << 20
"""Bytes moved before the loop looks after others."""
_REQUEST = 1 << 16
"""What a request costs of that, beside its bytes: there are at most 256 in a turn."""
MAX_REPORTS = 16
"""Failed requests that stderr hears of; a guest can make any number."""
_CLEARED_PER_MOVED = 128
"""Clearing this many bytes takes about as long as moving one."""

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_DISCARD, F_WRITE_ZEROES = (
    1 << bit for bit in (2, 5, 6, 9, 10, 11, 13, 14)
)  # section 5.2.3

_HEADER = Struct("<I4xQ")  # type, sector
_SEGMENT = Struct("<QII")  # sector, sectors, flags
_UNMAP = 1
_ID_SIZE = 20
_WRITEBACK_AT = 32
_CONFIG = Struct("<QII4xIBBHIB3xIIIIIB3x")
"""Section 5.2.4, without what belongs to features not offered at its end."""

_COUNTERS = ("reads", "read_bytes", "writes", "written_bytes", "flushes", "discards", "zeroes", "errors", "unsupported")


class Kind(IntEnum):
    """Request types, section 5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


OK, IOERR, UNSUPP = 0, 1, 2

Steps = Generator[File, None, None]
Answer = int | Steps
"""A request's status, or the flush that has to happen first."""


class Blk(Device):
    """``serial`` is what GET_ID tells the guest: the disk's name, of which 20 bytes fit."""

    kind = 2
    name = "blk"
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, disk: Disk, serial: str) -> None:
        self.disk = disk
        self.serial = serial.encode()[:_ID_SIZE]
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE
        self.features |= F_RO if disk.readonly else F_DISCARD | F_WRITE_ZEROES
        self._capacity = disk.size // SECTOR
        self._writeback: bool | None = None  # None: as the features say
        self._turn = 0
        self._flushing = False  # a request waits for the worker
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._requests: dict[int, Callable[[int, list[memoryview], list[memoryview]], Answer]] = {
            Kind.OUT: self._out,
            Kind.FLUSH: self._flush,
            Kind.GET_ID: self._get_id,
            Kind.DISCARD: self._discard,
            Kind.WRITE_ZEROES: self._write_zeroes,
        }

    # What the host does.

    def resize(self, size: int) -> None:
        """Grow the disk to ``size`` bytes and tell the guest. Durable. Raises OSError, ImageError."""
        self._worker.drain()
        self.disk.resize(size)
        self._capacity = self.disk.size // SECTOR
        self.config_changed()

    def freeze(self) -> None:
        """Before a fork or a snapshot: the disk's files are complete, and stay as they are. Then `switch` or `reopen`."""
        self._worker.drain()
        self.disk.freeze()

    def switch(self, fd: int) -> None:
        """Go on with the empty qcow2 overlay on ``fd`` above what the disk was so far. Raises OSError, ImageError."""
        self._worker.drain()
        self.disk = overlay(self.disk, fd)

    def reopen(self, given: Mapping[str, Any]) -> None:
        """After `freeze`, in a forked child. ``layers``: descriptors for the layers, the lowest first, read-only;
        ``overlay``: one for its own new top layer. Either may be missing: a read-only disk needs neither."""
        self._worker.after_fork()
        if "layers" in given:
            reopen(self.disk, given["layers"])
        if "overlay" in given:
            self.switch(given["overlay"])

    # Hooks.

    def config(self) -> bytes:
        granularity = self.disk.granularity // SECTOR
        return _CONFIG.pack(
            self._capacity, 0, SEG_MAX,
            SECTOR, 3, 0, 8, 0,  # block size; topology: 4 KiB physical blocks, aligned, smallest I/O of one
            self.writeback,
            MAX_CLEAR, MAX_SEGMENTS, granularity,
            MAX_CLEAR, MAX_SEGMENTS, 1,
        )  # fmt: skip

    def write_config(self, offset: int, data: bytes) -> None:
        if self.acked & F_CONFIG_WCE and offset <= _WRITEBACK_AT < offset + len(data):
            self._writeback = bool(data[_WRITEBACK_AT - offset])
            if not self._writeback:
                self._worker.drain()
                try:
                    self.disk.flush()
                except (OSError, ImageError) as error:
                    self._refused(error)  # the next request will fail as well

    @property
    def writeback(self) -> bool:
        """Writes may be answered before they are durable. A driver that cannot flush gets them durable at once."""
        return bool(self.acked & F_FLUSH) if self._writeback is None else self._writeback

    def attach(self, loop: Loop) -> None:
        self._worker = Worker(loop)

    def notify(self, index: int) -> None:
        """As `Device.serve`, with requests that are answered later."""
        queue = self.queues[0]
        cold: list[tuple[Chain, Cold]] = []
        self._turn = MAX_TURN
        queue.disable_notify()
        while not self._flushing:
            if self._turn <= 0:
                self.transport.again(0)
                break
            request = queue.pop()
            if request is not None:
                self._turn -= _REQUEST
                self._take(queue, request, cold)
            elif not queue.enable_notify():
                break
        if len(cold) > 1:
            for _, missing in cold:
                missing.prefetch()
        for request, _ in cold:
            self._worker.drain()  # it is read from guest memory again, where it may have become a write by now
            self._take(queue, request, None)
        self.signal(queue)

    def reset(self) -> None:
        self._worker.drain()
        self._writeback = None

    def save(self) -> dict[str, Any]:
        return {"capacity": self._capacity, "writeback": self.writeback}

    def load(self, document: dict[str, Any]) -> None:
        capacity = state.integer(document, "capacity", 0, 1 << 55)
        self._writeback = state.boolean(document, "writeback")
        if capacity > self._capacity:
            raise StateError(f"disk {self.serial.decode(errors='replace')!r} is smaller than the guest believes")
        if capacity < self._capacity:
            self.config_changed()

    def quiesce(self) -> None:
        self._worker.drain()

    def close(self) -> None:
        self._worker.close()
        try:
            self.disk.close()
        except (OSError, ImageError) as error:
            self._refused(error)

    def metrics(self) -> dict[str, int]:
        return dict(self._counters)

    # Requests.

    def _take(self, queue: Queue, request: Chain, cold: list[tuple[Chain, Cold]] | None) -> None:
        """Answer a request now, or later: what would have to wait for the host's disk goes to ``cold``."""
        try:
            answer = self._answer(request, cold is None)
        except Cold as missing:
            assert cold is not None
            cold.append((request, missing))
            return
        if isinstance(answer, int):
            self._finish(queue, request, answer)
        else:
            self._flush_on(request, answer, None)

    def _finish(self, queue: Queue, request: Chain, status: int) -> None:
        request.writable[-1][-1] = status
        queue.push(request, request.writable_size)

    def _answer(self, request: Chain, wait: bool) -> Answer:
        """Raises QueueError where the driver gets no status: nowhere to put it; Cold."""
        readable, writable = request.readable, request.writable
        while writable and not writable[-1]:
            writable.pop()
        if not writable:
            raise QueueError("a block request with no room for its status")
        if readable and len(readable[0]) == _HEADER.size:
            kind, sector = _HEADER.unpack(readable[0])
            data = readable[1:]
        else:
            header, data = _split(readable, _HEADER.size)
            kind, sector = _HEADER.unpack(header)
        room = writable[:-1]
        if len(writable[-1]) > 1:
            room.append(writable[-1][:-1])
        if len(data) > SEG_MAX or len(room) > SEG_MAX:
            return self._failed(f"{len(data) + len(room)} buffers")
        try:
            if kind == Kind.IN:
                return self._in(sector, room, wait)
            handle = self._requests.get(kind)
            if handle is not None:
                return handle(sector, data, room)
        except Cold:
            raise
        except (OSError, ImageError) as error:
            return self._refused(error)
        self._counters["unsupported"] += 1
        return UNSUPP

    def _flush_on(self, request: Chain, steps: Steps, error: OSError | None) -> None:
        """Go on with the flush that ``request`` waits for. ``error``: how its last step failed."""
        late, self._flushing = self._flushing, False
        while True:
            try:
                file = next(steps) if error is None else steps.throw(error)
            except StopIteration:
                status = OK
                break
            except (OSError, ImageError) as refused:
                status = self._refused(refused)
                break
            if file.slow:
                self._flushing = True
                self._worker.submit(file.sync, self.guarded(partial(self._flush_on, request, steps)))
                return
            error = None
            try:
                file.sync()
            except OSError as failed:
                error = failed
        self._finish(self.queues[0], request, status)
        if late:
            self.signal(self.queues[0])
            self.transport.again(0)

    def _refused(self, error: Exception) -> int:
        """What the host refuses is the guest's I/O error, and ours to report."""
        number = error.errno if isinstance(error, OSError) else None
        return self._failed(f"{errno.errorcode.get(number, number)}: {error}" if number else str(error))

    def _failed(self, reason: str) -> int:
        self._counters["errors"] += 1
        if self._counters["errors"] <= MAX_REPORTS:
            print(f"{self.name}: a request failed: {reason}", file=sys.stderr, flush=True)  # noqa: T201
        return IOERR

    def _in(self, sector: int, room: list[memoryview], wait: bool) -> int:
        length = self._check(sector, room)
        self.disk.read(sector * SECTOR, room, wait)
        self._counters["reads"] += 1
        self._counters["read_bytes"] += length
        return OK

    def _out(self, sector: int, data: list[memoryview], room: list[memoryview]) -> Answer:
        length = self._check(sector, data)
        self.disk.write(sector * SECTOR, data)
        self._counters["writes"] += 1
        self._counters["written_bytes"] += length
        return self._settled()

    def _flush(self, sector: int, data: list[memoryview], room: list[memoryview]) -> Answer:
        self._counters["flushes"] += 1
        return self.disk.flushing()

    def _get_id(self, sector: int, data: list[memoryview], room: list[memoryview]) -> int:
        text = self.serial.ljust(_ID_SIZE, b"\0")
        for view in room:
            piece, text = text[: len(view)], text[len(view) :]
            view[: len(piece)] = piece
        return OK

    def _discard(self, sector: int, data: list[memoryview], room: list[memoryview]) -> Answer:
        segments = self._segments(data)
        if any(flags for _, _, flags in segments):  # unmap has no meaning here, the rest is reserved
            return UNSUPP
        for offset, length, _ in segments:
            self.disk.discard(offset, length)
        self._counters["discards"] += 1
        return self._settled()

    def _write_zeroes(self, sector: int, data: list[memoryview], room: list[memoryview]) -> Answer:
        segments = self._segments(data)
        if any(flags & ~_UNMAP for _, _, flags in segments):
            return UNSUPP
        for offset, length, flags in segments:
            self.disk.write_zeroes(offset, length, bool(flags & _UNMAP))
        self._counters["zeroes"] += 1
        return self._settled()

    def _check(self, sector: int, buffers: Sequence[memoryview]) -> int:
        """Bytes of a transfer. Raises OSError if it is none of whole sectors of this disk."""
        length = sum(map(len, buffers))
        if length % SECTOR or sector + length // SECTOR > self._capacity:
            raise OSError(errno.EINVAL, f"sector {sector} and {length} bytes from there")
        self._turn -= length
        return length

    def _segments(self, data: list[memoryview]) -> list[tuple[int, int, int]]:
        """(offset, length in bytes, flags) of a discard or write-zeroes request. Raises OSError."""
        size = total(data)
        if not 0 < size <= MAX_SEGMENTS * _SEGMENT.size or size % _SEGMENT.size:
            raise OSError(errno.EINVAL, f"{size} bytes of segments")
        out = []
        for sector, sectors, flags in _SEGMENT.iter_unpack(b"".join(data)):
            if sectors > MAX_CLEAR or sector + sectors > self._capacity:
                raise OSError(errno.EINVAL, f"sector {sector} and {sectors} from there")
            out.append((sector * SECTOR, sectors * SECTOR, flags))
            self._turn -= sectors * SECTOR // _CLEARED_PER_MOVED
        return out

    def _settled(self) -> Answer:
        return OK if self.writeback else self.disk.flushing()


def _split(buffers: list[memoryview], length: int) -> tuple[bytes, list[memoryview]]:
    """The first bytes of a scatter list that is cut anywhere (section 2.7.4.2), and the rest. Raises QueueError."""
    head, rest = b"", list(buffers)
    while len(head) < length:
        if not rest:
            raise QueueError("a block request without a whole header")
        view = rest.pop(0)
        wanted = length - len(head)
        head += bytes(view[:wanted])
        if len(view) > wanted:
            rest.insert(0, view[wanted:])
    return head, rest
