"""How a verb reaches the host: one event loop, one connection, and clean ends for Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from posada.cli import output

if TYPE_CHECKING:
    from posada.aio import Host

P = ParamSpec("P")
Work = Coroutine[Any, Any, int | None]


def hosted(function: Callable[Concatenate[Host, P], Work]) -> Callable[P, int | None]:
    """Turn a coroutine ``verb(host, …)`` into what click calls. It returns the exit status (None: 0)."""

    @functools.wraps(function)
    def verb(*args: P.args, **kwargs: P.kwargs) -> int | None:
        async def work() -> int | None:
            from posada.client._async.host import connect

            async with connect() as host:
                return await function(host, *args, **kwargs)

        return drive(work())

    return verb


def drive(work: Work) -> int | None:
    """Run it to its end. Ctrl-C cancels it (asyncio.run does that), and so do SIGTERM and SIGHUP: it cleans up."""
    import asyncio

    from posada.errors import PosadaError

    async def guarded() -> int | None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        ended: list[int] = []

        def end(number: int) -> None:
            ended.append(number)
            if task is not None:
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end, number)
        try:
            return await work
        except asyncio.CancelledError:
            if not ended:
                raise
            return 128 + ended[0]

    try:
        return asyncio.run(guarded())
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has printed ^C
        return 130
    except BrokenPipeError as error:
        if isinstance(error, PosadaError):
            raise
        return output.reader_gone()
