"""How a verb reaches the host: one event loop, one connection, and clean ends for Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

if TYPE_CHECKING:
    from posada.aio import Host

P = ParamSpec("P")


def hosted(
    function: Callable[Concatenate[Host, P], Coroutine[Any, Any, int | None]],
) -> Callable[P, int | None]:
    """Turn a coroutine ``verb(host, …)`` into what click calls. It returns the exit status (None: 0)."""

    @functools.wraps(function)
    def verb(*args: P.args, **kwargs: P.kwargs) -> int | None:
        import asyncio

        return asyncio.run(_connected(function, args, kwargs))

    return verb


async def _connected(function: Callable[..., Coroutine[Any, Any, int | None]], args: Any, kwargs: Any) -> int | None:
    """Ctrl-C cancels this task (asyncio.run), and so do SIGTERM and SIGHUP: whatever is going on cleans up."""
    import asyncio

    from posada.client._async.host import connect

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    ended: list[int] = []

    def end(number: int) -> None:
        ended.append(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        async with connect() as host:
            return await function(host, *args, **kwargs)
    except asyncio.CancelledError:
        if ended:
            return 128 + ended[0]
        raise
