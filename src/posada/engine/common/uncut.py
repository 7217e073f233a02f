"""Work that is not left half-way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def uncut(work: Awaitable[T]) -> T:
    """Await ``work`` to its end; a cancellation is raised after that.

    What it has in its hands (descriptors that a thread writes to, disks half switched) may not be taken away before.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and (task.cancelled() or task.exception() is None):
        raise cancelled
    return task.result()


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`asyncio.to_thread`, whose thread has ended when this returns or raises."""
    return await uncut(asyncio.to_thread(function, *args, **kwargs))


async def beside(first: Awaitable[object], second: Awaitable[object]) -> None:
    """Both at the same time, and to the end of both, whatever happens to one (`asyncio.gather` leaves the other behind)."""
    other = asyncio.ensure_future(first)
    try:
        await second
    finally:
        await other
