"""Sizes and durations as people write them."""

from __future__ import annotations

import re

from posada.errors import SpecError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)
_SIZE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kb": 1000, "kib": KIB,
    "m": MIB, "mb": 1000**2, "mib": MIB,
    "g": GIB, "gb": 1000**3, "gib": GIB,
    "t": TIB, "tb": 1000**4, "tib": TIB,
}  # fmt: skip
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)\s*", re.ASCII)
_DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: int | str, *, field: str = "size") -> int:
    """Bytes from ``512MiB``, ``1G`` (binary, as in QEMU), ``2GB`` (decimal) or a number of bytes.

    Raises SpecError for anything else.
    """
    if isinstance(value, bool):
        raise SpecError(field, "is a truth value, not a size", hint="write it like 512MiB or 2GiB")
    if isinstance(value, int):
        if value < 0:
            raise SpecError(field, f"{value} is negative", hint="write it like 512MiB or 2GiB")
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise SpecError(field, f"{value!r} is not a size", hint="write it like 512MiB or 2GiB")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_size(size: int) -> str:
    """The shortest binary form: ``512MiB``, ``1.5GiB``."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g}{name}"
    return f"{size}B"


def parse_duration(value: float | int | str, *, field: str = "duration") -> float:
    """Seconds from ``90``, ``1.5s``, ``10m``, ``2h``, ``1d``. Raises SpecError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 <= value < 1e12:
            raise SpecError(field, f"{value} is not a duration", hint="write it like 90s, 10m or 2h")
        return float(value)
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise SpecError(field, f"{value!r} is not a duration", hint="write it like 90s, 10m or 2h")
    return float(match[1]) * _DURATION_UNITS[match[2]]
