"""Control of a monitor, without I/O: requests and replies as CBOR maps, one per message of a SOCK_SEQPACKET socket.

::

    → {"id": 7, "op": "switch", "layers": [{"disk": "root", "top": 0, "frozen": [1]}]}   + descriptors by SCM_RIGHTS
    ← {"id": 7, "ok": {"pause": 0.0004}}
    ← {"id": 7, "error": {"kind": "HostError", "message": "…"}}

Descriptors travel beside the message; fields that mean one hold its index. A sender checks what it sends as a receiver
checks what it gets, by the same table (`ARGUMENTS`), so a mistake is found where it was made. Neither side trusts the
other: a monitor may have been taken over by its guest.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posada.proto import cbor

#: Bytes of one message; a unix socket's default buffer takes 200 KiB.
MAX_MESSAGE = 128 << 10
#: The kernel takes 253 (SCM_MAX_FD).
MAX_FDS = 250
MAX_ID = (1 << 63) - 1


class MonitorProtocolError(ValueError):
    """A message the protocol does not allow. The connection ends."""


class Op(enum.Enum):
    """What can be asked of a monitor."""

    INFO = "info"
    PAUSE = "pause"
    RESUME = "resume"
    POWERDOWN = "powerdown"
    QUIT = "quit"
    DISOWN = "disown"
    CAPTURE = "capture"
    SWITCH = "switch"
    CHILD = "child"
    FORK = "fork"
    RESET = "reset"
    ATTACH = "attach"
    DETACH = "detach"
    RESIZE_DISK = "resize_disk"
    MERGE = "merge"
    SET_MEMORY = "set_memory"
    NIC = "nic"
    METRICS = "metrics"
    REGISTERS = "registers"
    TRACE = "trace"
    DEBUG = "debug"
    MIGRATE = "migrate"


Check = Callable[[object, int], bool]
"""(value, number of descriptors) → is it allowed?"""


def _whole(low: int, high: int) -> Check:
    return lambda value, _: type(value) is int and low <= value <= high


def _text(limit: int) -> Check:
    return lambda value, _: isinstance(value, str) and len(value) <= limit


def _boolean(value: object, _: int) -> bool:
    return type(value) is bool


def _seconds(value: object, _: int) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e6  # type: ignore[operator]


def _descriptor(value: object, count: int) -> bool:
    return type(value) is int and 0 <= value < count


def _map(value: object, _: int) -> bool:
    """Whoever uses it checks what is in it."""
    return isinstance(value, Mapping)


def _maps(checks: Mapping[str, Check], limit: int) -> Check:
    def check(value: object, count: int) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) <= limit
            and all(isinstance(item, Mapping) and _fits(item, checks, count) for item in value)
        )

    return check


def _some(check: Check, limit: int) -> Check:
    """A list of at most ``limit``."""
    return lambda value, count: (
        isinstance(value, (list, tuple)) and len(value) <= limit and all(check(item, count) for item in value)
    )


def _fits(value: Mapping[str, Any], checks: Mapping[str, Check], count: int) -> bool:
    """Exactly the keys of ``checks``, except that a ``?`` at the end of a name makes it optional."""
    names = {name.rstrip("?"): check for name, check in checks.items()}
    required = {name for name in checks if not name.endswith("?")}
    return required <= value.keys() <= names.keys() and all(names[key](item, count) for key, item in value.items())


MAX_DISKS = 64
_NAME = _text(64)
#: Layers that somebody may take a disk to have.
MAX_FILES = 1024
#: The source's new top layer, and read-only descriptors of files of which the one that it freezes is one.
_LAYERS = _maps({"disk": _NAME, "top": _descriptor, "frozen": _some(_descriptor, MAX_FDS)}, MAX_DISKS)
#: A layer's file: `posada.vmm.block.file.identity`, and what it is called in headers.
_FILE = {"device": _whole(0, 1 << 64), "inode": _whole(0, 1 << 64), "name": _text(4096), "format": _text(16)}

ARGUMENTS: dict[Op, dict[str, Check]] = {
    Op.INFO: {},
    Op.PAUSE: {},
    Op.RESUME: {},
    Op.POWERDOWN: {},
    Op.QUIT: {"reason?": _text(256)},
    Op.DISOWN: {},
    Op.CAPTURE: {"memory": _descriptor, "devices": _descriptor, "pagemap": _descriptor, "layers": _LAYERS, "complete?": _boolean},
    Op.SWITCH: {"layers": _LAYERS},
    Op.CHILD: {"config": _map},
    Op.FORK: {"layers": _LAYERS},
    Op.RESET: {
        "pagemap?": _descriptor, "drop?": _boolean, "layers?": _maps({"disk": _NAME, "top": _descriptor}, MAX_DISKS),
    },
    Op.ATTACH: {"disk": _map},
    Op.DETACH: {"name": _NAME, "timeout": _seconds},
    Op.RESIZE_DISK: {"name": _NAME, "size": _whole(512, 1 << 62)},
    Op.MERGE: {"name": _NAME, "files": _maps(_FILE, MAX_FILES), "keep": _whole(1, MAX_FILES)},
    Op.SET_MEMORY: {"size": _whole(0, 1 << 62)},
    Op.NIC: {"index": _whole(0, 63), "fd?": _descriptor},
    Op.METRICS: {},
    Op.REGISTERS: {},
    Op.TRACE: {"limit": _whole(0, 1 << 20)},
    Op.DEBUG: {"listener": _descriptor},
    Op.MIGRATE: {"fd": _descriptor, "pause": _seconds, "pagemap?": _descriptor},
}


@dataclass(frozen=True)
class Request:
    """One question. ``args`` has been checked against `ARGUMENTS`."""

    id: int
    op: Op
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """``kind`` is the name of an exception of `posada.errors`; ``switched`` the disks that are on their new layers."""

    kind: str
    message: str
    switched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """One answer: ``ok`` or ``error``."""

    id: int
    ok: Mapping[str, Any] | None = None
    error: Failure | None = None


def encode_request(request: Request, descriptors: int = 0) -> bytes:
    """``descriptors``: how many go with it. Raises MonitorProtocolError."""
    _check_request(request.id, request.op, request.args, descriptors)
    return _encode({"id": request.id, "op": request.op.value, **request.args})


def decode_request(data: bytes, descriptors: int = 0) -> Request:
    """Raises MonitorProtocolError."""
    message = _decode(data)
    id, name = message.pop("id", None), message.pop("op", None)
    try:
        op = Op(name)
    except ValueError:
        raise MonitorProtocolError(f"{name!r} is no operation") from None
    _check_request(id, op, message, descriptors)
    return Request(id, op, message)


def encode_reply(reply: Reply) -> bytes:
    """Raises MonitorProtocolError."""
    _check_id(reply.id)
    if reply.error is not None:
        failure: dict[str, Any] = {"kind": reply.error.kind, "message": reply.error.message[:8192]}
        if reply.error.switched:
            failure["switched"] = list(reply.error.switched)
        return _encode({"id": reply.id, "error": failure})
    return _encode({"id": reply.id, "ok": dict(reply.ok or {})})


def decode_reply(data: bytes) -> Reply:
    """Raises MonitorProtocolError."""
    message = _decode(data)
    id = _check_id(message.get("id"))
    if message.keys() == {"id", "ok"} and isinstance(message["ok"], dict):
        return Reply(id, ok=message["ok"])
    error = message.get("error")
    known = {"kind": _NAME, "message": _text(8192), "switched?": _names}
    if message.keys() == {"id", "error"} and isinstance(error, dict) and _fits(error, known, 0):
        return Reply(id, error=Failure(error["kind"], error["message"], tuple(error.get("switched", ()))))
    raise MonitorProtocolError("a reply that is neither an answer nor an error")


def _names(value: object, _: int) -> bool:
    return isinstance(value, Sequence) and len(value) <= MAX_DISKS and all(_NAME(item, 0) for item in value)


def _check_request(id: object, op: Op, args: Mapping[str, Any], descriptors: int) -> None:
    _check_id(id)
    if not 0 <= descriptors <= MAX_FDS:
        raise MonitorProtocolError(f"{descriptors} descriptors with one message; at most {MAX_FDS}")
    if not _fits(args, ARGUMENTS[op], descriptors):
        raise MonitorProtocolError(f"{op.value} with other arguments than {', '.join(ARGUMENTS[op]) or 'none'}")


def _check_id(id: object) -> int:
    if type(id) is not int or not 0 <= id <= MAX_ID:
        raise MonitorProtocolError("a message without an id")
    return id


def _encode(message: dict[str, Any]) -> bytes:
    try:
        data = cbor.encode(message)
    except cbor.CborError as error:
        raise MonitorProtocolError(str(error)) from None
    if len(data) > MAX_MESSAGE:
        raise MonitorProtocolError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE}")
    return data


def _decode(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE:
        raise MonitorProtocolError(f"a message of more than {MAX_MESSAGE} bytes")
    try:
        return cbor.decode_map(data)
    except cbor.CborError as error:
        raise MonitorProtocolError(str(error)) from None
