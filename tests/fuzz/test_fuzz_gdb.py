"""Whatever a debugger sends: the packet layer and the session answer, and touch nothing but the machine they were given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from posada.kvm.cpustructs import Fpu, Regs, Sregs
from posada.kvm.exits import DebugExit, InternalError, Plain
from posada.vmm.gdb.packet import MAX_PACKET, Decoder, Mark, encode
from posada.vmm.gdb.session import Session
from posada.vmm.gdb.target import Stop, Target
from posada.vmm.vcpu import Wanted

SIZE = 1 << 16


class FakeVcpu:
    """Registers that are kept; linear addresses below 64 KiB are physical ones, the rest is not mapped."""

    def __init__(self, index: int) -> None:
        self.id = index
        self.regs, self.sregs, self.fpu = Regs(), Sregs(), Fpu()

    def get_regs(self) -> Regs:
        return Regs.from_buffer_copy(self.regs)

    def set_regs(self, state: Regs) -> None:
        self.regs = state

    def get_sregs(self) -> Sregs:
        return Sregs.from_buffer_copy(self.sregs)

    def set_sregs(self, state: Sregs) -> None:
        self.sregs = state

    def get_fpu(self) -> Fpu:
        return Fpu.from_buffer_copy(self.fpu)

    def set_fpu(self, state: Fpu) -> None:
        self.fpu = state

    def get_mp_state(self) -> Any:
        return SimpleNamespace(name="RUNNABLE")

    def translate(self, linear: int) -> int | None:
        assert 0 <= linear < 1 << 64
        return linear if linear < SIZE + 4096 else None  # the last page is mapped, and no memory lies there

    def set_guest_debug(self, control: int, debugreg: Any = ()) -> None:
        assert all(0 <= value < 1 << 64 for value in debugreg)
        assert len(debugreg) in (0, 8)


class FakeMemory:
    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def read(self, gpa: int, length: int, /) -> bytes:
        if not 0 <= gpa <= gpa + length <= SIZE:
            raise ValueError("outside")
        return bytes(self.data[gpa : gpa + length])

    def write(self, gpa: int, data: bytes, /) -> None:
        if not 0 <= gpa <= gpa + len(data) <= SIZE:
            raise ValueError("outside")
        self.data[gpa : gpa + len(data)] = data


def fake_machine() -> tuple[Session, Target, FakeMemory, Any]:
    threads = tuple(
        SimpleNamespace(index=i, vcpu=FakeVcpu(i), wanted=Wanted.RUN, unpark=lambda: None, counts=dict)
        for i in range(2)
    )
    vcpus: Any = SimpleNamespace(threads=threads, quiesce=lambda: None)
    memory = FakeMemory()
    target = Target(vcpus, memory)
    return Session(target), target, memory, threads


@given(st.lists(st.binary(max_size=80), max_size=10))
def test_any_bytes_give_packets_and_marks(pieces: list[bytes]) -> None:
    cut, whole = Decoder(), Decoder()
    found = [event for piece in pieces for event in cut.feed(piece)]
    assert found == list(whole.feed(b"".join(pieces)))
    assert all(isinstance(event, bytes | Mark) for event in found)


@given(st.binary(max_size=300))
def test_every_payload_comes_back(payload: bytes) -> None:
    assert list(Decoder().feed(encode(payload))) == [payload]


numbers = st.sampled_from([0, 1, 4, 8, 0xFF, 0x1000, SIZE - 1, SIZE, SIZE + 4095, (1 << 64) - 1, 1 << 64]).map(
    "{:x}".format
)
words = st.one_of(
    st.builds("{}{},{}".format, st.sampled_from("m"), numbers, numbers),
    st.builds("{}{},{}:{}".format, st.sampled_from("MX"), numbers, numbers, st.text("0123456789abcdef", max_size=9)),
    st.builds("{}{},{},{}".format, st.sampled_from("zZ"), st.sampled_from("012345"), numbers, numbers),
    st.builds("{}{}={}".format, st.sampled_from("pP"), numbers, st.text("0123456789abcdef", max_size=18)),
    st.builds("H{}{}".format, st.sampled_from("gc"), st.sampled_from(["0", "-1", "1", "2", "3", "x"])),
    st.builds("vCont;{}:{};{}".format, st.sampled_from("cCsSx"), st.sampled_from(["1", "2", "9", "-1", ""]), st.text()),
    st.builds("qXfer:features:read:target.xml:{},{}".format, numbers, numbers),
    st.builds("qRcmd,{}".format, st.text("0123456789abcdef", max_size=40)),
    st.sampled_from(["?", "g", "G", "c", "s", "D", "k", "qC", "qfThreadInfo", "qSupported", "T1", "QStartNoAckMode"]),
).map(str.encode) | st.binary(max_size=30)


@given(st.lists(words, max_size=25))
def test_a_session_answers_whatever_it_is_asked(packets: list[bytes]) -> None:
    session, target, memory, threads = fake_machine()
    for payload in packets:
        reply = session.handle(payload)
        if reply is None:
            assert session.running
            reply = session.stop_reply(Stop(0))
        assert len(encode(reply)) <= 2 * MAX_PACKET
        for what in (DebugExit(3, 0x10, 0, 0), DebugExit(1, 0, 0xF, 0), Plain(8), InternalError(1, (), b"")):
            target.exited(threads[0], what)
    target.release()
    assert len(memory.data) == SIZE


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=40))
def test_breakpoints_never_change_what_is_read_and_leave_nothing(steps: list[tuple[bool, int]]) -> None:
    session, target, memory, _ = fake_machine()
    memory.data[:64] = bytes(range(64))
    for insert, address in steps:
        session.handle(b"%s0,%x,1" % (b"Z" if insert else b"z", address))
        assert session.handle(b"m0,40") == bytes(range(64)).hex().encode()
    target.release()
    assert memory.data[:64] == bytes(range(64))
