"""The rest of a PC, driven as Linux's drivers drive it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posada.errors import StateError
from posada.vmm.bus import Bus
from posada.vmm.legacy import power
from posada.vmm.legacy.power import Event, KeyboardReset, PowerRegisters
from posada.vmm.legacy.rtc import Rtc
from posada.vmm.legacy.serial import FLUSH_BYTES, INPUT_MAX, Serial
from posada.vmm.loop import Loop

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


class Port:
    """A serial port, what came out of it, and how often it interrupted."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.out: list[bytes] = []
        self.interrupts = 0
        self.serial = Serial(loop, self._interrupt, self.out.append)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def write(self, register: int, value: int) -> None:
        self.serial.write(register, 1, value)

    def read(self, register: int) -> int:
        return self.serial.read(register, 1)


@pytest.fixture
def port() -> Iterator[Port]:
    loop = Loop()
    yield Port(loop)
    loop.close()


def test_it_is_found_as_a_16550a(port: Port) -> None:
    """The steps of autoconfig() in drivers/tty/serial/8250/8250_port.c."""
    port.write(IER, 0)
    assert port.read(IER) & 0x0F == 0
    port.write(IER, 0x0F)
    assert port.read(IER) & 0x0F == 0x0F
    port.write(IER, 0)
    port.write(MCR, 0x10 | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, 0)
    port.write(LCR, 0)
    port.write(IIR, 1)
    assert port.read(IIR) >> 6 == 3
    port.write(SCR, 0x5A)
    assert port.read(SCR) == 0x5A
    port.write(LCR, 0x80)
    port.write(DATA, 0x34)
    port.write(IER, 0x12)
    assert (port.read(DATA), port.read(IER)) == (0x34, 0x12)
    port.write(LCR, 0x13)
    assert port.read(LCR) == 0x13 and port.read(MSR) == 0xB0


def test_the_transmitter_interrupt_is_reasserted(port: Port) -> None:
    """serial8250_do_startup() takes a port that does not do this for broken, and polls it from then on."""
    port.write(IER, 2)
    assert port.interrupts == 1
    assert port.read(IIR) & 0x0F == 2
    assert port.read(IIR) & 0x0F == 1, "reading acknowledges"
    port.write(IER, 0)
    port.write(IER, 2)
    assert port.interrupts == 2
    assert port.read(IIR) & 0x0F == 2
    port.write(DATA, 0x41)
    assert port.interrupts == 3
    assert port.read(IIR) & 0x0F == 2


def test_output_comes_in_batches(port: Port) -> None:
    for byte in b"hello":
        port.write(DATA, byte)
        assert port.read(LSR) == 0x60
    assert port.out == [] and port.interrupts == 0
    port.loop.timer(0.03, port.loop.stop)
    port.loop.run()
    assert port.out == [b"hello"]
    for _ in range(FLUSH_BYTES):
        port.write(DATA, 0x78)
    assert port.out[1:] == [b"x" * FLUSH_BYTES]
    port.write(DATA, 0x79)
    port.serial.flush()
    port.serial.flush()
    assert port.out[2:] == [b"y"]


def test_input(port: Port) -> None:
    port.serial.feed(b"early")
    assert port.interrupts == 0
    port.write(IER, 1)
    assert port.interrupts == 1
    assert port.read(IIR) & 0x0F == 4
    assert bytes(port.read(DATA) for _ in range(5)) == b"early"
    assert port.read(LSR) == 0x60 and port.read(IIR) & 0x0F == 1 and port.read(DATA) == 0
    drained: list[bool] = []
    port.serial.drained = lambda: drained.append(True)
    port.serial.feed(b"!")
    assert port.interrupts == 2
    assert port.read(DATA) == 0x21 and drained == [True]
    port.serial.feed(b"x" * (INPUT_MAX + 100))
    assert port.serial.room == 0
    port.write(IIR, 3)
    assert port.serial.room == INPUT_MAX


def test_loop_back_reads_what_was_written(port: Port) -> None:
    port.write(MCR, 0x10)
    port.write(DATA, 0x55)
    assert port.read(DATA) == 0x55
    port.serial.flush()
    assert port.out == []


def test_serial_state_survives(port: Port) -> None:
    port.write(LCR, 0x80)
    port.write(DATA, 1)
    port.write(LCR, 3)
    port.write(IER, 3)
    port.write(DATA, 0x41)
    port.serial.feed(b"abc")
    saved = port.serial.save()
    assert port.out == [b"A"]
    other = Port(port.loop)
    other.serial.load(saved)
    assert other.serial.save() == saved
    assert other.read(IIR) & 0x0F == 4 and other.read(DATA) == 0x61
    for key, value in (("ier", 0x10), ("input", bytes(INPUT_MAX + 1)), ("thre", 1), ("divisor", -1)):
        with pytest.raises(StateError, match=key):
            other.serial.load({**saved, key: value})


