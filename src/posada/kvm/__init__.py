"""The kernel's virtual machine interface, /dev/kvm, typed: one class per descriptor, one method per ioctl.

It holds no policy: `posada.vmm` decides what a machine is. x86-64. Source: the kernel's Documentation/virt/kvm/api.rst,
called "API" in this package; every structure's size is checked against the number of its ioctl by a test.

A guest of six bytes of real-mode code, which writes one character to the serial port and halts::

    >>> import ctypes, mmap
    >>> from posada.kvm import Exit, System
    >>> memory = mmap.mmap(-1, 4096)
    >>> memory[:6] = bytes.fromhex("baf803" "b021" "ee") # mov dx, 0x3f8; mov al, '!'; out dx, al
    >>> memory[6:7] = b"\\xf4"                            # hlt
    >>> with System.open() as system, system.create_vm() as vm:
    ...     page = ctypes.c_char.from_buffer(memory)  # SAFETY: `memory` outlives the vm
    ...     address = ctypes.addressof(page)  # SAFETY: see above
    ...     vm.set_memory(slot=0, guest_phys=0x1000, size=4096, address=address)
    ...     with vm.create_vcpu(0) as vcpu:
    ...         sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
    ...         sregs.cs.base = sregs.cs.selector = 0
    ...         vcpu.set_sregs(sregs)
    ...         regs.rip, regs.rflags = 0x1000, 2
    ...         vcpu.set_regs(regs)
    ...         assert vcpu.run() == Exit.IO
    ...         io = vcpu.io_exit()
    ...         print(hex(io.port), bytes(io.data))
    ...         assert vcpu.run() == Exit.HLT
    0x3f8 b'!'

A vm belongs to the process that made it. After fork(2) the `System` is still good, the `Vm` is not: make a new one over
the same memory.
"""

from __future__ import annotations

from posada.errors import KvmError
from posada.kvm.numbers import Cap, Chip, Exit, GuestDebug, Ioctl, MemFlag, MpState
from posada.kvm.system import System
from posada.kvm.vcpu import Vcpu
from posada.kvm.vm import ChipRoute, MsiRoute, Vm

__all__ = [
    "Cap",
    "Chip",
    "ChipRoute",
    "Exit",
    "GuestDebug",
    "Ioctl",
    "KvmError",
    "MemFlag",
    "MpState",
    "MsiRoute",
    "System",
    "Vcpu",
    "Vm",
]
