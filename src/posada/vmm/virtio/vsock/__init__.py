"""The socket device (virtio 1.2, section 5.10): byte streams between processes of the guest and unix sockets of the host.

`packet` is the wire format, `stream` one connection, `doors` the host's listening sockets, `device` ties them together.
"""

from posada.vmm.virtio.vsock.device import Vsock

__all__ = ["Vsock"]
