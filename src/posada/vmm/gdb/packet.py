"""The packet layer of GDB's protocol, without I/O: ``$payload#checksum``, acknowledgements, the interrupt byte."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

MAX_PACKET = 16384
"""Bytes of a packet we take, told to gdb as PacketSize; longer ones are dropped as damaged."""
_ESCAPED = b"#$}*"


class Mark(Enum):
    """What arrives beside packets."""

    ACK = "+"
    NAK = "-"
    INTERRUPT = "\x03"
    DAMAGED = "damaged"


def encode(payload: bytes) -> bytes:
    """A whole packet. What would end it is escaped."""
    body = bytearray()
    for byte in payload:
        if byte in _ESCAPED:
            body += bytes((0x7D, byte ^ 0x20))
        else:
            body.append(byte)
    return b"$%b#%02x" % (bytes(body), sum(body) & 0xFF)


class Decoder:
    """Bytes in, packets and marks out. Never holds more than one packet."""

    def __init__(self) -> None:
        self._body: bytearray | None = None  # inside a packet, up to its checksum
        self._checksum: bytearray | None = None  # after the '#'

    def feed(self, data: bytes) -> Iterator[bytes | Mark]:
        """Payloads (unescaped) and marks, in order. Bytes between packets that mean nothing are ignored."""
        for byte in data:
            found = self._take(byte)
            if found is not None:
                yield found

    def _take(self, byte: int) -> bytes | Mark | None:
        if self._checksum is not None:
            self._checksum.append(byte)
            return self._finish() if len(self._checksum) == 2 else None
        if byte == 0x24:  # '$' starts one anew, also inside one whose end was lost
            self._body = bytearray()
            return None
        if self._body is None:
            return _MARKS.get(byte)
        if byte == 0x23:
            self._checksum = bytearray()
        elif len(self._body) <= 2 * MAX_PACKET:
            self._body.append(byte)
        return None

    def _finish(self) -> bytes | Mark:
        body, checksum = self._body or bytearray(), self._checksum or bytearray()
        self._body = self._checksum = None
        try:
            if int(checksum, 16) != sum(body) & 0xFF or len(body) > 2 * MAX_PACKET:
                return Mark.DAMAGED
        except ValueError:
            return Mark.DAMAGED
        return _unescape(body)


_MARKS = {ord(mark.value): mark for mark in Mark if len(mark.value) == 1}


def _unescape(body: bytearray) -> bytes:
    parts = bytes(body).split(b"}")
    return parts[0] + b"".join(bytes((part[0] ^ 0x20,)) + part[1:] for part in parts[1:] if part)
