"""One link of the fake agent: the agent's end of the protocol."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from posada.errors import GuestError, GuestGone
from posada.guest import fake_calls, fake_exec, fake_files
from posada.guest.stream import Stream
from posada.proto import events
from posada.proto.agent import Link
from posada.proto.frames import Role

if TYPE_CHECKING:
    from posada.guest.fake_agent import FakeGuest

Handler = Callable[["FakeGuest", "FakeLink", Stream, dict[str, Any]], Awaitable[None]]
_KINDS: dict[str, Handler] = {
    "exec": fake_exec.execute,
    "attach": fake_exec.attach,
    "read": fake_files.read,
    "write": fake_files.write,
    "tar-out": fake_files.tar_out,
    "tar-in": fake_files.tar_in,
    "connect": fake_files.connect,
}


class FakeLink(asyncio.Protocol):
    """A connection of a client. Each stream is a task."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest
        self._link = Link(Role.AGENT)
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Future[None]] = set()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.controls: dict[int, Callable[[events.Event], None]] = {}
        """What takes the SIGNAL and RESIZE of a stream."""
        self._writable = asyncio.Event()
        self._writable.set()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a {type(transport).__name__} is no stream")
        self._transport = transport
        self._guest.links.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guest.links.discard(self)
        self._writable.set()
        self._reset()
        for task in self._tasks:
            task.cancel()
        self.ended.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        for event in self._link.receive(data):
            self._dispatch(event)

    # -- Carrier ----------------------------------------------------------------------------------------------------

    def room(self, stream: Stream, flags: int) -> int:
        return self._link.room(stream.number, flags)

    def consumed(self, stream: Stream, flags: int, size: int) -> None:
        if not stream.closed:
            self.write(self._link.consumed(stream.number, flags, size))

    async def send(self, stream: Stream, data: memoryview, flags: int) -> None:
        self.write(self._link.data(stream.number, data, flags))
        await self._writable.wait()

    def send_eof(self, stream: Stream, flags: int) -> None:
        if not stream.closed:
            self.write(self._link.eof(stream.number, flags))

    def close_stream(self, stream: Stream) -> None:
        self.finish(stream, None)

    # -- for the handlers -------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def opened(self, stream: Stream, info: dict[str, Any]) -> None:
        if not stream.closed:
            self.write(self._link.opened(stream.number, info))

    def exited(self, stream: Stream, *, code: int | None, signal: int | None, ms: int) -> None:
        if not stream.closed:
            self.write(self._link.exit(stream.number, code=code, signal=signal, ms=ms))

    def finish(self, stream: Stream, error: BaseException | None) -> None:
        """CLOSE."""
        if self._streams.get(stream.number) is stream:
            del self._streams[stream.number]
            self.controls.pop(stream.number, None)
            self.write(self._link.close(stream.number, *(_words(error) if error is not None else ())))
        stream.fail(GuestError("the stream is closed"))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _dispatch(self, event: events.Event) -> None:
        match event:
            case events.Linked(answer=answer):
                self._reset()
                self.write(answer)
            case events.Reset():
                self._reset()
            case events.ClientHello():
                self.write(self._link.greet(self._guest.hello()))
            case events.Ping(data=data):
                self.write(self._link.pong(data))
            case events.Call():
                self._start(self._call(event))
            case events.Open(stream=number, kind=kind, body=body):
                stream = self._streams[number] = Stream(self, number, kind, frozenset({0}))
                self._start(self._stream(stream, kind, body))
            case events.Signal(stream=number) | events.Resize(stream=number):
                if number in self.controls:
                    self.controls[number](event)
            case events.Closed(stream=number) if number in self._streams:
                stream = self._streams.pop(number)
                self.controls.pop(number, None)
                self.write(self._link.close(number))
                stream.fail(GuestGone("the client closed the stream"))
            case events.Data(stream=number) | events.Eof(stream=number) | events.Credit(stream=number):
                self._streams[number].handle(event)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        for tasks in (self._tasks, self._guest.tasks):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _call(self, call: events.Call) -> None:
        try:
            if call.op in self._guest.failures:
                text, name = self._guest.failures[call.op]
                raise GuestError(text, errno_name=name)
            result = await fake_calls.answer(self._guest, call.op, call.args)
        except (GuestError, OSError, LookupError, TypeError, ValueError) as error:
            self.write(self._link.refuse(call.id, *_words(error)))
        else:
            self.write(self._link.reply(call.id, result))

    async def _stream(self, stream: Stream, kind: str, body: dict[str, Any]) -> None:
        error: BaseException | None = None
        try:
            handler = _KINDS.get(kind)
            if handler is None:
                raise GuestError(f"no stream of kind {kind!r}", errno_name="ENOSYS")
            await handler(self._guest, self, stream, body)
        except (GuestError, OSError, LookupError, TypeError, ValueError) as failure:
            error = failure
        finally:
            self.finish(stream, error)

    def _reset(self) -> None:
        streams, self._streams = self._streams, {}
        self.controls.clear()
        for stream in streams.values():
            stream.fail(GuestGone("the link was reset"))


def _words(error: BaseException) -> tuple[str, str | None]:
    if isinstance(error, GuestError):
        return error.message, error.errno_name
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error), errno.errorcode.get(error.errno)
    return f"{type(error).__name__}: {error}", "EINVAL"
