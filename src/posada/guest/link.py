"""A connection to the agent: one unix socket, its handshake, and the streams and calls multiplexed on it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import secrets
import struct
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posada.errors import GuestError, GuestGone, ProtocolError
from posada.guest.stream import Stream
from posada.model.exec import AgentHello
from posada.proto import agent, cbor, events, frames
from posada.proto.agent import Phase

NAME = "posada 0.1.0"
Alive = Callable[[], bool]

_ALIVE_INTERVAL = 0.5
"""Seconds between two looks at whether the machine lives. Its end closes the socket at once; this is the second net."""
_WRITE_LIMIT = 1 << 20
"""Bytes we hold for a peer that asks (PING) and does not read."""
_FIRST_RETRY, _RETRY, _LAST_RETRY = 0.02, 0.25, 1.0


class GuestLink(asyncio.Protocol):
    """One link. `open` connects and shakes hands; from then on every method works until `close` or the guest's end.

    Bytes are dispatched as they come, without a queue between: what a stream holds is bounded by its window, and calls
    by the number of callers. After the end every method that waits raises, those that wait already do so at once.
    """

    def __init__(self, alive: Alive | None = None, *, on_end: Callable[[], None] | None = None) -> None:
        self._link = agent.Link(frames.Role.CLIENT)
        self._loop = asyncio.get_running_loop()
        self._alive = alive
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._failure: GuestError | None = None
        self._ready: asyncio.Future[AgentHello | GuestError] = self._loop.create_future()
        self._calls: dict[int, asyncio.Future[events.Reply | GuestError]] = {}
        self._last_call = 0
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._slots = asyncio.Semaphore(frames.MAX_STREAMS)
        self._writable = asyncio.Event()
        self._writable.set()
        self._watch: asyncio.TimerHandle | None = None
        self._ended = self._loop.create_future()

    @classmethod
    async def open(
        cls, path: Path, alive: Alive | None = None, *, on_end: Callable[[], None] | None = None
    ) -> GuestLink:
        """Connect to the channel and shake hands; waits for as long as the guest takes to boot.

        Raises GuestGone when the machine ends meanwhile, GuestError when it says that it cannot boot, ProtocolError,
        and OSError when there is nothing to connect to.
        """
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: cls(alive, on_end=on_end), str(path))
        try:
            await link._handshake()
        except BaseException:
            link.close()
            raise
        return link

    @property
    def hello(self) -> AgentHello:
        if self._link.hello is None:
            raise GuestGone("the guest's agent has not answered")
        return self._link.hello

    @property
    def gone(self) -> bool:
        return self._failure is not None

    # -- requests ---------------------------------------------------------------------------------------------------

    async def call(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        """A short request. Raises GuestError with the agent's words and errno, GuestGone, ProtocolError."""
        await self._can_write()
        self._last_call = self._last_call % 0xFFFFFFFF + 1
        number = self._last_call
        waiter: asyncio.Future[events.Reply | GuestError] = self._loop.create_future()
        with _requesting(op):
            self._write(self._link.call(number, op, args))
        self._calls[number] = waiter
        try:
            answer = await waiter
        finally:
            self._calls.pop(number, None)
        if isinstance(answer, GuestError):
            raise answer
        if answer.error is not None:
            what = f"{op} {args['path']}" if "path" in args else op
            raise GuestError(f"{what}: {answer.error}", errno_name=answer.errno)
        return answer.result

    async def open_stream(
        self,
        body: dict[str, Any],
        *,
        what: str,
        outputs: frozenset[int] = frozenset({0}),
        data: bytes = b"",
        eof: bool = False,
    ) -> Stream:
        """Open a stream, without waiting for the agent's word on it. ``what`` names it in errors.

        ``outputs``: the flags the agent sends DATA with. ``data`` (at most a window) and ``eof`` go out in the same
        write. When all 64 streams are taken it waits for one to end. Raises GuestGone, GuestError (``E2BIG``).
        """
        await self._slots.acquire()
        try:
            await self._can_write()
            number = self._free_number()
            with _requesting(what):
                message = self._link.open(number, body)
        except BaseException:
            self._slots.release()
            raise
        stream = self._streams[number] = Stream(self, number, what, outputs)
        self._write(message + self._link.data(number, data) + (self._link.eof(number) if eof else b""))
        return stream

    @property
    def busy(self) -> bool:
        """Something is going on: a stream is open, or a call waits for its answer."""
        return bool(self._streams or self._calls)

    def close(self) -> None:
        """End the link: the agent drops its streams, and processes that were not kept get SIGHUP. Idempotent.

        What the socket has not taken yet is dropped: a guest that stands still would never take it.
        """
        self._end(GuestGone("the connection to the guest was closed"))

    async def wait_ended(self) -> None:
        """Wait until the socket is closed."""
        await asyncio.shield(self._ended)

    # -- what streams use -------------------------------------------------------------------------------------------

    def room(self, stream: Stream, flags: int) -> int:
        return self._link.room(stream.number, flags)

    def consumed(self, stream: Stream, flags: int, size: int) -> None:
        if not stream.closed:
            self._write(self._link.consumed(stream.number, flags, size))

    async def send(self, stream: Stream, data: memoryview, flags: int) -> None:
        self._write(self._link.data(stream.number, data, flags))
        await self._writable.wait()

    def send_eof(self, stream: Stream, flags: int) -> None:
        if not stream.closed:
            self._write(self._link.eof(stream.number, flags))

    def close_stream(self, stream: Stream) -> None:
        if self._streams.get(stream.number) is stream:
            self._write(self._link.close(stream.number))

    def signal(self, stream: Stream, signal: int, *, group: bool) -> None:
        if not stream.closed:
            self._write(self._link.signal(stream.number, signal, group=group))

    def resize(self, stream: Stream, rows: int, cols: int) -> None:
        if not stream.closed:
            self._write(self._link.resize(stream.number, rows, cols))

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a {type(transport).__name__} is no stream")
        self._transport = transport
        if self._alive is not None:
            self._watch = self._loop.call_later(_ALIVE_INTERVAL, self._look)

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._link.receive(data):
                self._dispatch(event)
        except ProtocolError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(GuestGone("the guest is gone: its agent's channel was closed"))
        if not self._ended.done():
            self._ended.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _handshake(self) -> None:
        """Send the preamble and wait for the answer.

        As long as the guest has not opened its port, nobody reads what we send, so more of it would only pile up. Once
        it was read and a while has passed in silence, the agent is in the middle of a torn frame: then zeros end that.
        """
        self._write(self._link.start(secrets.token_bytes(frames.NONCE_SIZE), NAME))
        pause, was_read = _FIRST_RETRY, False
        while not self._ready.done():
            await asyncio.wait([self._ready], timeout=pause)
            pause = max(pause, _RETRY)
            if self._ready.done() or self._link.phase is not Phase.HUNTING:
                continue
            if was_read:
                self._write(self._link.resync(secrets.token_bytes(frames.NONCE_SIZE), NAME))
                pause, was_read = min(2 * pause, _LAST_RETRY), False
            else:
                was_read = self._unread() == 0
        answer = self._ready.result()
        if isinstance(answer, GuestError):
            raise _fresh(answer)
        if answer.min > frames.VERSION or answer.version < frames.VERSION:
            raise GuestError(
                f"the guest's agent speaks versions {answer.min} to {answer.version} of the protocol,"
                f" this posada {frames.VERSION}",
                hint="use an image built with this version of posada",
            )

    def _unread(self) -> int:
        """Bytes that were written to the socket and not read by its other end, or still wait to be written."""
        if self._transport is None or self._transport.is_closing():
            return 0
        fd = self._transport.get_extra_info("socket").fileno()
        queued: int = struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))[0]
        return queued + self._transport.get_write_buffer_size()

    def _dispatch(self, event: events.Event) -> None:
        match event:
            case events.Hello(hello=hello):
                if not self._ready.done():
                    self._ready.set_result(hello)
            case events.Reply(id=number):
                waiter = self._calls.get(number)
                if waiter is not None and not waiter.done():
                    waiter.set_result(event)
            case events.Ping(data=data):
                self._answer_ping(data)
            case events.Closed(stream=0, error=error):
                self._end(GuestGone(f"the guest's agent ended the link: {error or 'no reason given'}"))
            case events.Notice(stream=0, name="boot-failed", body=body):
                why = agent.printable(str(body.get("error", "no reason given")))
                self._end(GuestError(f"the guest cannot boot: {why}"))
            case events.Closed(stream=number):
                self._streams.pop(number).handle(event)
                self._slots.release()
            case (
                events.Data(stream=number)
                | events.Eof(stream=number)
                | events.Credit(stream=number)
                | events.Opened(stream=number)
                | events.Exit(stream=number)
                | events.Notice(stream=number)
            ) if number in self._streams:
                self._streams[number].handle(event)

    def _answer_ping(self, data: bytes) -> None:
        if self._transport is not None and self._transport.get_write_buffer_size() > _WRITE_LIMIT:
            raise ProtocolError("the guest's agent asks and does not read the answers")
        self._write(self._link.pong(data))

    def _free_number(self) -> int:
        """Numbers go round, so that one is not reused while anything old may still name it."""
        while True:
            self._last_stream = self._last_stream % 0xFFFFFFFF + 1
            if self._last_stream not in self._streams:
                return self._last_stream

    async def _can_write(self) -> None:
        await self._writable.wait()
        if self._failure is not None:
            raise GuestGone(self._failure.message, hint=self._failure.hint)

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None and self._failure is None:
            self._transport.write(data)

    def _look(self) -> None:
        if self._alive is not None and not self._alive():
            self._end(GuestGone("the guest is gone: its machine has ended"))
        else:
            self._watch = self._loop.call_later(_ALIVE_INTERVAL, self._look)

    def _end(self, error: GuestError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        if self._watch is not None:
            self._watch.cancel()
        if not self._ready.done():
            self._ready.set_result(error)
        for waiter in self._calls.values():
            if not waiter.done():
                waiter.set_result(_fresh(error))
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
            self._slots.release()
        self._writable.set()
        if self._transport is None:
            self._ended.set_result(None)
        else:
            self._transport.abort()
        if self._on_end is not None:
            self._on_end()


@contextlib.contextmanager
def _requesting(what: str) -> Iterator[None]:
    """What does not fit into a frame, or is no text, is the caller's error and harms nothing."""
    try:
        yield
    except cbor.CborError as error:
        raise GuestError(f"{what}: {error}", errno_name="EINVAL") from error
    except ValueError as error:
        raise GuestError(f"{what}: {error}", errno_name="E2BIG") from error


def _fresh(error: GuestError) -> GuestError:
    """A copy, so that no exception object is raised in two tasks."""
    return type(error)(error.message, errno_name=error.errno_name, hint=error.hint)
