"""What kvm_run says of an exit, typed (API section 5). `Vcpu.io_exit` and `mmio_exit` are the cheap ones; `decode`
makes an object of any of them, for handlers that are seldom called, for traces and for reports."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from posada.kvm.numbers import Exit

UNION = 32
"""Where the union of exit data starts in struct kvm_run."""


class IoExit(NamedTuple):
    """Port I/O: ``repeat`` items of ``size`` bytes lie in ``data`` one after the other (string I/O has many)."""

    write: bool
    port: int
    size: int
    repeat: int
    data: memoryview

    def __str__(self) -> str:
        times = f" × {self.repeat}" if self.repeat != 1 else ""
        return f"IO {'out' if self.write else 'in'} port {self.port:#x}, {self.size} bytes{times}: {self.data[:16].hex(' ')}"


class MmioExit(NamedTuple):
    """An access to guest-physical memory that no slot has; ``data`` is as long as the access (1–8)."""

    write: bool
    address: int
    data: memoryview

    def __str__(self) -> str:
        return f"MMIO {'write' if self.write else 'read'} {self.address:#x}: {self.data.hex(' ')}"


class SystemEventKind(IntEnum):
    """kvm_run.system_event.type."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    WAKEUP = 4
    SUSPEND = 5
    SEV_TERM = 6


class InternalErrorKind(IntEnum):
    """kvm_run.internal.suberror."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


@dataclass(frozen=True)
class Plain:
    """An exit without data: HLT, SHUTDOWN (triple fault), INTR and the like."""

    reason: int

    def __str__(self) -> str:
        return name_of(self.reason)


@dataclass(frozen=True)
class DebugExit:
    """A breakpoint, watchpoint or step (KVM_SET_GUEST_DEBUG): ``pc`` is linear; ``dr6`` says which."""

    exception: int
    pc: int
    dr6: int
    dr7: int

    def __str__(self) -> str:
        return f"DEBUG exception {self.exception} at {self.pc:#x}, DR6 {self.dr6:#x}"


@dataclass(frozen=True)
class FailEntry:
    """The processor refused the guest's state."""

    hardware_reason: int
    cpu: int

    def __str__(self) -> str:
        return f"FAIL_ENTRY, hardware reason {self.hardware_reason:#x} on host cpu {self.cpu}"


@dataclass(frozen=True)
class InternalError:
    """KVM gave up. For EMULATION ``instruction`` holds the bytes it could not emulate, where the kernel tells."""

    suberror: int
    data: tuple[int, ...]
    instruction: bytes

    def __str__(self) -> str:
        kind = _name(InternalErrorKind, self.suberror)
        at = f", instruction {self.instruction.hex(' ')}" if self.instruction else ""
        return f"INTERNAL_ERROR {kind}{at}, data {[hex(d) for d in self.data]}"


@dataclass(frozen=True)
class SystemEvent:
    """The guest asked for something of the whole machine."""

    kind: int
    data: tuple[int, ...]

    def __str__(self) -> str:
        return f"SYSTEM_EVENT {_name(SystemEventKind, self.kind)}"


@dataclass(frozen=True)
class MsrExit:
    """An MSR that the kernel leaves to us."""

    write: bool
    index: int
    data: int

    def __str__(self) -> str:
        return f"{'WRMSR' if self.write else 'RDMSR'} {self.index:#x}" + (f" = {self.data:#x}" if self.write else "")


@dataclass(frozen=True)
class Unknown:
    """A hardware exit that this kernel does not handle."""

    hardware_reason: int

    def __str__(self) -> str:
        return f"UNKNOWN, hardware reason {self.hardware_reason:#x}"


ExitData = IoExit | MmioExit | Plain | DebugExit | FailEntry | InternalError | SystemEvent | MsrExit | Unknown

IO_DATA = struct.Struct("<BBHIQ")
"""kvm_run.io: direction (1: out), size of an item, port, count, where the data starts in kvm_run."""
_MMIO = struct.Struct("<Q8xIB")


def io_exit(run: memoryview) -> IoExit:
    """``run`` is the vcpu's mapped struct kvm_run, whose exit reason is IO."""
    direction, size, port, count, offset = IO_DATA.unpack_from(run, UNION)
    return IoExit(direction == 1, port, size, count, run[offset : offset + size * count])


def mmio_exit(run: memoryview) -> MmioExit:
    """``run`` is the vcpu's mapped struct kvm_run, whose exit reason is MMIO."""
    address, length, write = _MMIO.unpack_from(run, UNION)
    return MmioExit(write != 0, address, run[UNION + 8 : UNION + 8 + length])


def decode(run: memoryview) -> ExitData:
    """The exit that ``run``, a mapped struct kvm_run, describes."""
    (reason,) = struct.unpack_from("<I", run, 8)
    match reason:
        case Exit.IO:
            return io_exit(run)
        case Exit.MMIO:
            return mmio_exit(run)
        case Exit.DEBUG:
            return DebugExit(*struct.unpack_from("<I4xQQQ", run, UNION))
        case Exit.FAIL_ENTRY:
            return FailEntry(*struct.unpack_from("<QI", run, UNION))
        case Exit.INTERNAL_ERROR:
            return _internal_error(run)
        case Exit.SYSTEM_EVENT:
            kind, count = struct.unpack_from("<II", run, UNION)
            return SystemEvent(kind, struct.unpack_from(f"<{min(count, 16)}Q", run, UNION + 8))
        case Exit.X86_RDMSR | Exit.X86_WRMSR:
            return MsrExit(reason == Exit.X86_WRMSR, *struct.unpack_from("<12xI Q", run, UNION))
        case Exit.UNKNOWN:
            return Unknown(*struct.unpack_from("<Q", run, UNION))
    return Plain(reason)


def _internal_error(run: memoryview) -> InternalError:
    suberror, count = struct.unpack_from("<II", run, UNION)
    data = struct.unpack_from(f"<{min(count, 16)}Q", run, UNION + 8)
    instruction = b""
    # struct emulation_failure: flags, then the instruction's size and up to 15 bytes of it, if flag bit 0 says so
    if suberror == InternalErrorKind.EMULATION and len(data) >= 3 and data[0] & 1:
        size = min(run[UNION + 16], 15)
        instruction = bytes(run[UNION + 17 : UNION + 17 + size])
    return InternalError(suberror, data, instruction)


def name_of(reason: int) -> str:
    """The exit's name, or its number for one we do not know."""
    return _name(Exit, reason)


def _name(kind: type[IntEnum], value: int) -> str:
    try:
        return kind(value).name
    except ValueError:
        return str(value)
