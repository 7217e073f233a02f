"""Refcounts in memory and in the file: 1 to 64 bits wide (order 0 to 6); the format, section *Refcounts*."""

from __future__ import annotations

import sys
from array import array

from posada.vmm.block.qcow2.image import to_big

_CODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


def unpack(data: bytes, order: int) -> array[int]:
    """The refcounts of a block. Those narrower than a byte fill each byte from its lowest bit on."""
    counts = array(_CODES.get(order, "B"))
    if order >= 3:
        counts.frombytes(data)
        if sys.byteorder == "little":
            counts.byteswap()
        return counts
    width = 1 << order
    mask = (1 << width) - 1
    split = [bytes(byte >> shift & mask for shift in range(0, 8, width)) for byte in range(256)]
    counts.frombytes(b"".join(map(split.__getitem__, data)))
    return counts


def pack(counts: array[int], low: int, high: int, order: int) -> tuple[int, bytes]:
    """Counts ``low`` to ``high`` for the file: where in the block (whole bytes), and the bytes."""
    if order >= 3:
        return low << order - 3, to_big(counts[low:high])
    per_byte = 8 >> order
    first, last = low // per_byte, -(-high // per_byte)
    out = bytearray(last - first)
    for at in range(len(out)):
        for place, count in enumerate(counts[(first + at) * per_byte : (first + at + 1) * per_byte]):
            out[at] |= count << (place << order)
    return first, bytes(out)
