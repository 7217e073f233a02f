"""Interrupt lines: an eventfd that KVM turns into an edge on a GSI, without a call into Python's side of KVM."""

from __future__ import annotations

import os
from typing import Protocol


class Irqfd(Protocol):
    """The part of `posada.kvm.Vm` that a line needs."""

    def irqfd(self, eventfd: int, gsi: int, assign: bool = True) -> None: ...


class Line:
    """One edge-triggered interrupt line. Call it, or `raise_`, from any thread.

    The eventfd exists before the line is connected: an interrupt raised meanwhile (a restore, say) is delivered then.
    """

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def connect(self, vm: Irqfd) -> None:
        """Let ``vm`` listen to this line. Raises KvmError (no in-kernel irqchip, GSI out of range)."""
        vm.irqfd(self.fd, self.gsi)

    def raise_(self) -> None:
        os.eventfd_write(self.fd, 1)

    __call__ = raise_

    def after_fork(self) -> None:
        """In a forked child: an eventfd of its own, unconnected. The inherited one would interrupt the parent."""
        os.close(self.fd)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        os.close(self.fd)
