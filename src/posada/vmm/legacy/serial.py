"""A 16550A serial port, as Linux's 8250 driver uses it. The line is infinitely fast: THR is always empty.

Interrupts are edges: one is sent whenever a condition arises that the guest has enabled, and IIR tells which. Output is
collected and handed over in batches: a guest that prints costs one exit per byte, not one wake-up per byte.
Source: PC16550D data sheet (TI SNLS378), table 2 and section 8; register names are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posada.vmm import state
from posada.vmm.loop import Loop, Timer

FLUSH_SECONDS = 0.004
"""How long output may wait for more. Nobody reads faster, and a wake-up costs as much as a line of text."""
FLUSH_BYTES = 4096
INPUT_MAX = 64 << 10
"""Input waiting for the guest, bytes. A sender should look at `Serial.room`."""

_DATA, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
_IER_RDA, _IER_THRE = 1, 2
_IIR_NONE, _IIR_THRE, _IIR_RDA, _IIR_FIFO = 1, 2, 4, 0xC0
_FCR_ENABLE, _FCR_CLEAR_RECEIVER = 1, 2
_LCR_DLAB = 0x80
_MCR_LOOP = 0x10
_LSR_READY, _LSR_EMPTY = 1, 0x60
_MSR_CONNECTED = 0xB0
"""CTS, DSR and DCD: somebody is at the other end."""


class Serial:
    """``interrupt`` sends an edge; ``output`` takes what the guest wrote, on the loop's or a vcpu's thread."""

    def __init__(self, loop: Loop, interrupt: Callable[[], object], output: Callable[[bytes], object]) -> None:
        self._loop = loop
        self._interrupt = interrupt
        self._output = output
        self.drained: Callable[[], object] = lambda: None
        """Called when the guest has read all input: there is room again."""
        self._input = bytearray()
        self._pending = bytearray()
        self._flusher: Timer | None = None
        self._ier = self._lcr = self._mcr = self._scr = self._fcr = 0
        self._divisor = 12
        self._thre = False
        """The transmitter has become empty and the guest was not told yet."""

    def feed(self, data: bytes) -> None:
        """Input for the guest. What exceeds INPUT_MAX is dropped, as an overrun would drop it."""
        self._input += data[: self.room]
        if self._ier & _IER_RDA:
            self._interrupt()

    @property
    def room(self) -> int:
        """How many bytes `feed` takes now."""
        return INPUT_MAX - len(self._input)

    def flush(self) -> None:
        """Hand collected output over now."""
        if self._flusher is not None:
            self._flusher.cancel()
            self._flusher = None
        if self._pending:
            data = bytes(self._pending)
            self._pending.clear()
            self._output(data)

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == _DATA:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
            elif self._mcr & _MCR_LOOP:
                self.feed(bytes([value]))
            else:
                self._transmit(value)
        elif offset == _IER:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
            else:
                self._enable(value & 0x0F)
        elif offset == _IIR_FCR:
            self._fcr = value & _FCR_ENABLE
            if value & _FCR_CLEAR_RECEIVER:
                self._input.clear()
        elif offset == _LCR:
            self._lcr = value
        elif offset == _MCR:
            self._mcr = value & 0x1F
        elif offset == _SCR:
            self._scr = value

    def read(self, offset: int, size: int) -> int:
        if offset == _LSR:
            return _LSR_EMPTY | (_LSR_READY if self._input else 0)
        if offset == _IIR_FCR:
            return self._identify()
        if offset == _DATA:
            return self._divisor & 0xFF if self._lcr & _LCR_DLAB else self._receive()
        if offset == _IER:
            return self._divisor >> 8 if self._lcr & _LCR_DLAB else self._ier
        if offset == _MSR:
            return self._modem_status()
        return (self._lcr, self._mcr, 0, 0, self._scr)[offset - _LCR]

    def _transmit(self, value: int) -> None:
        self._pending.append(value)
        if self._ier & _IER_THRE and not self._thre:  # else it knows: one edge per burst
            self._thre = True
            self._interrupt()
        if self._flusher is None:
            self._flusher = self._loop.timer(FLUSH_SECONDS, self.flush)
        elif len(self._pending) >= FLUSH_BYTES:
            self.flush()

    def _enable(self, ier: int) -> None:
        """Enabling an interrupt whose condition holds raises it (section 8.6); Linux's start-up test relies on it."""
        new = ier & ~self._ier
        self._ier = ier
        if new & _IER_THRE:
            self._thre = True
        if new & _IER_THRE or (new & _IER_RDA and self._input):
            self._interrupt()

    def _identify(self) -> int:
        fifo = _IIR_FIFO if self._fcr else 0
        if self._ier & _IER_RDA and self._input:
            return fifo | _IIR_RDA
        if self._ier & _IER_THRE and self._thre:
            self._thre = False  # reading IIR acknowledges it (table 5)
            return fifo | _IIR_THRE
        return fifo | _IIR_NONE

    def _receive(self) -> int:
        if not self._input:
            return 0
        value = self._input.pop(0)
        if not self._input:
            self.drained()
        return value

    def _modem_status(self) -> int:
        if not self._mcr & _MCR_LOOP:
            return _MSR_CONNECTED
        # Loop-back: DTR→DSR, RTS→CTS, OUT1→RI, OUT2→DCD (section 8.7).
        m = self._mcr
        return (m & 1) << 5 | (m & 2) << 3 | (m & 4) << 4 | (m & 8) << 4

    def save(self) -> dict[str, Any]:
        """Output is flushed: it belongs to the machine that printed it."""
        self.flush()
        return {
            "ier": self._ier, "lcr": self._lcr, "mcr": self._mcr, "scr": self._scr, "fcr": self._fcr,
            "divisor": self._divisor, "thre": self._thre, "input": bytes(self._input),
        }  # fmt: skip

    def load(self, document: state.Document) -> None:
        """Raises StateError."""
        self._ier = state.integer(document, "ier", 0, 0x0F)
        self._lcr = state.integer(document, "lcr", 0, 0xFF)
        self._mcr = state.integer(document, "mcr", 0, 0x1F)
        self._scr = state.integer(document, "scr", 0, 0xFF)
        self._fcr = state.integer(document, "fcr", 0, 1)
        self._divisor = state.integer(document, "divisor", 0, 0xFFFF)
        self._thre = state.boolean(document, "thre")
        self._input = bytearray(state.blob(document, "input", limit=INPUT_MAX))
