"""Checked reading of saved state and other documents from outside. They are untrusted: each getter checks and bounds.

All raise `posada.errors.StateError`, naming the key. Keys nobody asks for are ignored: a newer posada may have added
them, and a version number says when that is not harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posada.errors import StateError

__all__ = [
    "Document",
    "StateError",
    "blob",
    "boolean",
    "child",
    "children",
    "choice",
    "integer",
    "integers",
    "items",
    "number",
    "text",
]

Document = Mapping[str, Any]


def integer(document: Document, key: str, low: int, high: int, default: int | None = None) -> int:
    """An int in [low, high]; booleans are none. With a ``default`` the key may be missing."""
    value = document.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise StateError(f"{key!r} is not a whole number from {low} to {high}")
    return value


def boolean(document: Document, key: str, default: bool | None = None) -> bool:
    value = document.get(key, default)
    if type(value) is not bool:
        raise StateError(f"{key!r} is not a boolean")
    return value


def blob(document: Document, key: str, size: int | None = None, *, limit: int | None = None) -> bytes:
    """Bytes of exactly ``size``, or of at most ``limit``. One of the two must be given."""
    value = document.get(key)
    if not isinstance(value, bytes):
        raise StateError(f"{key!r} is not a byte string")
    if size is not None and len(value) != size:
        raise StateError(f"{key!r} is {len(value)} bytes long, and must be {size}")
    if size is None and (limit is None or len(value) > limit):
        raise StateError(f"{key!r} is {len(value)} bytes long, and must be at most {limit}")
    return value


def text(document: Document, key: str, limit: int = 4096, default: str | None = None) -> str:
    """A string of at most ``limit`` characters."""
    value = document.get(key, default)
    if not isinstance(value, str) or len(value) > limit:
        raise StateError(f"{key!r} is not a text of at most {limit} characters")
    return value


def choice(document: Document, key: str, allowed: tuple[str, ...]) -> str:
    """One of ``allowed``."""
    value = document.get(key)
    if value not in allowed or not isinstance(value, str):
        raise StateError(f"{key!r} is none of {', '.join(allowed)}")
    return value


def number(document: Document, key: str, low: float, high: float, default: float | None = None) -> float:
    """An int or float in [low, high], never NaN."""
    value = document.get(key, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise StateError(f"{key!r} is not a number from {low} to {high}")
    return float(value)


def child(document: Document, key: str) -> dict[str, Any]:
    """A nested document."""
    return _document(document.get(key), key)


def children(document: Document, key: str, limit: int = 1024) -> list[dict[str, Any]]:
    """A list of at most ``limit`` nested documents."""
    return [_document(item, key) for item in items(document, key, limit)]


def items(document: Document, key: str, limit: int = 1024) -> list[Any]:
    """A list of at most ``limit`` values, whose types the caller checks."""
    value = document.get(key)
    if not isinstance(value, list) or len(value) > limit:
        raise StateError(f"{key!r} is not a list of at most {limit} items")
    return value


def integers(document: Document, key: str, low: int, high: int, limit: int = 1024) -> list[int]:
    """A list of at most ``limit`` ints, each in [low, high]."""
    values = items(document, key, limit)
    if any(type(value) is not int or not low <= value <= high for value in values):
        raise StateError(f"{key!r} holds something else than whole numbers from {low} to {high}")
    return values


def _document(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise StateError(f"{key!r} is not a document")
    return value
