"""Entropy device (virtio 1.2, section 5.4). **The device to copy** when you write another.

The driver queues writable buffers; the device fills them with the host's random bytes. No features, no configuration,
no state: a saved machine gets fresh bytes from the host it wakes up on.

A new device is a file like this one, a line in `posada.vmm.builder.devices`, a test with `FakeDriver`, and a world in
tests/fuzz/virtio_worlds.py. What it may do and must do stands in `posada.vmm.virtio.device`.
"""

from __future__ import annotations

import os

from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Chain

MAX_BYTES = 4096
"""Given per request, whatever its size: it bounds what one kick costs. The driver asks again if it wants more."""


class Rng(Device):
    kind = 4
    name = "rng"
    queue_sizes = (64,)

    def __init__(self) -> None:
        self._bytes = 0

    def notify(self, index: int) -> None:
        self.serve(self.queues[0], self._fill)

    def metrics(self) -> dict[str, int]:
        return {"bytes": self._bytes}

    def _fill(self, request: Chain) -> int:
        """Never blocks: the host's pool was ready long before a machine was started. Returns the bytes written."""
        written = request.write(os.getrandom(min(request.writable_size, MAX_BYTES)))
        self._bytes += written
        return written
