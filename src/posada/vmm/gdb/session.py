"""One debugging session, without I/O: a packet's payload in, a reply's payload out."""

from __future__ import annotations

import re
from collections.abc import Callable

from posada.vmm.gdb.layout import target_xml
from posada.vmm.gdb.packet import MAX_PACKET
from posada.vmm.gdb.target import Action, Kind, Stop, Target, TargetError

OK, UNKNOWN, INVALID, FAILED = b"OK", b"", b"E16", b"E0e"
"""UNKNOWN is the protocol's answer to any packet we do not support. The numbers are EINVAL and EFAULT."""
_KINDS = {b"1": Kind.EXECUTE, b"2": Kind.WRITE, b"4": Kind.ACCESS}


class Session:
    """`handle` each packet. While `running`, gdb waits for a `stop_reply`, which the server sends."""

    def __init__(self, target: Target) -> None:
        self.running = False
        self.no_ack = False
        self.ended = False
        """gdb has said good-bye."""
        self._target = target
        self._thread = 0
        self._by_letter: dict[int, Callable[[bytes], bytes | None]] = {
            ord("?"): lambda rest: self.stop_reply(self._target.stop),
            ord("g"): lambda rest: self._target.read_registers(self._thread).hex().encode(),
            ord("G"): self._write_registers,
            ord("p"): lambda rest: self._target.read_register(self._thread, int(rest, 16)).hex().encode(),
            ord("P"): self._write_register,
            ord("m"): self._read_memory,
            ord("M"): self._write_memory,
            ord("X"): self._write_binary,
            ord("Z"): lambda rest: self._breakpoint(rest, insert=True),
            ord("z"): lambda rest: self._breakpoint(rest, insert=False),
            ord("H"): self._choose_thread,
            ord("T"): lambda rest: OK if self._number(rest) is not None else INVALID,
            ord("c"): lambda rest: self._resume_all(Action.RUN),
            ord("C"): lambda rest: self._resume_all(Action.RUN),
            ord("s"): lambda rest: self._resume_all(Action.STEP),
            ord("S"): lambda rest: self._resume_all(Action.STEP),
            ord("D"): self._leave,
            ord("k"): self._leave,  # gdb's "kill" only leaves: a machine is ended by `posada kill`
            ord("q"): self._query,
            ord("Q"): self._set,
            ord("v"): self._verbose,
        }

    def handle(self, payload: bytes) -> bytes | None:
        """The reply; None when it is a stop that has yet to come. Never raises for what gdb sent."""
        handler = self._by_letter.get(payload[0]) if payload else None
        if handler is None:
            return UNKNOWN
        if self.running:
            return INVALID
        try:
            return handler(payload[1:])
        except (ValueError, IndexError):
            return INVALID
        except TargetError:
            return FAILED

    def stop_reply(self, stop: Stop) -> bytes:
        """Tell gdb that the machine stands; what is asked next is about that vcpu."""
        self.running = False
        self._target.stop = stop
        self._thread = stop.thread
        reason = f"{stop.reason};" if stop.reason else ""
        return f"T{stop.signal:02x}thread:{stop.thread + 1:x};{reason}".encode()

    # registers and memory

    def _write_registers(self, rest: bytes) -> bytes:
        self._target.write_registers(self._thread, _unhex(rest))
        return OK

    def _write_register(self, rest: bytes) -> bytes:
        number, value = rest.split(b"=")
        self._target.write_register(self._thread, int(number, 16), _unhex(value))
        return OK

    def _read_memory(self, rest: bytes) -> bytes:
        address, length = _numbers(rest, b",")
        return self._target.read_memory(self._thread, address, min(length, MAX_PACKET // 2)).hex().encode()

    def _write_memory(self, rest: bytes) -> bytes:
        where, data = rest.split(b":")
        return self._write(where, _unhex(data))

    def _write_binary(self, rest: bytes) -> bytes:
        where, _, data = rest.partition(b":")
        return self._write(where, data)

    def _write(self, where: bytes, data: bytes) -> bytes:
        address, length = _numbers(where, b",")
        if length != len(data):
            return INVALID
        self._target.write_memory(self._thread, address, data)
        return OK

    def _breakpoint(self, rest: bytes, insert: bool) -> bytes:
        kind, where = rest.split(b";")[0].split(b",", 1)
        address, length = _numbers(where, b",")
        if kind == b"0" and insert:
            self._target.insert_software(self._thread, address)
        elif kind == b"0":
            self._target.remove_software(address)
        elif kind not in _KINDS:
            return UNKNOWN
        elif insert:
            self._target.insert_hardware(_KINDS[kind], address, length)
        else:
            self._target.remove_hardware(_KINDS[kind], address, length)
        return OK

    # threads and running

    def _number(self, text: bytes) -> int | None:
        """A vcpu's index for gdb's thread id; None if there is none. 0 and -1 (any, all) are the present one."""
        number = int(text, 16)
        if number in (0, -1):
            return self._thread
        return number - 1 if 1 <= number <= self._target.threads else None

    def _choose_thread(self, rest: bytes) -> bytes:
        number = self._number(rest[1:])
        if number is None:
            return INVALID
        if rest[:1] == b"g":
            self._thread = number
        return OK

    def _resume_all(self, action: Action) -> None:
        everyone = dict.fromkeys(range(self._target.threads), Action.RUN)
        self._resume({**everyone, self._thread: action})

    def _resume(self, actions: dict[int, Action]) -> None:
        self._target.resume(actions)
        self.running = True

    def _continue(self, rest: bytes) -> bytes | None:
        """vCont: each vcpu does the first action that fits it; one that none fits stays."""
        actions: dict[int, Action] = {}
        for part in rest.split(b";"):
            verb, _, who = part.partition(b":")
            action = {b"c": Action.RUN, b"C": Action.RUN, b"s": Action.STEP, b"S": Action.STEP}.get(verb[:1])
            if action is None:
                return INVALID
            if who in (b"", b"-1"):
                chosen = list(range(self._target.threads))
            else:
                number = self._number(who)
                if number is None:
                    return INVALID
                chosen = [number]
            for number in chosen:
                actions.setdefault(number, action)
        self._resume(actions)
        return None

    def _leave(self, rest: bytes) -> bytes:
        self._target.release()
        self.ended = True
        return OK

    # the long names

    def _query(self, rest: bytes) -> bytes:
        name, _, argument = rest.partition(b":")
        match name:
            case b"Supported":
                return (
                    b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;swbreak+;hwbreak+;vContSupported+"
                    % MAX_PACKET
                )
            case b"Xfer" if argument.startswith(b"features:read:target.xml:"):
                offset, length = _numbers(argument.rpartition(b":")[2], b",")
                part = target_xml()[offset : offset + min(length, MAX_PACKET - 1)]
                return (b"m" if offset + len(part) < len(target_xml()) else b"l") + part
            case b"fThreadInfo":
                return b"m" + b",".join(b"%x" % (i + 1) for i in range(self._target.threads))
            case b"sThreadInfo":
                return b"l"
            case b"C":
                return b"QC%x" % (self._thread + 1)
            case b"Attached":
                return b"1"
            case b"Symbol":
                return OK
        if name.startswith(b"ThreadExtraInfo,"):
            number = self._number(name.partition(b",")[2])
            return INVALID if number is None else f"vcpu {number}".encode().hex().encode()
        if name.startswith(b"Rcmd,"):
            text = _unhex(name.partition(b",")[2]).decode("ascii", "replace")
            return self._target.command(text).encode()[: MAX_PACKET // 2].hex().encode()
        return UNKNOWN

    def _set(self, rest: bytes) -> bytes:
        if rest == b"StartNoAckMode":
            self.no_ack = True
            return OK
        return UNKNOWN

    def _verbose(self, rest: bytes) -> bytes | None:
        if rest == b"Cont?":
            return b"vCont;c;C;s;S"
        if rest.startswith(b"Cont;"):
            return self._continue(rest[5:])
        return UNKNOWN


_HEX = re.compile(rb"(?:[0-9a-fA-F]{2})*")


def _unhex(text: bytes) -> bytes:
    """Raises ValueError."""
    if not _HEX.fullmatch(text):
        raise ValueError("not hexadecimal")
    return bytes.fromhex(text.decode("ascii"))


def _numbers(text: bytes, separator: bytes) -> tuple[int, int]:
    """Two hexadecimal numbers below 2⁶⁴. Raises ValueError."""
    first, second = (int(part, 16) for part in text.split(separator))
    if not (0 <= first < 1 << 64 and 0 <= second < 1 << 64):
        raise ValueError("out of range")
    return first, second
