"""Packets of the socket device (virtio 1.2, section 5.10.6): a header of 44 bytes, then at most ``length`` of payload."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from posada.vmm.virtio.views import split

HEADER = Struct("<QQIIIHHIII")
HOST_CID = 2
STREAM = 1
"""The packet type; datagrams and seqpacket are not offered."""
MAX_PAYLOAD = 64 << 10
"""Largest payload taken from a guest, bytes: Linux sends no larger ones, and the bound limits what one packet costs."""
WRAP = 0xFFFF_FFFF
"""Counters of bytes are 32 bits wide and wrap."""


class Op(IntEnum):
    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Shut:
    """What the sender of a SHUTDOWN will not do any more (its ``flags``). Plain numbers: flags of `enum` cost too much."""

    RECEIVE = 1
    SEND = 2
    BOTH = 3


class Packet(NamedTuple):
    """A header, as it stands in memory."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


def parse(views: Sequence[memoryview]) -> tuple[Packet, list[memoryview]] | None:
    """The header, copied out of guest memory, and the views of what follows it. None if there is less than a header."""
    if views and len(views[0]) >= HEADER.size:  # as Linux has it: the usual way is the fast one
        packet = Packet._make(HEADER.unpack_from(views[0]))
        rest = list(views[1:]) if len(views[0]) == HEADER.size else [views[0][HEADER.size :], *views[1:]]
        return packet, rest
    head, rest = split(views, HEADER.size)
    data = b"".join(head)
    return (Packet._make(HEADER.unpack(data)), rest) if len(data) == HEADER.size else None
