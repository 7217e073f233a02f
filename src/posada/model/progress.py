"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the fraction done (0.0–1.0; None when it is not known) and what is being done, in a few words.
Progress = Callable[[float | None, str], None]


def quiet(fraction: float | None, message: str) -> None:
    """A `Progress` that nobody watches."""
