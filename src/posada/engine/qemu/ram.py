"""Guest memory as memfds: making, copying, sealing, saving and loading it.

A machine that booted has one memfd, mapped shared. A capture copies it; the copy is sealed, so that neither the source nor
a guest's balloon can change it, and is mapped privately by any number of machines. What such a machine wrote lies in
anonymous memory, found in /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst) and read with process_vm_readv(2).
"""

from __future__ import annotations

import os


def create(size: int, name: str = "posada-ram") -> int:
    """An empty memfd of ``size`` bytes that can be sealed."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd
