"""`System`: the descriptor of /dev/kvm. It makes vms and says what the kernel can do."""

from __future__ import annotations

import os
import struct
from ctypes import sizeof
from types import TracebackType

from posada.errors import KvmError
from posada.kvm.call import call, failure
from posada.kvm.numbers import API_VERSION, Cap, Ioctl
from posada.kvm.structs import CpuidEntry, CpuidHead
from posada.kvm.vm import Vm

MAX_CPUID = 256
MAX_MSRS = 4096


class System:
    """/dev/kvm. It outlives the vms made from it and survives fork(2), which a vm does not."""

    def __init__(self, fd: int) -> None:
        """Takes over ``fd``. Raises KvmError if it is not KVM, or a KVM of another API version than 12."""
        self.fd = fd
        self._host: tuple[int, tuple[int, ...]] | None = None  # what never changes, asked once: forks save the calls
        version = self.api_version
        if version != API_VERSION:
            raise KvmError("KVM_GET_API_VERSION", 0, detail=f"version {version}, and must be {API_VERSION}")

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> System:
        """Raises KvmError if it cannot be opened for reading and writing."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise failure("open", error, f"{path}: {error.strerror}") from error
        try:
            return cls(fd)
        except KvmError:
            os.close(fd)
            raise

    @property
    def api_version(self) -> int:
        return call(self.fd, Ioctl.GET_API_VERSION)

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes of a vcpu's shared mapping."""
        return call(self.fd, Ioctl.GET_VCPU_MMAP_SIZE)

    def check(self, cap: Cap) -> int:
        """0 if the kernel lacks it; else 1 or the capability's own number (API section 4.4)."""
        return call(self.fd, Ioctl.CHECK_EXTENSION, cap)

    def create_vm(self) -> Vm:
        """An empty vm. It belongs to this process: after fork(2) the child cannot use it."""
        if not self._host:
            self._host = (self.vcpu_mmap_size, tuple(self.msr_indices()))
        return Vm(call(self.fd, Ioctl.CREATE_VM), *self._host)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """CPUID as kernel and processor can offer it. It lacks what only the monitor knows: see `posada.vmm.cpuid`."""
        buffer = bytearray(sizeof(CpuidHead) + MAX_CPUID * sizeof(CpuidEntry))
        struct.pack_into("<I", buffer, 0, MAX_CPUID)
        call(self.fd, Ioctl.GET_SUPPORTED_CPUID, buffer)
        return unpack_cpuid(buffer)

    def msr_indices(self) -> list[int]:
        """The MSRs whose values make up a vcpu's state (KVM_GET_MSR_INDEX_LIST)."""
        return self._msr_list(Ioctl.GET_MSR_INDEX_LIST)

    def feature_msr_indices(self) -> list[int]:
        """The MSRs that describe features rather than state."""
        return self._msr_list(Ioctl.GET_MSR_FEATURE_INDEX_LIST)

    def _msr_list(self, request: Ioctl) -> list[int]:
        buffer = bytearray(4 + 4 * MAX_MSRS)
        struct.pack_into("<I", buffer, 0, MAX_MSRS)
        call(self.fd, request, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        return list(struct.unpack_from(f"<{count}I", buffer, 4))

    def close(self) -> None:
        """Idempotent. Vms made from it go on."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> System:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def unpack_cpuid(buffer: bytearray) -> list[CpuidEntry]:
    """The entries of a struct kvm_cpuid2 that the kernel filled in."""
    (count,) = struct.unpack_from("<I", buffer)
    at = sizeof(CpuidHead)
    return [CpuidEntry.from_buffer_copy(buffer, at + i * sizeof(CpuidEntry)) for i in range(count)]
