"""`Vcpu`: the descriptor of one virtual processor, with its shared page kvm_run."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from ctypes import addressof, c_uint64, sizeof
from fcntl import ioctl
from types import TracebackType

from posada.kvm import cpustructs as cs
from posada.kvm import exits, numbers
from posada.kvm.call import call, failure
from posada.kvm.numbers import Exit, GuestDebug, Ioctl, MpState
from posada.kvm.structs import CpuidEntry, CpuidHead, DeviceAttr

_RUN = int(Ioctl.RUN)
_INTR = int(Exit.INTR)
_REASON = 2  # kvm_run as 32-bit words
_IMMEDIATE_EXIT = 1  # kvm_run as bytes
_MSR_ENTRY = struct.Struct("<I4xQ")


def enter(fd: int) -> bool:
    """KVM_RUN on a vcpu that is no `Vcpu` yet. False: it was cut short. Raises KvmError."""
    try:
        ioctl(fd, _RUN)
    except (InterruptedError, BlockingIOError):
        return False
    except OSError as error:
        raise failure("RUN", error) from error
    return True


class Vcpu:
    """One virtual processor. Every method raises KvmError.

    While one thread is in `run`, every other ioctl on the vcpu waits for it to return: park it first.
    """

    def __init__(
        self, fd: int, vcpu_id: int, mmap_size: int, xsave_size: int, state_msrs: tuple[int, ...], has_lapic: bool
    ) -> None:
        self.fd = fd
        self.id = vcpu_id
        self.xsave_size = xsave_size
        self.state_msrs = state_msrs
        """The MSRs that hold state on this host (`System.msr_indices`)."""
        self.has_lapic = has_lapic
        """Its local APIC is in the kernel."""
        self.cpuid = b""
        """What `set_cpuid` was given, as struct kvm_cpuid_entry2."""
        self.tsc_khz = 0
        """What `set_tsc_khz` was given; 0: the kernel's own choice."""
        self._map = mmap.mmap(fd, mmap_size)
        self._mmap_size = mmap_size
        self.kvm_run = memoryview(self._map)
        """struct kvm_run and the page of port I/O data behind it, shared with the kernel."""
        self._words = self.kvm_run.cast("I")

    # running

    def run(self) -> int:
        """KVM_RUN: run the guest until it needs us. Returns the exit's reason (`Exit`).

        Exit.INTR when a signal or `immediate_exit` cut it short; by then a pending PIO or MMIO access of the previous
        exit is complete (API section 5: "KVM_EXIT_IO … only complete after user space has re-entered").
        """
        try:
            ioctl(self.fd, _RUN)  # an argument of 0, without trying first whether it is a buffer
        except InterruptedError:
            return _INTR
        except BlockingIOError:  # EAGAIN: a vcpu that waited for its start-up IPI was woken
            return _INTR
        except OSError as error:
            raise failure("RUN", error, f"vcpu {self.id}: {os.strerror(error.errno or 0)}") from error
        return self._words[_REASON]

    @property
    def immediate_exit(self) -> int:
        return self.kvm_run[_IMMEDIATE_EXIT]

    @immediate_exit.setter
    def immediate_exit(self, value: int) -> None:
        """1: the next (or present, with a signal) `run` returns Exit.INTR at once. Any thread may set it."""
        self.kvm_run[_IMMEDIATE_EXIT] = value

    @property
    def reason(self) -> int:
        """The last exit's (`Exit`)."""
        return self._words[_REASON]

    def io_exit(self) -> exits.IoExit:
        """After Exit.IO."""
        return exits.io_exit(self.kvm_run)

    def mmio_exit(self) -> exits.MmioExit:
        """After Exit.MMIO."""
        return exits.mmio_exit(self.kvm_run)

    def exit(self) -> exits.ExitData:
        """What the last exit was, whatever it was."""
        return exits.decode(self.kvm_run)

    def nmi(self) -> None:
        """Send a non-maskable interrupt."""
        call(self.fd, Ioctl.NMI)

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt; only without an irqchip in the kernel."""
        call(self.fd, Ioctl.INTERRUPT, cs.Interrupt(vector))

    def set_guest_debug(self, control: GuestDebug, debugreg: Sequence[int] = ()) -> None:
        """``debugreg`` is up to eight values for DR0–DR7 (hardware breakpoints, with USE_HW_BP)."""
        request = cs.GuestDebugData(control=control)
        for i, value in enumerate(debugreg):
            request.debugreg[i] = value
        call(self.fd, Ioctl.SET_GUEST_DEBUG, request)

    def translate(self, linear: int) -> int | None:
        """The guest-physical address behind a linear one, by the guest's page tables; None if it is not mapped."""
        request = cs.Translation(linear_address=linear)
        call(self.fd, Ioctl.TRANSLATE, request)
        return int(request.physical_address) if request.valid else None

    def kvmclock_ctrl(self) -> None:
        """Tell a guest with kvm-clock that it stood still, so that its watchdogs don't bark. EINVAL if it has none."""
        call(self.fd, Ioctl.KVMCLOCK_CTRL)

    # state

    def get_regs(self) -> cs.Regs:
        state = cs.Regs()
        call(self.fd, Ioctl.GET_REGS, state)
        return state

    def set_regs(self, state: cs.Regs) -> None:
        """Drops a pending exception: before `set_vcpu_events`."""
        call(self.fd, Ioctl.SET_REGS, state)

    def get_sregs(self) -> cs.Sregs:
        state = cs.Sregs()
        call(self.fd, Ioctl.GET_SREGS, state)
        return state

    def set_sregs(self, state: cs.Sregs) -> None:
        call(self.fd, Ioctl.SET_SREGS, state)

    def get_fpu(self) -> cs.Fpu:
        state = cs.Fpu()
        call(self.fd, Ioctl.GET_FPU, state)
        return state

    def set_fpu(self, state: cs.Fpu) -> None:
        call(self.fd, Ioctl.SET_FPU, state)

    def get_xsave(self) -> bytearray:
        """The whole extended state, ``xsave_size`` bytes, in the processor's XSAVE layout."""
        state = bytearray(self.xsave_size)
        call(self.fd, Ioctl.GET_XSAVE2 if self.xsave_size > 4096 else Ioctl.GET_XSAVE, state)
        return state

    def set_xsave(self, state: bytearray) -> None:
        """Raises ValueError unless it is ``xsave_size`` bytes long: the kernel reads that many."""
        if len(state) != self.xsave_size:
            raise ValueError(f"an XSAVE area of {len(state)} bytes, and this vm's is {self.xsave_size}")
        call(self.fd, Ioctl.SET_XSAVE, state)

    def get_xcrs(self) -> cs.Xcrs:
        state = cs.Xcrs()
        call(self.fd, Ioctl.GET_XCRS, state)
        return state

    def set_xcrs(self, state: cs.Xcrs) -> None:
        call(self.fd, Ioctl.SET_XCRS, state)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values by index. The kernel stops at one it does not know: it and those behind it are left out."""
        indices = list(indices)
        buffer = bytearray(cs.MsrHead(nmsrs=len(indices)))
        for index in indices:
            buffer += _MSR_ENTRY.pack(index, 0)
        count = call(self.fd, Ioctl.GET_MSRS, buffer)
        return dict(_MSR_ENTRY.iter_unpack(memoryview(buffer)[8 : 8 + 16 * count]))

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """Returns how many were set, in order: fewer than all if the kernel refused one."""
        buffer = bytearray(cs.MsrHead(nmsrs=len(values)))
        for index, value in values.items():
            buffer += _MSR_ENTRY.pack(index, value)
        return call(self.fd, Ioctl.SET_MSRS, buffer)

    def get_lapic(self) -> cs.Lapic:
        state = cs.Lapic()
        call(self.fd, Ioctl.GET_LAPIC, state)
        return state

    def set_lapic(self, state: cs.Lapic) -> None:
        """After `set_sregs`, whose ``apic_base`` turns the APIC on; before the TSC deadline MSR."""
        call(self.fd, Ioctl.SET_LAPIC, state)

    def get_vcpu_events(self) -> cs.VcpuEvents:
        state = cs.VcpuEvents()
        call(self.fd, Ioctl.GET_VCPU_EVENTS, state)
        return state

    def set_vcpu_events(self, state: cs.VcpuEvents) -> None:
        call(self.fd, Ioctl.SET_VCPU_EVENTS, state)

    def get_mp_state(self) -> MpState:
        state = cs.MpStateData()
        call(self.fd, Ioctl.GET_MP_STATE, state)
        return MpState(state.mp_state)

    def set_mp_state(self, state: MpState) -> None:
        call(self.fd, Ioctl.SET_MP_STATE, cs.MpStateData(state))

    def get_debugregs(self) -> cs.DebugRegs:
        state = cs.DebugRegs()
        call(self.fd, Ioctl.GET_DEBUGREGS, state)
        return state

    def set_debugregs(self, state: cs.DebugRegs) -> None:
        call(self.fd, Ioctl.SET_DEBUGREGS, state)

    def get_cpuid(self) -> list[CpuidEntry]:
        """What the guest sees: what `set_cpuid` was given, with the bits that follow its CR4 and APIC base."""
        count = len(self.cpuid) // sizeof(CpuidEntry)  # kernels up to 6.x do not say it, despite API 4.42
        buffer = bytearray(CpuidHead(nent=count)) + bytearray(len(self.cpuid))
        call(self.fd, Ioctl.GET_CPUID2, buffer)
        return [CpuidEntry.from_buffer_copy(buffer, 8 + i * sizeof(CpuidEntry)) for i in range(count)]

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """What the guest's CPUID instruction says. Before the first `run`, and before any other state."""
        self.cpuid = b"".join(map(bytes, entries))
        call(self.fd, Ioctl.SET_CPUID2, bytearray(CpuidHead(nent=len(entries))) + self.cpuid)

    def get_tsc_khz(self) -> int:
        return call(self.fd, Ioctl.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Without TSC scaling in hardware only the host's own rate, or nearly, is possible."""
        call(self.fd, Ioctl.SET_TSC_KHZ, khz)
        self.tsc_khz = khz

    def has_tsc_offset(self) -> bool:
        """Whether the kernel (5.16) lets us read and write the TSC's offset."""
        request = DeviceAttr(group=numbers.TSC_CTRL, attr=numbers.TSC_OFFSET)
        try:
            ioctl(self.fd, Ioctl.HAS_DEVICE_ATTR, request)
        except OSError:
            return False
        return True

    def get_tsc_offset(self) -> int:
        """Guest TSC minus host TSC, modulo 2⁶⁴."""
        value = c_uint64()
        # SAFETY: the attribute is a u64; `value` is one and outlives the call.
        request = DeviceAttr(0, numbers.TSC_CTRL, numbers.TSC_OFFSET, addressof(value))
        call(self.fd, Ioctl.GET_DEVICE_ATTR, request, "TSC offset")
        return value.value

    def set_tsc_offset(self, offset: int) -> None:
        """Vcpus given the same offset count as synchronised."""
        value = c_uint64(offset)
        # SAFETY: the attribute is a u64; `value` is one and outlives the call.
        request = DeviceAttr(0, numbers.TSC_CTRL, numbers.TSC_OFFSET, addressof(value))
        call(self.fd, Ioctl.SET_DEVICE_ATTR, request, "TSC offset")

    def after_fork(self, fd: int) -> None:
        """In a forked child: become ``fd``, the same vcpu of the child's own vm."""
        self.close()
        self.fd = fd
        self._map = mmap.mmap(fd, self._mmap_size)
        self.kvm_run = memoryview(self._map)
        self._words = self.kvm_run.cast("I")

    def close(self) -> None:
        """Idempotent. Nobody may be in `run`. Views of exit data that someone still holds stay readable."""
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        os.close(fd)
        self._words.release()
        self.kvm_run.release()
        try:
            self._map.close()
        except BufferError:  # someone holds the data of an exit: it is unmapped when that goes
            pass

    def __enter__(self) -> Vcpu:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
