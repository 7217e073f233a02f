"""One connection: a host's unix socket on one side, ports of guest and host on the other, and what is under way between.

::

    accept ──► CONNECTING ──RESPONSE──► OPEN ──both ends shut──► CLOSING ──RST──► GONE
                 │    ▲                   │
               RST    │ retry             └── the guest shuts both, or resets ──► DRAINING ──► GONE
                 ▼    │
                WAITING          only for a channel: its client waits until somebody in the guest listens

Flow control (section 5.10.6.3): each side says how many bytes it has room for in total (``buf_alloc``) and how many it
has passed on (``fwd_cnt``); the other never has more than that under way. So what waits here for a host that does not
read is at most `BUFFER` bytes, and it holds up no other stream.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Sequence
from enum import Enum
from fcntl import ioctl

from posada.vmm.virtio.views import split, total
from posada.vmm.virtio.vsock.packet import WRAP, Packet, Shut

BUFFER = 256 << 10
"""Bytes from the guest that one stream holds for a host that does not read."""
_PIECES = 64
"""Pieces of backlog per sendmsg."""

_SIOCINQ = 0x541B
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class State(Enum):
    CONNECTING = "connecting"
    WAITING = "waiting"
    OPEN = "open"
    CLOSING = "closing"
    DRAINING = "draining"
    GONE = "gone"


class Due:
    """Packets the guest is to get as soon as it has a buffer for them, in this order. Bits."""

    REQUEST = 1
    CREDIT_UPDATE = 2
    CREDIT_REQUEST = 4
    SHUTDOWN = 8


class Stream:
    """State of one connection. Counters are bytes, modulo 2^32 as on the wire."""

    __slots__ = (
        "asked", "backlog", "backlog_size", "banner", "deaf", "due", "eof", "forwarded", "guest_port", "guest_shut",
        "host_port", "parked", "patient", "peer_alloc", "peer_forwarded", "received", "sent", "shut", "sock", "state",
        "told", "watched",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, host_port: int, guest_port: int, *, patient: bool, banner: bytes) -> None:
        self.sock = sock
        self.host_port = host_port
        self.guest_port = guest_port
        self.patient = patient
        """Its client waits for a listener in the guest, rather than being told that there is none."""
        self.banner = banner
        """What the client is told once the guest has accepted."""
        self.state = State.CONNECTING
        self.due = Due.REQUEST
        self.watched = -1
        self.parked = False
        """The host has sent something and the guest has no buffer."""
        # From the guest to the host.
        self.backlog: deque[memoryview] = deque()
        self.backlog_size = 0
        self.received = self.forwarded = self.told = 0
        self.guest_shut = 0
        # From the host to the guest.
        self.sent = self.peer_alloc = self.peer_forwarded = 0
        self.asked = False
        """The guest has been asked for credit, and has not answered."""
        self.shut = 0
        """What the guest has been (or is to be) told that the host's side does not do any more."""
        self.eof = False
        """The host's client sends no more."""
        self.deaf = False
        """The host's client reads no more: what comes for it is dropped."""

    @property
    def key(self) -> tuple[int, int]:
        return self.host_port, self.guest_port

    @property
    def credit(self) -> int:
        """Bytes the guest has room for."""
        left = self.peer_alloc - (self.sent - self.peer_forwarded & WRAP)
        return left if left > 0 else 0

    @property
    def readable(self) -> bool:
        """What the host sends can be passed on."""
        return (
            self.state is State.OPEN and not (self.eof or self.parked)
            and not self.guest_shut & Shut.RECEIVE and self.credit > 0
        )  # fmt: skip

    @property
    def starved(self) -> bool:
        """The client may send more, and the guest has no room."""
        return self.state is State.OPEN and not (self.eof or self.guest_shut & Shut.RECEIVE or self.credit)

    @property
    def silent(self) -> bool:
        """Nothing more is read from the client, though it may still read: of its end we would hear in no other way."""
        return self.state is State.OPEN and (self.eof or self.guest_shut & Shut.RECEIVE != 0)

    def greet(self) -> None:
        """The guest has accepted: tell the client, if it was promised that."""
        try:
            self.deaf = self.banner != b"" and self.sock.send(self.banner, _SEND) < len(self.banner)
        except OSError:
            self.deaf = True

    def half_close(self) -> None:
        """The guest sends no more, or reads no more: so does its socket, once everything is written."""
        if not self.guest_shut or self.state is not State.OPEN:
            return
        try:
            if self.guest_shut & Shut.SEND and not self.backlog:
                self.sock.shutdown(socket.SHUT_WR)
            if self.guest_shut & Shut.RECEIVE:
                self.sock.shutdown(socket.SHUT_RD)
        except OSError:  # the client is gone, which is heard of in other ways
            pass

    def take_credit(self, packet: Packet) -> bool:
        """Every packet of the guest carries its credit. False if no honest guest could say that."""
        outstanding = self.sent - packet.fwd_cnt & WRAP
        if outstanding > WRAP >> 1:
            return False  # it has passed on more than it got
        self.peer_alloc = packet.buf_alloc
        # Packets of several CPUs may overtake each other in the guest: an older count is not an error.
        if outstanding <= (self.sent - self.peer_forwarded & WRAP):
            self.peer_forwarded = packet.fwd_cnt
        if self.credit:
            self.asked = False
        return True

    def accept(self, views: Sequence[memoryview], length: int) -> bool:
        """Data from the guest: to the socket as far as it takes it, the rest into the backlog.

        False if the guest sent more than it was told there is room for.
        """
        if length > BUFFER - self.backlog_size:
            return False
        self.received = self.received + length & WRAP
        sent = length if self.deaf else 0
        if length and not self.backlog and not self.deaf:
            sent = self._send(views, length)
        self.forwarded = self.forwarded + sent & WRAP
        if sent < length:
            # Copied: the buffers are the guest's again as soon as this request is answered.
            self.backlog.append(memoryview(b"".join(split(views, sent)[1])))
            self.backlog_size += length - sent
        return True

    def flush(self) -> None:
        """Write what the socket takes of the backlog."""
        while self.backlog and not self.deaf:
            views = [self.backlog[i] for i in range(min(len(self.backlog), _PIECES))]
            sent = self._send(views, total(views))
            if not sent or self.deaf:
                return
            self.backlog_size -= sent
            self.forwarded = self.forwarded + sent & WRAP
            while sent:
                piece = self.backlog.popleft()
                if len(piece) > sent:
                    self.backlog.appendleft(piece[sent:])
                    break
                sent -= len(piece)

    def drop_backlog(self) -> None:
        """Nobody reads it: as if it were passed on."""
        self.forwarded = self.forwarded + self.backlog_size & WRAP
        self.backlog.clear()
        self.backlog_size = 0

    @property
    def update_due(self) -> bool:
        """The guest believes there is clearly less room than there is."""
        return (self.forwarded - self.told & WRAP) >= BUFFER // 4

    def _send(self, views: Sequence[memoryview], length: int) -> int:
        """Bytes the socket took of ``length``. A client that is gone takes everything and is `deaf` from then on."""
        try:
            return self.sock.send(views[0], _SEND) if len(views) == 1 else self.sock.sendmsg(views, (), _SEND)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self.deaf = True
            self.drop_backlog()
            return length


def queued(sock: socket.socket) -> int:
    """Bytes that can be read at once, by SIOCINQ (unix(7))."""
    return int.from_bytes(ioctl(sock.fileno(), _SIOCINQ, bytes(4)), sys.byteorder)
