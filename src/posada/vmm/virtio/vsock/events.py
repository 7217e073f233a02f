"""TRANSPORT_RESET (virtio 1.2, section 5.10.6.6): a forked or restored guest is told that its connections are gone.

The guest ends them in its own time. Until it has given the event's buffer back no new connection may be made: one that
comes too early would be ended together with the old ones.
"""

from __future__ import annotations

from collections.abc import Callable

from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Chain

TRANSPORT_RESET = bytes(4)


class ResetEvent:
    """``index`` is the event queue of ``device``; ``done`` is called when the guest has acted on the event."""

    def __init__(self, device: Device, index: int, done: Callable[[], object]) -> None:
        self._device = device
        self._index = index
        self._done = done
        self._buffers: list[Chain] = []
        self._seen = 0  # buffers we had already, and gave back to be counted as new by nobody
        self.due = False
        """The guest has yet to act."""
        self._sent = False

    def want(self) -> None:
        """Tell the guest with the next `work`."""
        self.due, self._sent = True, False

    def clear(self) -> None:
        """The driver is gone, and its connections with it."""
        self._buffers.clear()
        self._seen = 0
        self.due = self._sent = False

    def quiesce(self) -> None:
        queue = self._device.queues[self._index]
        self._seen += len(self._buffers)
        while self._buffers:
            queue.put_back(self._buffers.pop())

    def work(self) -> None:
        """The guest may have given a buffer, or given the event back. Raises QueueError."""
        queue = self._device.queues[self._index]
        queue.places = True  # for buffers that are held while somebody begins to log what is written
        while True:
            while (chain := queue.pop()) is not None:
                self._buffers.append(chain)
                if self._seen:
                    self._seen -= 1
                elif self._sent:
                    self.due = self._sent = False
                    self._done()
            if not queue.enable_notify():
                break
        if self.due and not self._sent and self._buffers:
            chain = self._buffers.pop(0)
            queue.push(chain, chain.write(TRANSPORT_RESET))
            self._sent = True
            self._device.signal(queue)
