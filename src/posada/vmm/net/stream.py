"""passt's stream socket: each frame after its length in four bytes, big-endian (QEMU's ``-netdev stream`` framing).

The stream is read in large pieces, since a frame's length is known only from its first bytes; frames to the network go
out straight from guest memory, as many as there are by one sendmsg.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections.abc import Sequence
from struct import Struct

from posada.vmm.net.backend import HEADER, MAX_FRAME, MIN_FRAME, Feature, Gone, Outcome
from posada.vmm.net.buffers import HEADER_SIZE, RxBuffers
from posada.vmm.net.handshake import SMALL, acknowledgement
from posada.vmm.virtio.views import split

_LENGTH = Struct(">I")
_SIZE = 192 << 10
"""Bytes read at a time at most; holds two of the longest frames and more."""
ATOMIC = 36_000
"""Bytes that a unix socket takes as one piece, or not at all: 32 KiB of pages, and a page less the kernel's own 320 bytes
(unix_stream_sendmsg; measured: 36,544). passt up to 2023 loses its place in the stream when it finds a frame of which the
rest is still to be sent; so frames that fit are never cut. An MTU beyond this is not for passt.
"""
_OWN = 64
"""Frames of our own that may wait for the guest to have buffers; it sends again what is not answered."""
_MAX_VIEWS = 1024  # IOV_MAX
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_DATA_VALID = 2
"""Header flag: the checksum is right. True of what never left this host's memory, and of what passt has checked."""
_PLAIN, _VALID = (HEADER.pack(flags, 0, 0, 0, 0, 0, 1) for flags in (0, _DATA_VALID))


class Stream:
    """``fd``: a connected unix stream socket."""

    features = Feature.GUEST_CSUM

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        self.fd = fd
        self.waiting = False
        self._rest = memoryview(b"")  # of a frame that is half sent
        self._buffer = memoryview(b"")
        self._start = self._end = 0
        self._own: list[bytes] = []
        self.owing = False

    def settle(self, acked: Feature) -> None:
        pass

    def send(self, packets: Sequence[list[memoryview]], sizes: Sequence[int]) -> int:
        if self._rest:
            self.flush()
            if self._rest:
                return 0
        self.waiting = False
        done = 0
        while done < len(packets) and not self.waiting:
            done += self._send_whole(packets[done:], sizes[done:])
        for packet, size in zip(packets[:done], sizes, strict=False):
            if 0 < size <= SMALL and len(self._own) < _OWN:
                answer = acknowledgement(b"".join(packet)[HEADER_SIZE:])
                if answer is not None:
                    self._own.append(answer)
        self.owing = bool(self._own)
        return done

    def _send_whole(self, packets: Sequence[list[memoryview]], sizes: Sequence[int]) -> int:
        """By one sendmsg. Returns how many packets were taken; `waiting` if it was not all that was tried."""
        views: list[memoryview] = []
        ends = []
        end = 0
        for packet, size in zip(packets, sizes, strict=True):
            if size:
                if end and end + _LENGTH.size + size > ATOMIC:
                    break
                first, *frame = packet
                if len(first) > HEADER_SIZE:
                    frame.insert(0, first[HEADER_SIZE:])
                elif len(first) < HEADER_SIZE:
                    frame = split(packet, HEADER_SIZE)[1]
                if len(views) + len(frame) >= _MAX_VIEWS:
                    if views:
                        break
                    frame = [memoryview(b"".join(frame))]
                views.append(memoryview(_LENGTH.pack(size)))
                views += frame
                end += _LENGTH.size + size
            ends.append(end)
        sent = self._send(views)
        if sent == end:
            return len(ends)
        self.waiting = True
        whole = bisect_right(ends, sent)
        begun = ends[whole - 1] if whole else 0
        if sent == begun:
            return whole
        # The buffers are the guest's again once we answer: the rest of this frame is copied.
        self._rest = memoryview(b"".join(split(split(views, sent)[1], ends[whole] - sent)[0]))
        return whole + 1

    def flush(self) -> None:
        if self._rest:
            self._rest = self._rest[self._send([self._rest]) :]
        self.waiting = bool(self._rest)

    def receive(self, buffers: RxBuffers, packets: int) -> Outcome:
        header = _VALID if buffers.valid else _PLAIN
        unpack = _LENGTH.unpack_from
        while self._own:
            if not buffers.put(header, memoryview(self._own[0])):
                return Outcome.FULL
            del self._own[0]
        self.owing = False
        while packets:
            at = self._start + _LENGTH.size
            if at <= self._end:
                (size,) = unpack(self._buffer, self._start)
                if not MIN_FRAME <= size <= MAX_FRAME:
                    raise Gone(f"the network sent a frame of {size} bytes")
                if at + size <= self._end:
                    if not buffers.put(header, self._buffer[at : at + size]):
                        return Outcome.FULL
                    self._start = at + size
                    packets -= 1
                    continue
            if not self._read():
                return Outcome.EMPTY
        return Outcome.MORE

    def close(self) -> None:
        self._sock.close()
        self.fd = -1

    def _read(self) -> bool:
        """False: nothing there. Raises Gone."""
        if not self._buffer:
            self._buffer = memoryview(bytearray(_SIZE))  # once it is needed: memory counts
        if self._start:
            left = self._end - self._start
            self._buffer[:left] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, left
        try:
            count = self._sock.recv_into(self._buffer[self._end :])
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise Gone(f"the network's end of a card: {error}") from error
        if not count:
            raise Gone("the network's end of a card has hung up")
        self._end += count
        return True

    def _send(self, views: Sequence[memoryview]) -> int:
        try:
            return self._sock.sendmsg(views, (), _FLAGS) if views else 0
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise Gone(f"the network's end of a card: {error}") from error
