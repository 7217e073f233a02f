"""A tap device (Linux: Documentation/networking/tuntap.rst), with the offloads it knows where it passes the virtio header."""

from __future__ import annotations

from fcntl import ioctl
from struct import pack, unpack_from

from posada.vmm.net.backend import Feature
from posada.vmm.net.buffers import HEADER_SIZE
from posada.vmm.net.packets import Packets

# linux/if_tun.h
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
IFF_VNET_HDR = 0x4000
_IFREQ = 40
_OFFLOADS = {Feature.GUEST_CSUM: 1, Feature.GUEST_TSO4: 2, Feature.GUEST_TSO6: 4, Feature.GUEST_ECN: 8}


def open_tap(fd: int) -> Packets:
    """Raises OSError if ``fd`` is no tap, or not attached to its interface."""
    request = ioctl(fd, TUNGETIFF, bytes(_IFREQ))
    (flags,) = unpack_from("<H", request, 16)
    return Tap(fd) if flags & IFF_VNET_HDR else Packets(fd)


class Tap(Packets):
    """With IFF_VNET_HDR. Checksums and segmentation are the host kernel's work, or nobody's between two guests."""

    features = (
        Feature.CSUM | Feature.GUEST_CSUM | Feature.GUEST_TSO4 | Feature.GUEST_TSO6 | Feature.GUEST_ECN
        | Feature.HOST_TSO4 | Feature.HOST_TSO6 | Feature.HOST_ECN
    )  # fmt: skip

    def __init__(self, fd: int) -> None:
        super().__init__(fd, header=True)
        ioctl(fd, TUNSETVNETHDRSZ, pack("<i", HEADER_SIZE))
        ioctl(fd, TUNSETVNETLE, pack("<i", 1))

    def settle(self, acked: Feature) -> None:
        ioctl(self.fd, TUNSETOFFLOAD, sum(bit for feature, bit in _OFFLOADS.items() if acked & feature))
