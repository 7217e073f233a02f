"""What a debugger does to a machine, done on its vcpus and memory: registers, memory, breakpoints, run and stop.

All of it on the loop's thread with the lock held, and with every vcpu standing still; except `exited`, which a vcpu's own
thread calls. A software breakpoint is an ``int3`` in guest memory (KVM_GUESTDBG_USE_SW_BP makes it an exit); a hardware
one is a debug register of the processor's, of which there are four (Intel SDM vol. 3B, 18.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from posada.kvm.exits import DebugExit, ExitData, InternalError
from posada.kvm.numbers import GuestDebug
from posada.kvm.paging import Readable, translate
from posada.kvm.report import read_linear, registers
from posada.kvm.vcpu import Vcpu
from posada.vmm.gdb.layout import REGISTERS, SIZE, State
from posada.vmm.vcpu import Vcpus, VcpuThread, Wanted

INT3 = b"\xcc"
MAX_BREAKPOINTS = 4096
_BP, _DR6_STEP = 3, 1 << 14
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}
"""Length of a watched place → LEN field of DR7."""


class TargetError(Exception):
    """The request cannot be done: no memory there, no debug register left, a register that cannot be set."""


class Memory(Readable, Protocol):
    """Guest-physical memory; ValueError where there is none."""

    def write(self, gpa: int, data: bytes, /) -> None: ...


class Action(Enum):
    """What a vcpu does on resume."""

    RUN = "run"
    STEP = "step"


class Kind(Enum):
    """Kinds of hardware breakpoints, with the R/W field of DR7. The processor cannot watch reads alone."""

    EXECUTE = 0
    WRITE = 1
    ACCESS = 3


@dataclass(frozen=True)
class Hardware:
    """One debug register's content."""

    kind: Kind
    address: int
    length: int


@dataclass(frozen=True)
class Stop:
    """Why the machine stands: which vcpu, the signal gdb shows, and its stop reason as ``name:value``."""

    thread: int
    signal: int = 5
    reason: str = ""


