"""``Pending``: what an async verb returns when its result is itself a context manager.

It lets one write both ``vm = await aio.run(…)`` and ``async with aio.run(…) as vm:``. The sync twin needs none of this:
``scripts/unasync.py`` drops it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Generic[T_co]):
    """A call that has not been made yet: ``await`` it, or enter it with ``async with``. Once only."""

    def __init__(self, call: Coroutine[Any, Any, T_co]) -> None:
        self._call = call
        self._value: Any = None

    def __await__(self) -> Generator[Any, Any, T_co]:
        return self._call.__await__()

    async def __aenter__(self) -> T_co:
        self._value = await self._call
        return cast(T_co, await cast(AbstractAsyncContextManager[Any], self._value).__aenter__())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await cast(AbstractAsyncContextManager[Any], self._value).__aexit__(kind, error, trace)


def pending(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Pending[T]]:
    """Make a coroutine function return `Pending`."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        return Pending(function(*args, **kwargs))

    return wrapper
