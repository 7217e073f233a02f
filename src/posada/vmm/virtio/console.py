"""Console (virtio 1.2, section 5.3), one port: bytes between the guest's hvc0 and one descriptor of the host.

The descriptor (socket, pipe, pty) is read straight into the driver's buffers and written straight from them, so nothing
piles up here: a guest that doesn't read leaves the bytes in the host's socket, a host that doesn't read leaves them in
the guest's queue. We wait for the descriptor only while there is something to do with it: never a busy loop.

The other end's closing ends the input; what the guest writes from then on is dropped, as on a terminal unplugged.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Mapping
from typing import Any

from posada.vmm import state
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Chain

SIZE = 1 << 0
"""Feature: the configuration holds the terminal's size."""

RECEIVE, TRANSMIT = 0, 1

_CONFIG = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
_MAX_BYTES = 64 << 10  # moved per request and turn: no guest keeps the monitor to itself
_GONE = select.EPOLLHUP | select.EPOLLERR


class Console(Device):
    kind = 3
    name = "console"
    queue_sizes = (64, 64)
    features = SIZE

    _fd = -1

    def __init__(self, fd: int) -> None:
        """``fd`` is the device's own from now on, and is made non-blocking."""
        self._cols = self._rows = 0  # 0: not known, the guest chooses
        self._input = self._output = 0  # bytes so far
        self._sent = 0  # bytes of the oldest request that are written already
        self._hungry = self._blocked = False
        self._open(fd)

    def resize(self, cols: int, rows: int) -> None:
        """The terminal's size has changed, in characters. Raises ValueError."""
        if not (0 <= cols <= 0xFFFF and 0 <= rows <= 0xFFFF):
            raise ValueError(f"no terminal is {cols}x{rows}")
        self._cols, self._rows = cols, rows
        self.config_changed()

    def metrics(self) -> dict[str, int]:
        return {"bytes_in": self._input, "bytes_out": self._output}

    # For the transport.

    def config(self) -> bytes:
        return _CONFIG.pack(self._cols, self._rows, 1, 0)

    def notify(self, index: int) -> None:
        if index == RECEIVE:
            self._hungry = False
            self.serve(self.queues[RECEIVE], self._receive)
        else:
            self._blocked = False
            self.serve(self.queues[TRANSMIT], self._transmit)
        self._wait()

    def reset(self) -> None:
        self._hungry = self._blocked = False
        self._sent = 0
        self._wait()

    def save(self) -> dict[str, Any]:
        return {"cols": self._cols, "rows": self._rows, "sent": self._sent}

    def load(self, document: dict[str, Any]) -> None:
        self._cols = state.integer(document, "cols", 0, 0xFFFF)
        self._rows = state.integer(document, "rows", 0, 0xFFFF)
        self._sent = state.integer(document, "sent", 0, 0xFFFF_FFFF)

    def reopen(self, given: Mapping[str, Any]) -> None:
        """``given[name]`` is the new descriptor; without one the console is unplugged."""
        self.close()
        if (fd := given.get(self.name)) is not None:
            self._open(fd)

    def close(self) -> None:
        if self._fd >= 0:
            self._unplug()
            os.close(self._fd)
            self._fd = -1

    # The descriptor.

    def _open(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._watched = 0  # events we wait for
        self._plugged = True

    def _unplug(self) -> None:
        """The other end is gone, for good."""
        if self._watched:
            self.loop.unwatch(self._fd)
        self._watched = 0
        self._plugged = False

    def _wait(self) -> None:
        """Wait for what the queues need, and nothing else: epoll is level-triggered."""
        wanted = select.EPOLLIN * self._hungry | select.EPOLLOUT * self._blocked
        if not self._plugged or wanted == self._watched:
            return
        if self._watched:
            self.loop.unwatch(self._fd)  # altogether: a hang-up is reported even when nothing is waited for
        if wanted:
            self.loop.watch(self._fd, self.guarded(self._ready), wanted)
        self._watched = wanted

    def _ready(self, events: int) -> None:
        if events & (select.EPOLLIN | _GONE) and self._hungry:
            self.notify(RECEIVE)
        if events & (select.EPOLLOUT | _GONE) and self._blocked:
            self.notify(TRANSMIT)

    # The queues.

    def _receive(self, request: Chain) -> int | None:
        """Host to guest. Returns bytes, or None if there is nothing to read now."""
        if not self._plugged:
            return None
        if not request.writable_size:
            return 0
        try:
            count = os.readv(self._fd, request.writable)
        except BlockingIOError:
            self._hungry = True
            return None
        except OSError:  # the other end is gone: a reset socket, a pty without a terminal (EIO)
            count = 0
        if not count:
            self._unplug()
            return None
        self._input += count
        return count

    def _transmit(self, request: Chain) -> int | None:
        """Guest to host. Returns 0 when the request is done, or None while the host takes no more."""
        waiting = _window(request.readable, self._sent, _MAX_BYTES)
        count = sum(map(len, waiting))
        if self._plugged and waiting:
            try:
                count = os.writev(self._fd, waiting)
            except BlockingIOError:
                self._blocked = True
                return None
            except OSError:
                self._unplug()
        self._sent += count
        self._output += count
        if self._sent < request.readable_size:
            self.transport.again(TRANSMIT)
            return None
        self._sent = 0
        return 0


def _window(views: list[memoryview], start: int, size: int) -> list[memoryview]:
    """``size`` bytes of ``views`` together, or what there is, from ``start`` on; without a copy."""
    found = []
    for view in views:
        if start < len(view) and size:
            part = view[start : start + size]
            found.append(part)
            size -= len(part)
        start = max(0, start - len(view))
    return found
