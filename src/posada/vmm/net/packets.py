"""One packet per read and write: a tap device, or a seqpacket socket. Straight between it and guest memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import EAGAIN, EBADFD, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM

from posada.vmm.net.backend import HEADER, Feature, Gone, Outcome
from posada.vmm.net.buffers import HEADER_SIZE, RxBuffers
from posada.vmm.virtio.views import fill, split

_LOST = (EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM)
"""Errors of one packet (nonsense in its header; an interface that is down): it is lost, as on any network."""
_NOTHING = (EAGAIN, EBADFD, EIO)
"""Errors that say there is nothing to read (of a tap: its interface is down)."""
_PLAIN = HEADER.pack(0, 0, 0, 0, 0, 0, 1)


class Packets:
    """``header``: every packet carries the virtio header on this side too (IFF_VNET_HDR, 12 bytes)."""

    features = Feature(0)

    def __init__(self, fd: int, *, header: bool = False) -> None:
        self.fd = fd
        self.waiting = self.owing = False
        self.lost = 0
        self._header = header
        os.set_blocking(fd, False)

    def settle(self, acked: Feature) -> None:
        pass

    def send(self, packets: Sequence[list[memoryview]], sizes: Sequence[int]) -> int:
        self.waiting = False
        for count, packet in enumerate(packets):
            if not sizes[count]:
                continue
            views = packet if self._header else split(packet, HEADER_SIZE)[1]
            try:
                os.writev(self.fd, views)
            except BlockingIOError:
                self.waiting = True
                return count
            except OSError as error:
                if error.errno not in _LOST:
                    raise Gone(f"the network's end of a card: {error}") from error
                self.lost += 1
        return len(packets)

    def flush(self) -> None:
        self.waiting = False

    def receive(self, buffers: RxBuffers, packets: int) -> Outcome:
        while packets:
            views = buffers.reserve(buffers.longest)
            if views is None:
                return Outcome.FULL
            head: list[memoryview] = []
            body = views
            if not self._header:
                head, body = split(views, HEADER_SIZE)
            try:
                size = os.readv(self.fd, body)
            except OSError as error:
                if error.errno in _NOTHING:
                    return Outcome.EMPTY
                raise Gone(f"the network's end of a card: {error}") from error
            if not size:
                raise Gone("the network's end of a card has hung up")
            if head:
                fill(head, _PLAIN)
                size += HEADER_SIZE
            if size <= HEADER_SIZE:
                continue
            buffers.commit(size)
            packets -= 1
        return Outcome.MORE

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
