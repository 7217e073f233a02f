"""Values of one figure and what is said of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Figure:
    """One line of the table. ``values`` in ``unit``; ``reach`` is the bound it has to keep, on ``statistic``."""

    key: str
    what: str
    unit: str = "ms"
    statistic: str = "p50"
    reach: float | None = None
    peers: dict[str, str] = field(default_factory=dict)
    note: str = ""
    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def result(self) -> float | None:
        return percentile(self.values, self.statistic) if self.values else None

    @property
    def verdict(self) -> str:
        if self.result is None:
            return "not measured"
        if self.reach is None:
            return ""
        return "reached" if self.result <= self.reach else "MISSED"

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add what the block takes, in milliseconds. A block that raises adds nothing."""
        began = time.perf_counter()
        yield
        self.add((time.perf_counter() - began) * 1000)

    def as_json(self) -> dict[str, object]:
        spread = {name: percentile(self.values, name) for name in ("min", "p50", "p90", "p99", "max")} if self.values else {}
        return {
            "what": self.what, "unit": self.unit, "runs": len(self.values), **spread, "statistic": self.statistic,
            "reach": self.reach, "verdict": self.verdict, "peers": self.peers, "note": self.note, "values": self.values,
        }  # fmt: skip


def percentile(values: Sequence[float], name: str) -> float:
    """``min``, ``max``, or ``pNN`` by linear interpolation (p50 is the median). Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    share = {"min": 0.0, "max": 1.0}.get(name)
    if share is None:
        share = int(name.removeprefix("p")) / 100
    position = share * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def written(value: float | None, unit: str) -> str:
    """As people read it: 1.23 s rather than 1234 ms, three figures."""
    if value is None:
        return "–"
    if unit == "ms" and value >= 1000:
        return f"{value / 1000:.2f} s"
    if value == int(value) and value < 1000:
        return f"{int(value)} {unit}".strip()
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(abs(value), 1e-3))))}f} {unit}".strip()
