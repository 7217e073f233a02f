"""A file mapping by address, through libc. Python's mmap keeps the interpreter's lock while it populates and unmaps,
which for guest memory is tens of milliseconds; ctypes does not.
"""

from __future__ import annotations

import ctypes
import os

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED = 1
#: madvise(2), since Linux 5.14.
_POPULATE_READ = 22
#: Bytes a single pwrite(2); the kernel takes at most 2 GiB.
_CHUNK = 1 << 30

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.pwrite.restype = ctypes.c_ssize_t
_libc.pwrite.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """The first ``size`` bytes of a file, mapped shared. Who uses ``address`` keeps inside them, and not after `close`."""

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        self.size = size
        protection = _PROT_READ | (_PROT_WRITE if writable else 0)
        address = _libc.mmap(None, size, protection, _MAP_SHARED, fd, 0)
        if address is None or address == _FAILED:
            raise _error("mmap")
        self.address: int = address

    def populate(self, start: int, length: int) -> None:
        """Bring pages in, so that reading them costs no fault each. Does nothing on kernels before 5.14."""
        # SAFETY: madvise refuses addresses that are not mapped; populating for reading changes no content.
        _libc.madvise(self.address + self._inside(start, length), length, _POPULATE_READ)

    def write_to(self, fd: int, start: int, length: int) -> None:
        """Write a range to the same offset of a file. Raises OSError: EFAULT when our own file has shrunk meanwhile."""
        self._inside(start, length)
        done = 0
        while done < length:
            # SAFETY: the kernel reads the range, which is inside the mapping, and answers EFAULT for what is not there.
            address, count = self.address + start + done, min(length - done, _CHUNK)
            written = _libc.pwrite(fd, address, count, start + done)
            if written < 0:
                raise _error("pwrite")
            done += written

    def _inside(self, start: int, length: int) -> int:
        if self.address == 0 or start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"{length} bytes at {start} are not inside a mapping of {self.size}")
        return start

    def close(self) -> None:
        """Idempotent."""
        if self.address:
            # SAFETY: ours, and `address` is forgotten.
            _libc.munmap(self.address, self.size)
            self.address = 0


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
