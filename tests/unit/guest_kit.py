"""What the tests of the guest client share: a client of a fake guest, and an agent that does as a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from posada.guest.client import GuestClient
from posada.guest.fake_agent import FakeGuest
from posada.proto import cbor, frames
from posada.proto.frames import FrameType, cbor_frame

HELLO: dict[str, Any] = {"version": 1, "min": 1, "name": "scripted"}


@asynccontextmanager
async def fake_client(directory: Path) -> AsyncIterator[tuple[FakeGuest, GuestClient]]:
    """A fake guest and a client of it."""
    guest = FakeGuest()
    channels = [directory / "agent0", directory / "agent1"]
    try:
        await guest.serve(channels)
        async with await GuestClient.connect(channels, timeout=10) as client:
            yield guest, client
    finally:
        await guest.close()


class Wire:
    """The agent's end of a connection, by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def nonce(self) -> bytes:
        """Read up to and with a preamble."""
        await self.reader.readuntil(frames.CLIENT_PREAMBLE)
        return await self.reader.readexactly(frames.NONCE_SIZE)

    async def greet(self, **hello: Any) -> None:
        """The handshake, as an honest agent does it."""
        nonce = await self.nonce()
        assert (await self.frame())[1] is FrameType.HELLO
        self.send(frames.AGENT_PREAMBLE + nonce + cbor_frame(0, FrameType.HELLO, {**HELLO, **hello}))

    async def frame(self) -> tuple[int, FrameType, int, bytes]:
        """The next (stream, type, flags, payload)."""
        header = await self.reader.readexactly(frames.HEADER.size)
        length, stream, kind, flags = frames.HEADER.unpack(header)
        return stream, FrameType(kind), flags, await self.reader.readexactly(length)

    async def expect(self, kind: FrameType) -> tuple[int, dict[str, Any]]:
        """The next frame, which is of this type: (stream, body)."""
        stream, found, _, payload = await self.frame()
        assert found is kind
        return stream, cbor.decode_map(payload)


@asynccontextmanager
async def scripted(path: Path, script: Callable[[Wire], Awaitable[None]]) -> AsyncIterator[asyncio.Task[None]]:
    """An agent at ``path`` that does ``script`` for the first client; yields its task, which holds its failure."""
    started: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def work() -> None:
        reader, writer = await started.get()
        try:
            await script(Wire(reader, writer))
        finally:
            writer.close()

    server = await asyncio.start_unix_server(lambda r, w: started.put_nowait((r, w)), path, limit=1 << 20)
    task = asyncio.create_task(work())
    try:
        yield task
    finally:
        server.close()
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def until_closed(wire: Wire) -> None:
    """Read, and forget, until the client hangs up."""
    while await wire.reader.read(65536):
        pass


async def flood(wire: Wire, data: bytes) -> None:
    """Send it over and over, until the client hangs up."""
    with contextlib.suppress(ConnectionError):
        while not wire.writer.is_closing():
            wire.send(data)
            await wire.writer.drain()
