"""A bound on bytes per second: a bucket of credit that fills with time. What has been sent may go into debt once."""

from __future__ import annotations

import time

BURST_SECONDS = 0.1
MIN_BURST = 128 << 10


class Bucket:
    """``rate``: bytes per second; 0 for no bound."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._burst = max(MIN_BURST, int(rate * BURST_SECONDS))
        self._credit = float(self._burst)
        self._at = time.monotonic()

    def spend(self, count: int) -> None:
        """``count`` bytes have been moved."""
        self._credit -= count

    def delay(self) -> float:
        """Seconds until more may be moved; 0: now."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        self._credit = min(self._burst, self._credit + (now - self._at) * self._rate)
        self._at = now
        return 0.0 if self._credit > 0 else (1 - self._credit) / self._rate
