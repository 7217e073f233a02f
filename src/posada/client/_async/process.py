"""A command that runs in a guest."""

from __future__ import annotations

import signal as signals
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING

from posada.client._exec import StreamedCommand
from posada.client._runtime import AsyncRuntime

if TYPE_CHECKING:
    from posada.model.exec import ExecResult, Output


class Process:
    """What ``vm.exec(…, stream=True)`` returns: iterate over it for its output as it comes.

    Each event has ``.stream`` (``"stdout"`` or ``"stderr"``), ``.data`` and ``.text``. Leaving ``async with`` before
    the command has ended hangs it up (SIGHUP, then SIGKILL).
    """

    def __init__(self, rt: AsyncRuntime, command: StreamedCommand) -> None:
        self._rt = rt
        self._command = command

    @property
    def pid(self) -> int:
        """Its process id in the guest."""
        return self._command.process.pid

    async def write(self, data: str | bytes) -> None:
        """Feed its standard input (needs ``stdin=True``). Waits while the command does not read."""
        await self._rt.run(self._command.process.write(data.encode() if isinstance(data, str) else data))

    async def close_stdin(self) -> None:
        """End its standard input."""
        await self._rt.run(self._command.process.close_stdin())

    async def signal(self, number: int | signals.Signals) -> None:
        """Send a signal to its process group."""
        await self._rt.run(self._command.process.signal(int(number)))

    async def terminate(self) -> None:
        """Send SIGTERM."""
        await self.signal(signals.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL."""
        await self.signal(signals.SIGKILL)

    async def resize(self, rows: int, cols: int) -> None:
        """Tell its terminal (``pty``) a new size."""
        await self._rt.run(self._command.process.resize(rows, cols))

    async def wait(self) -> ExecResult:
        """Wait for its end. The result holds the output that was not iterated over.

        Raises CommandError (``check``), Timeout (``timeout``; the command is killed), GuestGone.
        """
        return await self._rt.run(self._command.wait())

    async def close(self) -> None:
        """Let go of it; if it still runs it is hung up."""
        await self._rt.run(self._command.close())

    async def __aiter__(self) -> AsyncIterator[Output]:
        async for event in self._rt.iterate(self._command):
            yield event

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
