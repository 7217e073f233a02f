"""One stream of a link: bytes and their windows, seen from a task that reads or writes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from posada.errors import GuestError, StreamClosed
from posada.proto import events, frames

_PIECES = 64
"""Pieces kept apart in the inbox, so that stdout and stderr keep their order; beyond, they are merged: a guest that
sends single bytes must not cost an object each."""
_NOTICES = 256


class Carrier(Protocol):
    """What a stream needs of its link (`posada.guest.link.GuestLink`). Nothing is sent on a closed stream."""

    def room(self, stream: Stream, flags: int) -> int:
        """Bytes the peer's window has room for."""

    def consumed(self, stream: Stream, flags: int, size: int) -> None:
        """The reader has taken this many bytes."""

    async def send(self, stream: Stream, data: memoryview, flags: int) -> None:
        """Write at most `room` bytes, and wait while the socket is full."""

    def send_eof(self, stream: Stream, flags: int) -> None: ...

    def close_stream(self, stream: Stream) -> None: ...


class Stream:
    """An open stream. Made by `GuestLink.open_stream`; one reader and one writer may use it at the same time.

    What the agent sends is held here, at most a window per direction, until `receive` takes it; only then it gets
    credit for more. So a reader that stops holds up its own stream and no other.
    """

    def __init__(self, link: Carrier, number: int, what: str, outputs: frozenset[int]) -> None:
        self.number = number
        self.info: dict[str, Any] | None = None
        """What OPENED said; None before."""
        self.exit: events.Exit | None = None
        self.closed = False
        """The agent has finished the stream, we have, or the link is gone."""
        self.error: GuestError | None = None
        """Why it was finished, when that was a failure."""
        self.overflowed = False
        """Notices were dropped because nobody took them."""
        self._link = link
        self._what = what
        self._outputs = outputs
        self._ended: set[int] = set()
        self._inbox: deque[tuple[int, bytearray]] = deque()
        self._notices: deque[events.Notice] = deque()
        self._waiters: list[asyncio.Future[None]] = []

    # -- for tasks --------------------------------------------------------------------------------------------------

    async def opened(self) -> dict[str, Any]:
        """Wait for OPENED, and return what it says. Raises GuestError when the agent refuses."""
        await self._until(lambda: self.info is not None or self.closed)
        if self.info is None:
            raise self._failure("ended before it was open")
        return self.info

    async def receive(self) -> tuple[int, bytes] | None:
        """The next (flags, bytes), or None when the agent will send no more. Raises GuestError, GuestGone."""
        await self._until(lambda: bool(self._inbox) or self.ended)
        if self._inbox:
            flags, data = self._inbox.popleft()
            self._link.consumed(self, flags, len(data))
            return flags, bytes(data)
        if self.error is not None:
            raise self._failure("")
        return None

    async def send(self, data: bytes | memoryview, flags: int = 0) -> None:
        """Send it all, as fast as the other side takes it. Raises StreamClosed, GuestError when it fails, GuestGone."""
        rest = memoryview(data)
        while rest:
            await self._until(lambda: self.closed or self._link.room(self, flags) > 0)
            if self.closed:
                if self.error is not None:
                    raise self._failure("")
                raise StreamClosed(f"{self._what}: it ended before it had read everything", errno_name="EPIPE")
            size = min(len(rest), self._link.room(self, flags), frames.MAX_PAYLOAD)
            await self._link.send(self, rest[:size], flags)
            rest = rest[size:]

    def send_eof(self, flags: int = 0) -> None:
        """Say that no more comes. Idempotent."""
        self._link.send_eof(self, flags)

    async def finished(self) -> None:
        """Wait for the agent's CLOSE. Raises GuestError when it tells of a failure, GuestGone."""
        await self._until(lambda: self.closed)
        if self.error is not None:
            raise self._failure("")

    async def exited(self) -> events.Exit:
        """Wait for the end of the process. Raises GuestError, GuestGone."""
        await self._until(lambda: self.exit is not None or self.closed)
        if self.exit is None:
            raise self._failure("was closed before its process ended")
        return self.exit

    async def notice(self) -> events.Notice | None:
        """The next EVENT, or None when the stream is finished. Raises GuestError, GuestGone."""
        await self._until(lambda: bool(self._notices) or self.closed)
        if self._notices:
            return self._notices.popleft()
        if self.error is not None:
            raise self._failure("")
        return None

    def close(self) -> None:
        """Finish it now, in both directions. A process gets SIGHUP; an atomic write leaves nothing. Idempotent."""
        if not self.closed:
            self.closed = True
            self._inbox.clear()
            self._link.close_stream(self)
            self._wake()

    @property
    def ended(self) -> bool:
        """No more bytes will come from the agent (some may wait to be received)."""
        return self.closed or self.exit is not None or self._outputs <= self._ended

    @property
    def complete(self) -> bool:
        """Every direction from the agent was ended by an EOF: nothing was cut off."""
        return self._outputs <= self._ended

    # -- for the link -----------------------------------------------------------------------------------------------

    def handle(self, event: events.Event) -> None:
        match event:
            case events.Data(flags=flags, data=data):
                self._put(flags, data)
            case events.Eof(flags=flags):
                self._ended.add(flags)
            case events.Opened(info=info):
                self.info = info
            case events.Exit():
                self.exit = event
            case events.Closed(error=error, errno=errno):
                if error is not None:
                    self.error = GuestError(f"{self._what}: {error}", errno_name=errno)
                self.closed = True
            case events.Notice():
                if len(self._notices) < _NOTICES:
                    self._notices.append(event)
                else:
                    self.overflowed = True
        self._wake()

    def fail(self, error: GuestError) -> None:
        """The link is gone."""
        if not self.closed:
            self.closed = True
            self.error = error
            self._wake()

    def _put(self, flags: int, data: bytes) -> None:
        if self._inbox:
            last = self._inbox[-1]
            if last[0] != flags and len(self._inbox) >= _PIECES:
                last = next((piece for piece in reversed(self._inbox) if piece[0] == flags), last)
            if last[0] == flags:
                last[1].extend(data)
                return
        self._inbox.append((flags, bytearray(data)))

    def _failure(self, ending: str) -> GuestError:
        """A fresh exception each time: one object raised in several tasks would mix their tracebacks."""
        if self.error is None:
            return GuestError(f"{self._what}: the stream {ending}")
        return type(self.error)(self.error.message, errno_name=self.error.errno_name, hint=self.error.hint)

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
