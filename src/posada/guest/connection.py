"""A connection to a server inside a guest."""

from __future__ import annotations

from types import TracebackType

from posada.guest.stream import Stream


class GuestSocket:
    """A connection made from inside the guest. Each direction is closed on its own, as TCP does it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        """What came; empty once the server has closed its direction. Raises GuestError, GuestGone."""
        piece = await self._stream.receive()
        return b"" if piece is None else piece[1]

    async def write(self, data: bytes) -> None:
        """Send it all. Raises StreamClosed when the connection ends before, GuestGone."""
        await self._stream.send(data)

    def write_eof(self) -> None:
        """Close our direction."""
        self._stream.send_eof()

    def close(self) -> None:
        """End it in both directions. Idempotent."""
        self._stream.close()

    async def __aenter__(self) -> GuestSocket:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
