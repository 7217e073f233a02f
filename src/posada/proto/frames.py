"""Frames of the agent protocol: types, limits, headers, preambles (docs/AGENT-PROTOCOL.md)."""

from __future__ import annotations

import enum
import struct
from typing import Any

from posada.proto import cbor

VERSION = 1
MAX_PAYLOAD = 65536
"""Bytes of payload in one frame."""
WINDOW = 256 << 10
"""Bytes that may be on their way per (stream, direction, flags), unless HELLO says another number."""
MAX_STREAMS = 64
MAX_PING = 64
VSOCK_PORT = 28783
"""Where the agent of a guest with vsock listens."""

CLIENT_PREAMBLE = b"POSADA\xff\xfeAGENT-01"
AGENT_PREAMBLE = b"POSADA\xff\xfdAGENT-01"
NONCE_SIZE = 16
RESYNC = bytes(MAX_PAYLOAD + 10)
"""Ends any torn payload, and then is an invalid header: the agent hunts for a preamble after it."""

HEADER = struct.Struct("<IIBB")
CREDIT_BODY = struct.Struct("<I")


class FrameType(enum.IntEnum):
    HELLO = 1
    CALL = 2
    REPLY = 3
    OPEN = 4
    OPENED = 5
    DATA = 6
    EOF = 7
    CREDIT = 8
    EXIT = 9
    CLOSE = 10
    SIGNAL = 11
    RESIZE = 12
    PING = 13
    PONG = 14
    EVENT = 15


class Role(enum.Enum):
    CLIENT = "client"
    AGENT = "agent"


BOTH = frozenset(
    {FrameType.HELLO, FrameType.DATA, FrameType.EOF, FrameType.CREDIT, FrameType.CLOSE, FrameType.PING, FrameType.PONG}
)
#: What each role may receive.
ACCEPTED = {
    Role.CLIENT: BOTH | {FrameType.REPLY, FrameType.OPENED, FrameType.EXIT, FrameType.EVENT},
    Role.AGENT: BOTH | {FrameType.CALL, FrameType.OPEN, FrameType.SIGNAL, FrameType.RESIZE},
}
ON_LINK = frozenset({FrameType.HELLO, FrameType.CALL, FrameType.REPLY, FrameType.PING, FrameType.PONG})
ON_EITHER = frozenset({FrameType.CLOSE, FrameType.EVENT})
WITH_FLAGS = frozenset({FrameType.DATA, FrameType.EOF, FrameType.CREDIT})


def header_problem(role: Role, length: int, stream: int, kind: int, flags: int) -> str | None:
    """Why a header that ``role`` received is invalid, or None. Judged before the payload is waited for."""
    if length > MAX_PAYLOAD:
        return f"a frame of {length} bytes"
    if kind not in ACCEPTED[role]:
        return f"a frame of type {kind}"
    if kind not in ON_EITHER and (stream == 0) != (kind in ON_LINK):
        return f"{FrameType(kind).name} on stream {stream}"
    if flags > (1 if kind in WITH_FLAGS else 0):
        return f"{FrameType(kind).name} with flags {flags}"
    return None


def frame(stream: int, kind: FrameType, payload: bytes | memoryview = b"", flags: int = 0) -> bytes:
    """One frame. Raises ValueError when the payload is too long for one."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a {kind.name} of {len(payload)} bytes; at most {MAX_PAYLOAD} go into one frame")
    return HEADER.pack(len(payload), stream, kind, flags) + payload


def cbor_frame(stream: int, kind: FrameType, body: dict[str, Any]) -> bytes:
    """One frame with a CBOR map. Raises ValueError (`posada.proto.cbor.CborError` among it)."""
    return frame(stream, kind, cbor.encode(body))
