"""What a network card is plugged into: a tap device, or the unix socket of passt or slirp4netns.

`backend` is the contract, `stream` and `packets` the two kinds, `buffers` the guest's side of receiving, `bucket` the limit
on bytes per second. The card itself is `posada.vmm.virtio.net`.
"""

from __future__ import annotations

import socket

from posada.vmm.net.backend import Backend
from posada.vmm.net.packets import Packets
from posada.vmm.net.stream import Stream
from posada.vmm.net.tap import open_tap

__all__ = ["Backend", "open_backend"]


def open_backend(kind: str, fd: int) -> Backend | None:
    """``tap``: a tap device. ``passt``: a connected unix socket; a stream carries qemu's framing (passt), a seqpacket
    socket a frame per message (slirp4netns ``--target-type=bess``). ``none``: None, a card whose link is down.

    The backend owns ``fd``. Raises OSError if it is something else.
    """
    if kind == "none":
        return None
    if kind == "tap":
        return open_tap(fd)
    with socket.socket(fileno=fd) as sock:
        kind_of_socket = sock.type
        sock.detach()
    return Stream(fd) if kind_of_socket == socket.SOCK_STREAM else Packets(fd)
