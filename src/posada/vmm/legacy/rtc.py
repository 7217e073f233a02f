"""The real-time clock (MC146818): the host's time in UTC, read through ports 0x70 (index) and 0x71 (data).

The guest cannot set it: its own clock is kvm-clock, and two guests of one host should not differ. There is no alarm and
no interrupt, which the DSDT says too. Source: Motorola MC146818 data sheet; the century's place is the PC's custom.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from posada.vmm import state

_A, _B, _C, _D = 10, 11, 12, 13
_CENTURY = 0x32
_SIZE = 128


class Rtc:
    """``now`` gives seconds since 1970."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._read_at = 0.0
        self._index = 0
        self._cells = bytearray(_SIZE)
        self._cells[_A] = 0x26  # 32,768 Hz, periodic rate 1,024 Hz; no update is ever in progress
        self._cells[_B] = 0x02  # 24 hours, BCD
        self._cells[_D] = 0x80  # the battery is good

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._index = value & 0x7F  # bit 7 masks NMIs on a PC
        elif self._index not in (_A, _C, _D):
            self._cells[self._index] = value & 0xFF

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF  # write-only on a PC
        index = self._index
        if (index < _A and index not in (1, 3, 5)) or index == _CENTURY:  # 1, 3, 5: the alarm, which just stores
            return self._time(index)
        return 0 if index == _C else self._cells[index]

    def _time(self, index: int) -> int:
        # Readers begin with the seconds. The rest of what they read belongs to the same instant.
        if index == 0 or not 0 <= self._now() - self._read_at < 0.1:
            self._read_at = self._now()
        now = time.gmtime(self._read_at)
        value = {
            0: now.tm_sec, 2: now.tm_min, 4: now.tm_hour, 6: (now.tm_wday + 1) % 7 + 1,
            7: now.tm_mday, 8: now.tm_mon, 9: now.tm_year % 100, _CENTURY: now.tm_year // 100,
        }[index]  # fmt: skip
        if index == 4 and not self._cells[_B] & 0x02:  # 12-hour mode: bit 7 says PM
            return self._coded((value + 11) % 12 + 1) | (0x80 if value >= 12 else 0)
        return self._coded(value)

    def _coded(self, value: int) -> int:
        binary = self._cells[_B] & 0x04
        return value if binary else value // 10 << 4 | value % 10

    def save(self) -> dict[str, Any]:
        return {"index": self._index, "cells": bytes(self._cells)}

    def load(self, document: state.Document) -> None:
        """Raises StateError."""
        self._index = state.integer(document, "index", 0, _SIZE - 1)
        self._cells = bytearray(state.blob(document, "cells", _SIZE))
