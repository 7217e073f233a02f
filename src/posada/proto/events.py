"""What comes out of a `posada.proto.agent.Link` as bytes go in: one value per frame that means something."""

from __future__ import annotations

from typing import Any

import msgspec

from posada.model.exec import AgentHello


class Event(msgspec.Struct, frozen=True):
    """Any of the below."""


class Hello(Event, frozen=True):
    """Client: the agent has answered; the link can be used."""

    hello: AgentHello


class Reply(Event, frozen=True):
    """Client: the answer to a call. ``error`` None: it succeeded with ``result``."""

    id: int
    result: dict[str, Any]
    error: str | None = None
    errno: str | None = None


class Opened(Event, frozen=True):
    stream: int
    info: dict[str, Any]


class Data(Event, frozen=True):
    stream: int
    flags: int
    data: bytes


class Eof(Event, frozen=True):
    stream: int
    flags: int


class Credit(Event, frozen=True):
    """More may be sent."""

    stream: int
    flags: int


class Exit(Event, frozen=True):
    stream: int
    code: int | None
    signal: int | None
    ms: int | None


class Closed(Event, frozen=True):
    """The stream is finished. On stream 0: the link is."""

    stream: int
    error: str | None = None
    errno: str | None = None


class Ping(Event, frozen=True):
    data: bytes


class Pong(Event, frozen=True):
    data: bytes


class Notice(Event, frozen=True):
    """An EVENT frame: ``name`` is its ``event``, ``body`` all of it."""

    stream: int
    name: str
    body: dict[str, Any]


class ClientHello(Event, frozen=True):
    """Agent: a client has greeted."""

    version: int
    min: int
    name: str


class Call(Event, frozen=True):
    id: int
    op: str
    args: dict[str, Any]


class Open(Event, frozen=True):
    stream: int
    kind: str
    body: dict[str, Any]


class Signal(Event, frozen=True):
    stream: int
    signal: int
    group: bool


class Resize(Event, frozen=True):
    stream: int
    rows: int
    cols: int


class Linked(Event, frozen=True):
    """Agent: a preamble came. ``answer`` must be written before anything else; every earlier stream is gone."""

    answer: bytes


class Reset(Event, frozen=True):
    """Agent: the client broke the protocol. Every stream is gone, and the link hunts for a preamble."""

    reason: str
