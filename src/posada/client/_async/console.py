"""The serial console."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType

from posada.client._console import ConsoleStream
from posada.client._runtime import AsyncRuntime


class Console:
    """A connection to a machine's serial console: recent output first, then what comes. Iterate over it for bytes."""

    def __init__(self, rt: AsyncRuntime, stream: ConsoleStream) -> None:
        self._rt = rt
        self._stream = stream

    async def read(self) -> bytes:
        """Some output; empty when the machine has ended."""
        return await self._rt.run(self._stream.read())

    async def write(self, data: str | bytes) -> None:
        """Type something."""
        await self._rt.run(self._stream.write(data.encode() if isinstance(data, str) else data))

    async def close(self) -> None:
        """Close the connection; the machine goes on."""
        await self._rt.run(self._stream.close())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in self._rt.iterate(self._stream):
            yield data

    async def __aenter__(self) -> Console:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
