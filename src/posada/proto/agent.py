"""The agent protocol without I/O: bytes in, events out; requests in, bytes out (docs/AGENT-PROTOCOL.md).

`Link` is one end of one channel. The client's end drives real guests; the agent's end carries the fake agent and the
tests. The peer is hostile: every frame is judged before it means anything, nothing it sends makes this end hold more
than `MAX_PAYLOAD` bytes, and everything it may send unasked is bounded by windows that are counted here.

::

    client   CLOSED ──start()──► HUNTING ──answer with our nonce──► FRAMES ──ProtocolError──► CLOSED
                                  └─resync()─┘
    agent    HUNTING ──preamble──► FRAMES ──invalid frame, preamble──► HUNTING
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from posada.errors import ProtocolError
from posada.model.exec import AgentHello
from posada.proto import cbor, events, frames
from posada.proto.frames import FrameType, Role, cbor_frame, frame

_T = TypeVar("_T")
_U32 = 0xFFFFFFFF
_MAX_MS = 1 << 53
_SOLICITED = frozenset({FrameType.DATA, FrameType.EOF, FrameType.CREDIT, FrameType.EXIT, FrameType.EVENT})


class Phase(enum.Enum):
    CLOSED = "closed"
    HUNTING = "hunting"
    FRAMES = "frames"


class _Stream:
    """Accounts of one stream. Lists are indexed by flags."""

    __slots__ = ("closing", "ended_in", "ended_out", "exited", "opened", "owed", "sent", "unread")

    def __init__(self) -> None:
        self.opened = False
        self.closing = False
        self.exited = False
        self.ended_in = [False, False]
        self.ended_out = [False, False]
        self.sent = [0, 0]
        self.unread = [0, 0]
        self.owed = [0, 0]


class Link:
    """One end of a channel. Methods that send return the bytes to write, in the order of the calls."""

    def __init__(self, role: Role, *, window: int = frames.WINDOW) -> None:
        self.role = role
        self.phase = Phase.HUNTING if role is Role.AGENT else Phase.CLOSED
        self.window = window
        self.hello: AgentHello | None = None
        self._buffer = bytearray()
        self._answer = b""
        self._streams: dict[int, _Stream] = {}
        self._calls: set[int] = set()

    # -- setting up -------------------------------------------------------------------------------------------------

    def start(self, nonce: bytes, name: str) -> bytes:
        """Client: the preamble and HELLO. ``nonce`` is 16 random bytes, fresh each time."""
        if len(nonce) != frames.NONCE_SIZE:
            raise ValueError(f"a nonce of {len(nonce)} bytes")
        self.phase = Phase.HUNTING
        self._answer = frames.AGENT_PREAMBLE + nonce
        hello = {"version": frames.VERSION, "min": frames.VERSION, "name": name}
        return frames.CLIENT_PREAMBLE + nonce + cbor_frame(0, FrameType.HELLO, hello)

    def resync(self, nonce: bytes, name: str) -> bytes:
        """Client, while hunting: as `start`, for an agent that may be in the middle of a torn frame."""
        return frames.RESYNC + self.start(nonce, name)

    def greet(self, body: dict[str, Any]) -> bytes:
        """Agent: its HELLO."""
        return cbor_frame(0, FrameType.HELLO, {"version": frames.VERSION, "min": frames.VERSION, **body})

    # -- sending ----------------------------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """How many streams are taken, those whose CLOSE has not been answered yet among them."""
        return len(self._streams)

    def is_open(self, stream: int) -> bool:
        """Whether frames may be sent on it."""
        account = self._streams.get(stream)
        return account is not None and not account.closing

    def room(self, stream: int, flags: int = 0) -> int:
        """Bytes of DATA the peer's window has room for; 0 when the stream is not open."""
        account = self._streams.get(stream)
        if account is None or account.closing or account.ended_out[flags]:
            return 0
        return self.window - account.sent[flags]

    def call(self, call: int, op: str, args: dict[str, Any]) -> bytes:
        data = cbor_frame(0, FrameType.CALL, {"id": call, "op": op, "args": args})
        self._calls.add(call)
        return data

    def reply(self, call: int, result: dict[str, Any]) -> bytes:
        return cbor_frame(0, FrameType.REPLY, {"id": call, "ok": result})

    def refuse(self, call: int, error: str, errno: str | None = None) -> bytes:
        return cbor_frame(0, FrameType.REPLY, {"id": call, "error": error, **({"errno": errno} if errno else {})})

    def open(self, stream: int, body: dict[str, Any]) -> bytes:
        """Client: open ``stream``, which is free, with ``body`` (``kind`` among it)."""
        if not 0 < stream <= _U32 or stream in self._streams or len(self._streams) >= frames.MAX_STREAMS:
            raise ValueError(f"stream {stream} cannot be opened")
        data = cbor_frame(stream, FrameType.OPEN, body)
        self._streams[stream] = _Stream()
        return data

    def opened(self, stream: int, info: dict[str, Any]) -> bytes:
        self._streams[stream].opened = True
        return cbor_frame(stream, FrameType.OPENED, info)

    def data(self, stream: int, data: bytes | memoryview, flags: int = 0) -> bytes:
        """DATA of at most `room` bytes, in as many frames as that takes."""
        if len(data) > self.room(stream, flags):
            raise ValueError(f"{len(data)} bytes do not fit into the window of stream {stream}")
        self._streams[stream].sent[flags] += len(data)
        step = frames.MAX_PAYLOAD
        if len(data) <= step:
            return frame(stream, FrameType.DATA, data, flags) if data else b""
        return b"".join(frame(stream, FrameType.DATA, data[i : i + step], flags) for i in range(0, len(data), step))

    def eof(self, stream: int, flags: int = 0) -> bytes:
        """The end of this direction. Idempotent; nothing on a stream that is not open."""
        account = self._streams.get(stream)
        if account is None or account.closing or account.ended_out[flags]:
            return b""
        account.ended_out[flags] = True
        return frame(stream, FrameType.EOF, flags=flags)

    def consumed(self, stream: int, flags: int, size: int) -> bytes:
        """The reader has taken ``size`` bytes: CREDIT for them, once a quarter of a window has gathered."""
        account = self._streams.get(stream)
        if account is None or account.closing:
            return b""
        account.owed[flags] += size
        if account.ended_in[flags] or account.owed[flags] < self.window // 4:
            return b""
        amount, account.owed[flags] = account.owed[flags], 0
        account.unread[flags] -= amount
        return frame(stream, FrameType.CREDIT, frames.CREDIT_BODY.pack(amount), flags)

    def close(self, stream: int, error: str | None = None, errno: str | None = None) -> bytes:
        """Finish a stream. A client's stream number stays taken until the agent has answered. Idempotent."""
        account = self._streams.get(stream)
        if account is None or account.closing:
            return b""
        account.closing = True
        if self.role is Role.AGENT:
            del self._streams[stream]
        body = {"error": error, **({"errno": errno} if errno else {})} if error is not None else {}
        return cbor_frame(stream, FrameType.CLOSE, body)

    def exit(self, stream: int, *, code: int | None, signal: int | None, ms: int) -> bytes:
        how = {"code": code} if code is not None else {"signal": signal}
        return cbor_frame(stream, FrameType.EXIT, {**how, "ms": ms})

    def signal(self, stream: int, signal: int, *, group: bool) -> bytes:
        return cbor_frame(stream, FrameType.SIGNAL, {"signal": signal, "group": group})

    def resize(self, stream: int, rows: int, cols: int) -> bytes:
        return cbor_frame(stream, FrameType.RESIZE, {"rows": rows, "cols": cols})

    def ping(self, data: bytes) -> bytes:
        return frame(0, FrameType.PING, data)

    def pong(self, data: bytes) -> bytes:
        return frame(0, FrameType.PONG, data)

    def notice(self, stream: int, name: str, body: dict[str, Any]) -> bytes:
        return cbor_frame(stream, FrameType.EVENT, {**body, "event": name})

    # -- receiving --------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> Iterator[events.Event]:
        """What ``data`` (any piece of what the peer sent) means. To be exhausted before the next call.

        Client: raises ProtocolError, once every event before the violation has been given; the link is then closed.
        Agent: gives `events.Reset` instead, and hunts.
        """
        if self.phase is Phase.CLOSED:
            return
        self._buffer += data
        while True:
            if self.phase is Phase.HUNTING:
                linked = self._hunt()
                if linked is None:
                    return
                if self.role is Role.AGENT:
                    yield linked
            try:
                yield from self._frames()
                return
            except ProtocolError as error:
                self._streams.clear()
                self._calls.clear()
                if self.role is Role.CLIENT:
                    self.phase = Phase.CLOSED
                    self._buffer.clear()
                    raise
                self.phase = Phase.HUNTING
                yield events.Reset(error.message)

    def _hunt(self) -> events.Linked | None:
        """Look for the peer's preamble; forget what comes before it."""
        wanted = self._answer if self.role is Role.CLIENT else frames.CLIENT_PREAMBLE
        length = len(frames.AGENT_PREAMBLE) + frames.NONCE_SIZE
        found = self._buffer.find(wanted)
        if found < 0:
            del self._buffer[: max(0, len(self._buffer) - len(wanted) + 1)]
            return None
        if len(self._buffer) < found + length:
            del self._buffer[:found]
            return None
        nonce = bytes(self._buffer[found + length - frames.NONCE_SIZE : found + length])
        del self._buffer[: found + length]
        self.phase = Phase.FRAMES
        self._streams.clear()
        return events.Linked(frames.AGENT_PREAMBLE + nonce)

    def _frames(self) -> Iterator[events.Event]:
        buffer, position, header = self._buffer, 0, frames.HEADER.size
        try:
            while len(buffer) - position >= header:
                length, stream, kind, flags = frames.HEADER.unpack_from(buffer, position)
                problem = frames.header_problem(self.role, length, stream, kind, flags)
                if problem is not None:
                    raise self._violation(problem)
                start = position + header
                if len(buffer) - start < length:
                    return
                payload = bytes(memoryview(buffer)[start : start + length])
                position = start + length
                event = self._frame(FrameType(kind), stream, flags, payload)
                if event is not None:
                    yield event
        finally:
            del buffer[:position]

    def _violation(self, what: str) -> ProtocolError:
        sender = "the guest's agent" if self.role is Role.CLIENT else "the client"
        return ProtocolError(f"{sender} sent {printable(what)}")

    def _frame(self, kind: FrameType, stream: int, flags: int, payload: bytes) -> events.Event | None:
        if kind is FrameType.PING or kind is FrameType.PONG:
            if len(payload) > frames.MAX_PING:
                raise self._violation(f"a {kind.name} of {len(payload)} bytes")
            return events.Ping(payload) if kind is FrameType.PING else events.Pong(payload)
        if stream == 0:
            return self._link_frame(kind, self._body(kind, payload))
        account = self._streams.get(stream)
        if kind is FrameType.OPEN:
            return self._on_open(stream, self._body(kind, payload))
        if account is None:
            if self.role is Role.AGENT:  # The client has not seen our CLOSE yet.
                return None
            raise self._violation(f"{kind.name} on stream {stream}, which is not open")
        if kind is FrameType.CLOSE:
            error, errno = self._error(self._body(kind, payload))
            if self.role is Role.CLIENT:  # The agent answers with a CLOSE of its own; until then the number is taken.
                del self._streams[stream]
            return events.Closed(stream, error, errno)
        if self.role is Role.CLIENT and kind in _SOLICITED and not account.opened and not account.closing:
            raise self._violation(f"{kind.name} before OPENED on stream {stream}")
        if kind is FrameType.DATA:
            return self._on_data(account, stream, flags, payload)
        if kind is FrameType.EOF:
            return self._on_eof(account, stream, flags, payload)
        if kind is FrameType.CREDIT:
            return self._on_credit(account, stream, flags, payload)
        event = self._stream_frame(kind, account, stream, self._body(kind, payload))
        return None if account.closing else event

    # -- bytes of streams -------------------------------------------------------------------------------------------

    def _on_data(self, account: _Stream, stream: int, flags: int, payload: bytes) -> events.Event | None:
        if account.ended_in[flags]:
            raise self._violation(f"DATA after EOF on stream {stream}")
        if flags and self.role is Role.AGENT:
            raise self._violation("DATA for stderr")
        account.unread[flags] += len(payload)
        if account.unread[flags] > self.window:
            raise self._violation(f"more DATA than the window of {self.window} bytes on stream {stream}")
        return events.Data(stream, flags, payload) if payload and not account.closing else None

    def _on_eof(self, account: _Stream, stream: int, flags: int, payload: bytes) -> events.Event | None:
        if payload or account.ended_in[flags]:
            raise self._violation(f"an EOF that is {'not empty' if payload else 'the second'} on stream {stream}")
        account.ended_in[flags] = True
        return None if account.closing else events.Eof(stream, flags)

    def _on_credit(self, account: _Stream, stream: int, flags: int, payload: bytes) -> events.Event | None:
        if len(payload) != frames.CREDIT_BODY.size:
            raise self._violation(f"a CREDIT of {len(payload)} bytes")
        amount = frames.CREDIT_BODY.unpack(payload)[0]
        if amount > account.sent[flags]:
            raise self._violation(f"CREDIT for {amount} bytes of {account.sent[flags]} on stream {stream}")
        account.sent[flags] -= amount
        return None if account.closing else events.Credit(stream, flags)

    # -- frames with bodies -----------------------------------------------------------------------------------------

    def _link_frame(self, kind: FrameType, body: dict[str, Any]) -> events.Event:
        if kind is FrameType.CLOSE:
            return events.Closed(0, *self._error(body))
        if kind is FrameType.EVENT:
            return events.Notice(0, self._get(body, "event", str), body)
        if kind is FrameType.HELLO:
            return self._on_hello(body)
        identifier = self._uint(body, "id", _U32)
        if kind is FrameType.CALL:
            return events.Call(identifier, self._get(body, "op", str), self._get(body, "args", dict))
        if identifier not in self._calls:
            raise self._violation(f"REPLY to a call {identifier} that was not made")
        self._calls.discard(identifier)
        if "error" in body:
            return events.Reply(identifier, {}, *self._error(body))
        return events.Reply(identifier, self._get(body, "ok", dict))

    def _on_hello(self, body: dict[str, Any]) -> events.Event:
        if self.role is Role.AGENT:
            version, least = self._uint(body, "version", _U32), self._uint(body, "min", _U32)
            return events.ClientHello(version, least, self._get(body, "name", str))
        if self.hello is not None:
            raise self._violation("a second HELLO")
        try:
            hello = msgspec.convert(body, AgentHello)
        except msgspec.ValidationError as error:
            raise self._violation(f"a HELLO that is wrong: {error}") from error
        if not all(t.isprintable() for t in (hello.name, hello.boot_id, hello.kernel, hello.arch, hello.hostname)):
            raise self._violation("a HELLO with control characters")
        self.hello = hello
        self.window = hello.window
        return events.Hello(hello)

    def _on_open(self, stream: int, body: dict[str, Any]) -> events.Event:
        if stream in self._streams or len(self._streams) >= frames.MAX_STREAMS:
            raise self._violation(f"OPEN of stream {stream}, one of {len(self._streams)} open ones")
        self._streams[stream] = _Stream()
        return events.Open(stream, self._get(body, "kind", str), body)

    def _stream_frame(self, kind: FrameType, account: _Stream, stream: int, body: dict[str, Any]) -> events.Event:
        if kind is FrameType.OPENED:
            if account.opened:
                raise self._violation(f"OPENED twice on stream {stream}")
            account.opened = True
            return events.Opened(stream, body)
        if kind is FrameType.EVENT:
            return events.Notice(stream, self._get(body, "event", str), body)
        if kind is FrameType.SIGNAL:
            return events.Signal(stream, self._uint(body, "signal", 127), self._get(body, "group", bool))
        if kind is FrameType.RESIZE:
            return events.Resize(stream, self._uint(body, "rows", 0xFFFF), self._uint(body, "cols", 0xFFFF))
        if account.exited or ("code" in body) == ("signal" in body):
            raise self._violation(f"an EXIT that is {'the second' if account.exited else 'wrong'} on stream {stream}")
        account.exited = True
        code = self._uint(body, "code", 0xFF) if "code" in body else None
        signal = self._uint(body, "signal", 127) if "signal" in body else None
        if signal == 0:
            raise self._violation(f"an EXIT by signal 0 on stream {stream}")
        return events.Exit(stream, code, signal, self._uint(body, "ms", _MAX_MS) if "ms" in body else None)

    def _body(self, kind: FrameType, payload: bytes) -> dict[str, Any]:
        try:
            return cbor.decode_map(payload)
        except cbor.CborError as error:
            raise self._violation(f"a {kind.name} that is not understood: {error}") from error

    def _error(self, body: dict[str, Any]) -> tuple[str | None, str | None]:
        if "error" not in body:
            return None, None
        errno = self._get(body, "errno", str) if "errno" in body else None
        return printable(self._get(body, "error", str)), printable(errno, 32) if errno else None

    def _get(self, body: dict[str, Any], key: str, kind: type[_T]) -> _T:
        value = body.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._violation(f"a body whose {key!r} is {'missing' if value is None else 'of the wrong type'}")
        return value

    def _uint(self, body: dict[str, Any], key: str, most: int) -> int:
        value = self._get(body, key, int)
        if not 0 <= value <= most:
            raise self._violation(f"a body whose {key!r} is out of range")
        return value


def printable(text: str, most: int = 500) -> str:
    """A guest's words, safe to show: no control characters (terminals obey them), at most ``most`` characters."""
    short = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else "�" for c in short)