def read_clock(rtc: Rtc, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def test_the_clock_reads_as_linux_reads_it() -> None:
    rtc = Rtc(lambda: 1_700_000_000.0)  # 2023-11-14 22:13:20 UTC, a Tuesday
    assert read_clock(rtc, 0x0A) & 0x80 == 0
    fields = [read_clock(rtc, index) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)]
    assert [f"{field:02x}" for field in fields] == ["20", "13", "22", "03", "14", "11", "23", "20"]
    assert read_clock(rtc, 0x0D) == 0x80 and read_clock(rtc, 0x0C) == 0
    rtc.write(0, 1, 0x0B)
    rtc.write(1, 1, 0x04)  # binary, 12 hours
    assert read_clock(rtc, 4) == 0x80 | 10
    rtc.write(0, 1, 0x80 | 5)
    rtc.write(1, 1, 0x77)
    assert read_clock(rtc, 5) == 0x77
    rtc.write(0, 1, 0)
    rtc.write(1, 1, 0x59)
    assert read_clock(rtc, 0) == 20, "the guest cannot set the time"
    other = Rtc(lambda: 0.0)
    other.load(rtc.save())
    assert other.save() == rtc.save()


def test_what_is_read_together_belongs_to_one_instant() -> None:
    now = [1_700_000_399.999]  # 22:19:59
    rtc = Rtc(lambda: now[0])
    assert read_clock(rtc, 0) == 0x59
    now[0] += 0.002
    assert read_clock(rtc, 2) == 0x19
    now[0] += 1
    assert read_clock(rtc, 2) == 0x20


def test_power_registers() -> None:
    seen: list[str] = []
    registers = PowerRegisters(lambda: seen.append("edge"), lambda: seen.append("off"), lambda: seen.append("reset"))
    registers.notify(Event.POWER_BUTTON)
    registers.notify(Event.GENERATION)
    assert seen == ["edge", "edge"]
    saved = registers.save()
    assert (registers.read(power.EVENTS, 1), registers.read(power.EVENTS, 1)) == (3, 0)
    registers.load(saved)
    assert registers.read(power.EVENTS, 1) == 3
    registers.write(power.SLEEP_CONTROL, 1, 5 << 2)
    registers.write(power.SLEEP_CONTROL, 1, 3 << 2 | 0x20)
    registers.write(power.RESET, 1, 0)
    registers.write(power.EVENTS, 1, 0xFF)
    assert seen == ["edge", "edge"]
    registers.write(power.SLEEP_CONTROL, 1, 5 << 2 | 0x20)
    registers.write(power.RESET, 1, power.RESET_VALUE)
    assert seen[2:] == ["off", "reset"]
    with pytest.raises(StateError):
        registers.load({"events": 4})


def test_keyboard_reset() -> None:
    seen: list[str] = []
    keyboard = KeyboardReset(lambda: seen.append("reset"))
    assert keyboard.read(0, 1) == 0, "never busy"
    keyboard.write(0, 1, 0xD1)
    assert seen == []
    keyboard.write(0, 1, 0xFE)
    assert seen == ["reset"]


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from([*range(0x3F8, 0x400), 0x64, 0x70, 0x71, *range(0x600, 0x604)]),
        st.sampled_from([1, 2, 4]),
        st.none() | st.integers(0, 0xFFFF_FFFF),
    ),
    max_size=60,
)


@given(ACCESSES, st.binary(max_size=8))
def test_whatever_a_guest_does_to_the_ports(accesses: list[tuple[int, int, int | None]], typed: bytes) -> None:
    loop, bus = Loop(), Bus()
    serial, rtc = Serial(loop, lambda: None, lambda data: None), Rtc()
    registers = PowerRegisters(lambda: None, lambda: None, lambda: None)
    bus.add(0x3F8, 8, serial)
    bus.add(0x64, 1, KeyboardReset(lambda: None))
    bus.add(0x70, 2, rtc)
    bus.add(0x600, power.SIZE, registers)
    serial.feed(typed)
    for port, size, value in accesses:
        if value is None:
            bus.read(port, size).to_bytes(size, "little")
        else:
            bus.write(port, size, value & (1 << 8 * size) - 1)
    for device in (serial, rtc, registers):
        device.load(device.save())
    loop.close()