class Target:
    """A machine as a debugger sees it. Threads are counted from 0 here."""

    def __init__(self, vcpus: Vcpus, memory: Memory) -> None:
        self.stop = Stop(0, 5)
        self._vcpus = vcpus
        self._memory = memory
        self._software: dict[int, tuple[int, bytes]] = {}
        """Linear address → guest-physical one and the byte that was there."""
        self._hardware: list[Hardware] = []
        self._stepping: set[int] = set()
        self._ran = {thread.index for thread in vcpus.threads if thread.wanted is Wanted.RUN}

    @property
    def threads(self) -> int:
        return len(self._vcpus.threads)

    # registers and memory

    def read_registers(self, thread: int) -> bytes:
        state = self._state(thread)
        return b"".join(state.get(register) for register in REGISTERS)

    def write_registers(self, thread: int, data: bytes) -> None:
        if len(data) != SIZE:
            raise TargetError(f"{len(data)} bytes of registers, and there are {SIZE}")
        pieces, at = {}, 0
        for number, register in enumerate(REGISTERS):
            pieces[number] = data[at : at + register.size]
            at += register.size
        self._put(thread, pieces)

    def read_register(self, thread: int, number: int) -> bytes:
        if not 0 <= number < len(REGISTERS):
            raise TargetError("no such register")
        return self._state(thread).get(REGISTERS[number])

    def write_register(self, thread: int, number: int, data: bytes) -> None:
        if not 0 <= number < len(REGISTERS):
            raise TargetError("no such register")
        self._put(thread, {number: data})

    def read_memory(self, thread: int, address: int, length: int) -> bytes:
        """By the vcpu's page tables; fewer bytes where a page is missing. Our breakpoints are not seen."""
        data = bytearray(read_linear(self._vcpu(thread), self._memory, address, length))
        for at, (_, original) in self._software.items():
            if address <= at < address + len(data):
                data[at - address : at - address + 1] = original
        if not data and length:
            raise TargetError(f"nothing is mapped at {address:#x}")
        return bytes(data)

    def write_memory(self, thread: int, address: int, data: bytes) -> None:
        """By the vcpu's page tables; read-only pages too. All of it is looked up before anything is written."""
        if any(address <= at < address + len(data) for at in self._software):
            raise TargetError("a breakpoint lies there")
        pieces, at = [], 0
        while at < len(data):
            part = min(len(data) - at, 4096 - (address + at) % 4096)
            pieces.append((self._translate(thread, address + at), data[at : at + part]))
            at += part
        try:
            for physical, piece in pieces:
                self._memory.read(physical, len(piece))
            for physical, piece in pieces:
                self._memory.write(physical, piece)
        except ValueError as error:
            raise TargetError(str(error)) from error

    # breakpoints

    def insert_software(self, thread: int, address: int) -> None:
        """Idempotent."""
        if address in self._software:
            return
        if len(self._software) >= MAX_BREAKPOINTS:
            raise TargetError("too many breakpoints")
        physical = self._translate(thread, address)
        try:
            self._software[address] = (physical, self._memory.read(physical, 1))
            self._memory.write(physical, INT3)
        except ValueError as error:
            self._software.pop(address, None)
            raise TargetError(str(error)) from error

    def remove_software(self, address: int) -> None:
        """Idempotent. If the guest has put something else there meanwhile, that stays."""
        physical, original = self._software.pop(address, (0, b""))
        if original and self._memory.read(physical, 1) == INT3:
            self._memory.write(physical, original)

    def insert_hardware(self, kind: Kind, address: int, length: int) -> None:
        """Idempotent. Raises TargetError when all four are taken or the place cannot be watched."""
        wanted = Hardware(kind, address, 1 if kind is Kind.EXECUTE else length)
        if wanted in self._hardware:
            return
        if wanted.length not in _LENGTHS or address % wanted.length or not 0 <= address < 1 << 64:
            raise TargetError("1, 2, 4 or 8 bytes can be watched, at a multiple of as many")
        if len(self._hardware) == 4:
            raise TargetError("all four debug registers are taken")
        self._hardware.append(wanted)

    def remove_hardware(self, kind: Kind, address: int, length: int) -> None:
        """Idempotent."""
        gone = Hardware(kind, address, 1 if kind is Kind.EXECUTE else length)
        self._hardware = [held for held in self._hardware if held != gone]

    # running

    def halt(self) -> None:
        """Returns when every vcpu stands still."""
        self._vcpus.quiesce()

    def resume(self, actions: Mapping[int, Action]) -> None:
        """Vcpus that ``actions`` does not name stay where they are."""
        self._stepping = {index for index, action in actions.items() if action is Action.STEP}
        for index in actions:
            self._set_debug(self._vcpu(index), index in self._stepping)
        for index in actions:
            self._vcpus.threads[index].unpark()

    def exited(self, thread: VcpuThread, what: ExitData | Exception) -> Stop | bool | None:
        """On the vcpu's own thread. A Stop: gdb is to hear of it. True: run on. None: nothing of the debugger's."""
        if isinstance(what, InternalError):
            return self._breakpoint_not_emulated(thread)
        if not isinstance(what, DebugExit):
            return None
        if what.exception == _BP:
            if what.pc in self._software:
                return Stop(thread.index, reason="swbreak:")
            return self._inject(thread, GuestDebug.INJECT_BP)  # an int3 of the guest's own (kprobes, alternatives)
        for number, held in enumerate(self._hardware):
            if what.dr6 >> number & 1:
                if held.kind is Kind.EXECUTE:
                    return Stop(thread.index, reason="hwbreak:")
                return Stop(thread.index, reason=f"{'watch' if held.kind is Kind.WRITE else 'awatch'}:{held.address:x}")
        if what.dr6 & _DR6_STEP or thread.index in self._stepping:
            return Stop(thread.index)
        return self._inject(thread, GuestDebug.INJECT_DB)

    def release(self) -> None:
        """Take every breakpoint out and let run what ran when we came. Idempotent."""
        self.halt()
        for address in list(self._software):
            self.remove_software(address)
        self._hardware.clear()
        for thread in self._vcpus.threads:
            thread.vcpu.set_guest_debug(GuestDebug(0))
            if thread.index in self._ran:
                thread.unpark()

    def command(self, text: str) -> str:
        """gdb's ``monitor TEXT``."""
        match text.split():
            case ["registers"]:
                return "\n\n".join(f"vcpu {t.index}\n{registers(t.vcpu)}" for t in self._vcpus.threads) + "\n"
            case ["exits"]:
                return "".join(f"vcpu {t.index}: {t.counts()}\n" for t in self._vcpus.threads)
        return "monitor registers: every register of every vcpu\nmonitor exits: exit counters\n"

    # insides

    def _vcpu(self, thread: int) -> Vcpu:
        if not 0 <= thread < self.threads:
            raise TargetError("no such vcpu")
        return self._vcpus.threads[thread].vcpu

    def _translate(self, thread: int, address: int) -> int:
        physical = translate(self._vcpu(thread), self._memory, address)
        if physical is None:
            raise TargetError(f"nothing is mapped at {address:#x}")
        return physical

    def _state(self, thread: int) -> State:
        vcpu = self._vcpu(thread)
        return State(vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_fpu())

    def _put(self, thread: int, pieces: Mapping[int, bytes]) -> None:
        """Only the structures that change are written: to write sregs back has effects of its own."""
        vcpu, state = self._vcpu(thread), self._state(thread)
        before = bytes(state.regs), bytes(state.sregs), bytes(state.fpu)
        try:
            for number, data in pieces.items():
                state.put(REGISTERS[number], data)
        except ValueError as error:
            raise TargetError(str(error)) from error
        if bytes(state.sregs) != before[1]:
            vcpu.set_sregs(state.sregs)
        if bytes(state.fpu) != before[2]:
            vcpu.set_fpu(state.fpu)
        if bytes(state.regs) != before[0]:
            vcpu.set_regs(state.regs)

    def _set_debug(self, vcpu: Vcpu, step: bool, extra: GuestDebug = GuestDebug(0)) -> None:
        control = GuestDebug.ENABLE | GuestDebug.USE_SW_BP | extra
        if step:  # not into an interrupt's handler; kernels before 5.15 do not know BLOCKIRQ, and step into it
            control |= GuestDebug.SINGLESTEP | GuestDebug.BLOCKIRQ
        registers = [0] * 8
        if self._hardware:
            control |= GuestDebug.USE_HW_BP
            registers[7] = 0x400
        for number, held in enumerate(self._hardware):
            registers[number] = held.address
            registers[7] |= 2 << 2 * number | (held.kind.value | _LENGTHS[held.length] << 2) << 16 + 4 * number
        vcpu.set_guest_debug(control, registers)

    def _breakpoint_not_emulated(self, thread: VcpuThread) -> Stop | None:
        """A host that emulates guest kernels gives up at an int3, with an invalid opcode on its way to the guest. If the
        int3 is ours, that is the breakpoint; writing the registers back drops the exception (`Vcpu.set_regs`)."""
        regs = thread.vcpu.get_regs()
        if regs.rip not in self._software:
            return None
        thread.vcpu.set_regs(regs)
        return Stop(thread.index, reason="swbreak:")

    def _inject(self, thread: VcpuThread, what: GuestDebug) -> bool:
        self._set_debug(thread.vcpu, thread.index in self._stepping, what)
        return True
