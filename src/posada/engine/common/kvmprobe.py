"""Measure how fast /dev/kvm runs guest kernel code. A program of its own, so that a hang can be killed.

The device's presence says nothing: some hosts emulate every instruction at ring 0 (about 2 million a second). A flat
32-bit guest counts a register down at ring 0 and halts; this process does the same itself, to compare. Prints
``rate GUEST OWN`` (instructions per second; OWN is 0 where nobody may make code of data) or ``error TEXT``.

Numbers are from linux/kvm.h and Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_HLT = 5

#: A processor is asked for ever more loops until they take so long (seconds) that what entering the guest costs, which is
#: much where the processor is emulated itself, does not count; or for the last of these.
ENOUGH = 0.02
LOOPS = (100_000, 1_000_000, 10_000_000)
#: Tries at most, and instructions per second that need no second one.
TRIES, PLENTY = 5, 50e6
ENTRY = 0x1000
#: ``1: dec ecx; jnz 1b; hlt``
CODE = b"\x49\x75\xfd\xf4"
#: ``mov ecx, edi; 1: dec ecx; jnz 1b; ret``
OWN_CODE = b"\x89\xf9\xff\xc9\x75\xfc\xc3"


def best_rate(run: Callable[[int], None]) -> float:
    """Of a few tries: one that was interrupted by others says nothing about the processor."""
    best = 0.0
    for _ in range(TRIES):
        best = max(best, rate(run))
        if best >= PLENTY:
            break
    return best


def rate(run: Callable[[int], None]) -> float:
    """Instructions per second of what runs two in each loop."""
    for loops in LOOPS:
        start = time.perf_counter()
        run(loops)
        seconds = time.perf_counter() - start
        if seconds >= ENOUGH:
            break
    return 2 * loops / seconds


def own_rate() -> float:
    """Instructions per second of the same loop in this process; 0 if memory may not be made executable."""
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return 0.0
    code.write(OWN_CODE)
    # SAFETY: `code` is a page of ours, executable and never closed, that holds a function of one integer.
    return rate(ctypes.CFUNCTYPE(None, ctypes.c_uint)(ctypes.addressof(ctypes.c_char.from_buffer(code))))


def measure() -> float:
    """Instructions per second. Raises OSError, RuntimeError."""
    system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    if fcntl.ioctl(system, KVM_GET_API_VERSION) != 12:
        raise RuntimeError("not API version 12")
    vm = fcntl.ioctl(system, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, 0x2000)
    memory[ENTRY : ENTRY + len(CODE)] = CODE
    # SAFETY: `memory` outlives the vm; it is unmapped only when this process ends.
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, len(memory), address))
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, fcntl.ioctl(system, KVM_GET_VCPU_MMAP_SIZE))
    sregs = bytearray(312)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
    for i in range(6):  # cs, ds, es, fs, gs, ss: flat, 4 GiB, ring 0
        kind, selector = (11, 8) if i == 0 else (3, 16)
        struct.pack_into("<QIH8B", sregs, i * 24, 0, 0xFFFFFFFF, selector, kind, 1, 0, 1, 1, 0, 1, 0)
    (cr0,) = struct.unpack_from("<Q", sregs, 8 * 24 + 2 * 16)
    struct.pack_into("<Q", sregs, 8 * 24 + 2 * 16, cr0 | 1)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, sregs)

    def count_down(loops: int) -> None:
        regs = [0] * 18
        regs[2], regs[16], regs[17] = loops, ENTRY, 2  # rcx, rip, rflags
        fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *regs))
        fcntl.ioctl(vcpu, KVM_RUN, 0)
        (reason,) = struct.unpack_from("<I", run, 8)
        if reason != KVM_EXIT_HLT:
            raise RuntimeError(f"the guest left with exit reason {reason} instead of HLT")

    return best_rate(count_down)


if __name__ == "__main__":
    try:
        print(f"rate {measure():.0f} {own_rate():.0f}")  # noqa: T201
    except (OSError, RuntimeError) as error:
        print(f"error {error}")  # noqa: T201
