"""How the client's objects reach the host: the async runtime just awaits, the sync one goes through the portal."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

from posada.client._portal import portal

P = ParamSpec("P")
T = TypeVar("T")

_END: Any = object()


class AsyncRuntime:
    """In the caller's own event loop."""

    async def run(self, coro: Coroutine[Any, Any, T]) -> T:
        return await coro

    def now(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something that answers at once from the local state."""
        return function(*args, **kwargs)

    def iterate(self, source: AsyncIterable[T]) -> AsyncIterator[T]:
        return aiter(source)


class SyncRuntime:
    """Through this process's portal."""

    def __init__(self) -> None:
        self._portal = portal()

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        return self._portal.run(coro)

    def now(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._portal.call(function, *args, **kwargs)

    def iterate(self, source: AsyncIterable[T]) -> Iterator[T]:
        iterator = aiter(source)

        async def following() -> T:
            return await anext(iterator, _END)

        async def close() -> None:
            aclose = getattr(iterator, "aclose", None)
            if aclose is not None:
                await aclose()

        try:
            while (item := self._portal.run(following())) is not _END:
                yield item
        finally:
            if self._portal.usable:
                self._portal.run(close())
            else:  # collected inside the portal, where waiting would be a deadlock, or after its end
                self._portal.spawn(close())
