"""From the host to the guest: answers, credits and data, as far as the guest has given buffers for them."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Chain, QueueError
from posada.vmm.virtio.views import fill, split, total
from posada.vmm.virtio.vsock.packet import HEADER, HOST_CID, MAX_PAYLOAD, STREAM, WRAP, Op, Packet, Shut
from posada.vmm.virtio.vsock.stream import BUFFER, Due, Stream, queued

MAX_RESETS = 256
"""RST packets that wait for a buffer; after that, nothing more is taken from the guest until it gives buffers."""
TURN = 256 << 10
"""Bytes one stream may move to the guest before the loop looks after others."""
MAX_BUFFERS = 64
"""Guest buffers filled by one read."""
_MAX_VIEWS = 1024  # IOV_MAX

Header = tuple[int, int, int, int, int, int, int, int, int, int]
"""The fields of a `Packet`."""

_OPS = {
    Due.REQUEST: Op.REQUEST,
    Due.CREDIT_UPDATE: Op.CREDIT_UPDATE,
    Due.CREDIT_REQUEST: Op.CREDIT_REQUEST,
    Due.SHUTDOWN: Op.SHUTDOWN,
}


class Sender:
    """``index`` is the queue of receive buffers. ``cid`` tells the guest's address.

    ``changed`` is called when what a stream waits for may have changed, ``ended`` when its client sends no more (and
    with `Shut.BOTH` when it does not read either).
    """

    def __init__(
        self,
        device: Device,
        index: int,
        *,
        cid: Callable[[], int],
        changed: Callable[[Stream], object],
        ended: Callable[[Stream, int], object],
    ) -> None:
        self._device = device
        self._index = index
        self._cid = cid
        self._changed = changed
        self._ended = ended
        self._resets: deque[Header] = deque()
        self._due: dict[Stream, None] = {}
        self._parked: dict[Stream, None] = {}
        self._held = False
        self.moved = 0
        """Bytes of payload, since the start."""

    def must_wait(self) -> bool:
        """So many answers wait for buffers that no more may be provoked. The next queue is notified when that is over."""
        self._held = self._held or len(self._resets) >= MAX_RESETS
        return self._held

    def owe(self, stream: Stream, due: int) -> None:
        """Send it with the next `resume`."""
        stream.due |= due
        self._due[stream] = None

    def reject(self, packet: Packet) -> None:
        """Answer ``packet`` with RST; an RST is not answered."""
        if packet.op != Op.RST:
            self._queue_reset(packet.dst_cid, packet.src_cid, packet.dst_port, packet.src_port, packet.type)

    def abort(self, stream: Stream) -> None:
        """RST: the guest is to forget the connection."""
        self._queue_reset(HOST_CID, self._cid(), stream.host_port, stream.guest_port, STREAM)

    def forget(self, stream: Stream) -> None:
        """Nothing more is sent on it."""
        stream.due = 0
        stream.parked = False
        self._due.pop(stream, None)
        self._parked.pop(stream, None)

    def clear(self) -> None:
        self._resets.clear()
        self._held = False
        for stream in {**self._due, **self._parked}:
            self.forget(stream)

    def resume(self) -> None:
        """Send what waits, as far as there are buffers, and interrupt once. Raises QueueError."""
        if not self._device.active:
            return
        while self._send_due() and self._parked:
            stream = next(iter(self._parked))
            del self._parked[stream]
            stream.parked = False
            self.pump(stream)
            if stream.parked:
                break
        self._device.signal(self._device.queues[self._index])

    def pump(self, stream: Stream) -> None:
        """Its client has sent something, or ended. `resume` must follow. Raises QueueError."""
        budget = TURN
        while stream.readable and budget > 0:
            size = min(queued(stream.sock), stream.credit, budget)
            moved = self._fill(stream, size) if size else 0
            if moved is None:
                self._parked[stream] = None
                stream.parked = True
                break
            if not moved:
                self._look_for_end(stream)
                break
            budget -= moved
        if stream.starved and not stream.asked:
            stream.asked = True
            self.owe(stream, Due.CREDIT_REQUEST)
        self._changed(stream)

    def _send_due(self) -> bool:
        """Everything but data. False if the buffers did not suffice."""
        while self._resets or self._due:
            chain = self._buffer()
            if chain is None:
                return False
            self._put(chain, self._resets.popleft() if self._resets else self._next_due())
        if self._held:
            self._held = False
            self._device.transport.again(self._index + 1)  # the guest's packets, which had to wait
        return True

    def _next_due(self) -> Header:
        stream = next(iter(self._due))
        due = next(due for due in _OPS if due & stream.due)
        stream.due &= ~due
        if not stream.due:
            del self._due[stream]
            self._changed(stream)
        return self._header(stream, _OPS[due], flags=stream.shut if due == Due.SHUTDOWN else 0)

    def _fill(self, stream: Stream, size: int) -> int | None:
        """Move up to ``size`` bytes by one read into several buffers. None if there is no buffer; 0 if nothing came."""
        queue = self._device.queues[self._index]
        taken: list[tuple[Chain, int]] = []
        views: list[memoryview] = []
        room = 0
        while room < size and len(taken) < MAX_BUFFERS and len(views) < _MAX_VIEWS // 2:
            chain = self._buffer()
            if chain is None:
                break
            first, *rest = chain.writable
            if len(first) == HEADER.size:  # as Linux has it, up to 6.2
                data = rest
            elif len(first) > HEADER.size:  # and since
                data = [first[HEADER.size :], *rest]
            else:
                data = split(chain.writable, HEADER.size)[1]
            length = total(data)
            if not length:
                raise QueueError("a vsock buffer with no room for data")
            if length > min(size - room, MAX_PAYLOAD):
                length = min(size - room, MAX_PAYLOAD)
                data = split(data, length)[0]
            taken.append((chain, length))
            views += data
            room += length
        if not taken:
            return None
        try:
            moved = stream.sock.recvmsg_into(views[:_MAX_VIEWS])[0]
        except OSError:
            moved = 0
        left = moved
        done = []
        for chain, length in taken:
            if not left:
                break
            length = min(length, left)
            left -= length
            self._put_header(chain, self._header(stream, Op.RW, length=length))
            done.append((chain, HEADER.size + length))
        for chain, _ in reversed(taken[len(done) :]):
            queue.put_back(chain)
        queue.push_together(done)
        stream.sent = stream.sent + moved & WRAP
        self.moved += moved
        return moved

    def _look_for_end(self, stream: Stream) -> None:
        """There was nothing to read: has the client ended?"""
        try:
            if not stream.sock.recv(1, socket.MSG_PEEK):
                stream.eof = True
                self._ended(stream, Shut.SEND)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            stream.eof = True
            self._ended(stream, Shut.BOTH)

    def _buffer(self) -> Chain | None:
        """A buffer of the guest, or None; then a kick comes when there is one."""
        queue = self._device.queues[self._index]
        while (chain := queue.pop()) is None:
            if not queue.enable_notify():
                return None
        if chain.readable or chain.writable_size < HEADER.size:
            raise QueueError("a vsock buffer that is too small, or not ours to write to")
        return chain

    def _header(self, stream: Stream, op: Op, *, length: int = 0, flags: int = 0) -> Header:
        """Every packet tells the guest how much room there is."""
        forwarded = stream.told = stream.forwarded
        return HOST_CID, self._cid(), stream.host_port, stream.guest_port, length, STREAM, op, flags, BUFFER, forwarded

    def _put(self, chain: Chain, header: Header) -> None:
        self._put_header(chain, header)
        self._device.queues[self._index].push(chain, HEADER.size)

    def _put_header(self, chain: Chain, header: Header) -> None:
        if len(chain.writable[0]) >= HEADER.size:
            HEADER.pack_into(chain.writable[0], 0, *header)
        else:
            fill(chain.writable, HEADER.pack(*header))

    def _queue_reset(self, src_cid: int, dst_cid: int, src_port: int, dst_port: int, kind: int) -> None:
        self._resets.append((src_cid, dst_cid, src_port, dst_port, 0, kind, Op.RST, 0, 0, 0))
