"""A command in a guest, while it runs."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Literal

from posada.errors import GuestError, ProtocolError, StreamClosed
from posada.guest.link import GuestLink
from posada.guest.stream import Stream
from posada.model.exec import ExecResult, Output
from posada.proto import events

MAX_OUTPUT = 64 << 20
"""Bytes of output that are collected before the caller is told to stream."""

StreamName = Literal["stdout", "stderr"]
_NAMES: tuple[StreamName, StreamName] = ("stdout", "stderr")


class GuestProcess:
    """A command in a guest. Iterate over it for its output as it comes; then `wait` for how it ended.

    Leaving it (``async with``, `close`) before its end hangs it up: SIGHUP, two seconds later SIGKILL, to its group.
    """

    def __init__(self, link: GuestLink, stream: Stream, argv: Sequence[str], *, stdin: bool = True) -> None:
        self.argv = tuple(argv)
        self._stdin = stdin
        self._link = link
        self._stream = stream
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = [decoder(errors="replace"), decoder(errors="replace")]

    async def started(self) -> None:
        """Wait until it runs. Raises GuestError with ``errno_name`` when it cannot be executed (``ENOENT``)."""
        info = await self._stream.opened()
        for key in ("pid", "exec"):
            if not isinstance(info.get(key), int) or isinstance(info[key], bool) or info[key] < 0:
                self._stream.close()
                raise ProtocolError(f"the guest's agent started {self.argv[0]!r} and does not say its {key}")

    @property
    def pid(self) -> int:
        """Its process id in the guest."""
        return self._number("pid")

    @property
    def exec_id(self) -> int:
        """What `GuestClient.attach` takes, for a command started with ``keep``."""
        return self._number("exec")

    def _number(self, key: str) -> int:
        if self._stream.info is None:
            raise GuestError(f"{self.argv[0]!r} has not started yet")
        number: int = self._stream.info[key]
        return number

    async def write(self, data: bytes) -> None:
        """Feed its standard input. Waits while it does not read. Raises StreamClosed when it ends before, GuestGone."""
        if not self._stdin:
            raise StreamClosed(f"{self.argv[0]!r} was started without stdin", hint="start it with stdin=True")
        await self._stream.send(data)

    async def close_stdin(self) -> None:
        """End its standard input. Idempotent."""
        self._stream.send_eof()

    async def signal(self, number: int, *, group: bool = True) -> None:
        """Send a signal to its process group, or to it alone. Nothing happens when it has ended."""
        if self._stream.exit is None:
            self._link.signal(self._stream, number, group=group)

    async def resize(self, rows: int, cols: int) -> None:
        """Tell its terminal a new size."""
        self._link.resize(self._stream, rows, cols)

    async def read(self) -> Output | None:
        """The next piece of output, or None when no more comes. Raises GuestError, GuestGone."""
        piece = await self._stream.receive()
        if piece is not None:
            flags, data = piece
            return Output(_NAMES[flags], data, self._decoders[flags].decode(data))
        for name, decoder in zip(_NAMES, self._decoders, strict=True):
            rest = decoder.decode(b"", final=True)  # The half of a character it ended with.
            if rest:
                return Output(name, b"", rest)
        return None

    async def __aiter__(self) -> AsyncIterator[Output]:
        while (output := await self.read()) is not None:
            yield output

    async def wait(self, *, max_output: int = MAX_OUTPUT) -> ExecResult:
        """Wait for its end. The result holds the output that was not read before.

        Raises GuestError when that is more than ``max_output`` bytes, or when it could not be executed; GuestGone.
        """
        collected = (bytearray(), bytearray())
        while (piece := await self._stream.receive()) is not None:
            flags, data = piece
            collected[flags].extend(data)
            if len(collected[0]) + len(collected[1]) > max_output:
                self._stream.close()
                raise GuestError(
                    f"command {' '.join(self.argv)!r} wrote more than {max_output} bytes and was ended",
                    errno_name="EFBIG",
                    hint="stream its output, send it to a file, or raise max_output",
                )
        ended = await self._stream.exited()
        return _result(ended, bytes(collected[0]), bytes(collected[1]))

    async def close(self) -> None:
        """Let go of it; what still runs is hung up. Idempotent."""
        if self._stream.exit is None:
            self._stream.close()

    async def __aenter__(self) -> GuestProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _result(ended: events.Exit, stdout: bytes, stderr: bytes) -> ExecResult:
    return ExecResult(
        stdout_bytes=stdout,
        stderr_bytes=stderr,
        exit_code=ended.code,
        signal=ended.signal,
        duration=(ended.ms or 0) / 1000,
    )
