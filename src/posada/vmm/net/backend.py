"""The contract between a network card and what it is plugged into. No threads, no blocking: the card watches `fd`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, IntFlag
from struct import Struct
from typing import Protocol

from posada.vmm.net.buffers import RxBuffers

HEADER = Struct("<BBHHHHH")
"""struct virtio_net_hdr with num_buffers (virtio 1.2, section 5.1.6), in front of every packet of the guest's queues."""
MAX_FRAME = 65553
"""Longest Ethernet frame: 64 KiB less one of IP, 14 of header, 4 of VLAN tag. Bytes."""
MIN_FRAME = 14


class Feature(IntFlag):
    """Feature bits of the network device (virtio 1.2, section 5.1.3)."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16


class Outcome(Enum):
    """Why `Backend.receive` stopped."""

    EMPTY = "nothing more to read"
    FULL = "the guest has no buffers"
    MORE = "the turn is over"


class Gone(Exception):
    """The peer has hung up, or says what makes no sense: the link is down from now on."""


class Backend(Protocol):
    """Where packets come from and go to."""

    features: Feature
    """What it can carry beyond plain frames."""
    fd: int
    waiting: bool
    """It has to be called (`flush`) when ``fd`` can be written to."""
    owing: bool
    """It has frames of its own for the guest: `receive` gives them, though nothing may have come from ``fd``."""

    def settle(self, acked: Feature) -> None:
        """The driver has chosen among `features`."""

    def send(self, packets: Sequence[list[memoryview]], sizes: Sequence[int]) -> int:
        """Packets from the guest, each with its `HEADER`; ``sizes`` without it, in bytes. Size 0: skip this one.

        Returns how many were taken: the rest must come again when ``fd`` is writable. Raises Gone.
        """

    def flush(self) -> None:
        """``fd`` is writable. Raises Gone."""

    def receive(self, buffers: RxBuffers, packets: int) -> Outcome:
        """Move up to ``packets`` into the guest's buffers; the caller publishes them. Raises Gone, QueueError."""

    def close(self) -> None:
        """Idempotent."""
