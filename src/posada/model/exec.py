"""What goes into a guest and comes out of it: commands, their output, the agent's greeting, a fork's new identity."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

UInt = Annotated[int, msgspec.Meta(ge=0)]
Word = Annotated[str, msgspec.Meta(max_length=256)]


class Pty(msgspec.Struct, frozen=True):
    """A terminal for a command: its size in characters and what it calls itself in ``TERM``."""

    rows: int = 24
    cols: int = 80
    term: str = "xterm-256color"


class Output(msgspec.Struct, frozen=True):
    """A piece of a command's output as it came. With a pty everything is ``stdout``."""

    stream: Literal["stdout", "stderr"]
    data: bytes
    decoded: str | None = None
    """The text, where the reader decodes incrementally, so that a character split over two pieces comes whole."""

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace") if self.decoded is None else self.decoded


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended. Exactly one of ``exit_code`` and ``signal`` is set."""

    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    exit_code: int | None = None
    signal: int | None = None
    duration: float = 0.0
    """Seconds, as the guest measured them."""

    @property
    def stdout(self) -> str:
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode(errors="replace")

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def status(self) -> int:
        """As a shell says it: the exit code, or 128 + the signal."""
        return self.exit_code if self.exit_code is not None else 128 + (self.signal or 0)


class AgentHello(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's greeting. It comes from the guest: true only as far as the guest is."""

    version: UInt
    min: UInt
    name: Word = ""
    boot_id: Word = ""
    generation: UInt = 0
    init: bool = False
    """The agent is PID 1."""
    kernel: Word = ""
    arch: Word = ""
    hostname: Word = ""
    window: Annotated[int, msgspec.Meta(ge=4096, le=1 << 20)] = 256 << 10
    """Flow control window per stream and direction, in bytes."""


class IdentityReset(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a fork another machine than its source (docs/AGENT-PROTOCOL.md, ``identity.reset``)."""

    generation: int
    hostname: str
    machine_id: str
    """32 hexadecimal digits."""
    entropy: bytes
    """64 bytes for the kernel's random number generator."""
    time_ns: int
    """The time of day, nanoseconds since the epoch."""
    macs: tuple[str, ...] = ()
    token: bytes | None = None
    """The one of ``fork.prepare``; None for a guest restored from a snapshot taken without it."""
    ssh_host_keys: bool = True
