"""Lists of views: the bytes of one request, wherever the driver has put them. Section 2.6.4: a device must not care."""

from __future__ import annotations

from collections.abc import Sequence


def split(views: Sequence[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``size`` bytes (or all there are), and the rest."""
    head: list[memoryview] = []
    for at, view in enumerate(views):
        if len(view) > size:
            if size:
                head.append(view[:size])
            return head, [view[size:], *views[at + 1 :]]
        head.append(view)
        size -= len(view)
    return head, []


def fill(views: Sequence[memoryview], data: bytes | memoryview, at: int = 0) -> None:
    """Copy ``data`` to offset ``at`` of ``views``, which have room for all of it."""
    done = 0
    for view in views:
        if at >= len(view):
            at -= len(view)
            continue
        count = min(len(view) - at, len(data) - done)
        view[at : at + count] = data[done : done + count]
        done += count
        if done == len(data):
            return
        at = 0


def total(views: Sequence[memoryview]) -> int:
    """Bytes in ``views``."""
    return sum(map(len, views))
