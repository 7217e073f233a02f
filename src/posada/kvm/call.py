"""The one place where an ioctl is made and its failure becomes a `KvmError`."""

from __future__ import annotations

import ctypes
import errno
import os
from fcntl import ioctl
from typing import TYPE_CHECKING

from posada.errors import KvmError
from posada.kvm.numbers import Ioctl

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_libc = ctypes.CDLL(None, use_errno=True)  # once: a forked child cannot afford it

_HINTS = {
    errno.EACCES: "the user needs read and write access to /dev/kvm",
    errno.EBADF: "the descriptor is closed or not KVM's",
    errno.EBUSY: "another vm or hypervisor holds it",
    errno.EEXIST: "it was made already, or overlaps what is there",
    errno.EFAULT: "an address given to the kernel is not mapped",
    errno.EINVAL: "the kernel refused an argument, or does not know this request",
    errno.EIO: "a vm belongs to the process that made it: after fork(2) make a new one",
    errno.ENOMEM: "the host is out of memory or of locked memory",
    errno.ENOTTY: "this kernel's KVM does not have it",
    errno.ENXIO: "it does not exist in this vm; is the irqchip made?",
}


def failure(name: str, error: OSError, detail: str = "") -> KvmError:
    """What to raise for ``error``, with what to do about it."""
    number = error.errno or 0
    return KvmError(f"KVM_{name}", number, detail=detail or os.strerror(number), hint=_HINTS.get(number))


def call(fd: int, request: Ioctl, argument: int | WriteableBuffer = 0, detail: str = "") -> int:
    """``ioctl(fd, request, argument)``, again when a signal cuts it. A buffer is read and written by the kernel.

    The GIL is released meanwhile. Integers are C ints: `call_long` takes larger ones. Raises KvmError.
    """
    while True:
        try:
            return ioctl(fd, request, argument)
        except InterruptedError:
            continue
        except OSError as error:
            raise failure(request.name, error, detail) from error


def call_long(fd: int, request: Ioctl, argument: int) -> int:
    """`call` for an integer ≥ 2³¹: `fcntl.ioctl` takes a C int, which the kernel would see sign-extended."""
    if _libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(argument)) < 0:
        number = ctypes.get_errno()
        raise failure(request.name, OSError(number, os.strerror(number)))
    return 0
