"""Running commands: what `VM.exec` does, for both APIs. Pure asyncio; it never blocks on the user's files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from posada.errors import CommandError, GuestError, Timeout
from posada.model.exec import ExecResult, Output, Pty

if TYPE_CHECKING:
    from posada.guest.process import GuestProcess
    from posada.host.machines import Machines

T = TypeVar("T")

#: How much of a stdin file is read at a time.
CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Command:
    """`ExecOptions`, parsed."""

    argv: tuple[str, ...]
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    user: str | None = None
    input: bytes | None = None
    stdin: BinaryIO | bool | None = None
    timeout: float | None = None
    check: bool = False
    pty: tuple[int, int] | None = None

    def options(self) -> dict[str, Any]:
        """What the guest client is told."""
        options: dict[str, Any] = {}
        if self.cwd is not None:
            options["cwd"] = str(self.cwd)
        if self.env:
            options["env"] = dict(self.env)
        if self.user is not None:
            options["user"] = str(self.user)
        if self.pty is not None:
            options["pty"] = Pty(rows=self.pty[0], cols=self.pty[1])
        return options


def parse_command(argv: Sequence[str], *, stream: bool, **options: Any) -> Command:
    """Check what `VM.exec` was given. Raises TypeError or ValueError."""
    if not argv:
        raise ValueError("exec needs a command, such as vm.exec('uname', '-a')")
    for arg in argv:
        if not isinstance(arg, str):
            raise TypeError(f"exec takes its command as separate strings, not {arg!r}")
    data, stdin, pty = options.pop("input", None), options.pop("stdin", None), options.pop("pty", False)
    if data is not None and stdin:
        raise ValueError("give either input or stdin, not both")
    if stdin is True and not stream:
        raise ValueError("stdin=True needs stream=True: who else would write to it?")
    if isinstance(data, str):
        data = data.encode()
    timeout = options.get("timeout")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout must be more than 0 seconds, not {timeout}")
    size = None
    if pty:
        size = (24, 80) if pty is True else (int(pty[0]), int(pty[1]))
    return Command(argv=tuple(argv), input=data, stdin=stdin or None, pty=size, **options)


def shell_argv(script: str) -> tuple[str, ...]:
    """``script`` as an argv that a POSIX shell runs."""
    return ("/bin/sh", "-c", script)


def background_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """``argv`` as one that prints to the console, or to nobody where its user may not write there."""
    if not argv:
        raise ValueError("spawn needs a command, such as vm.spawn('nginx', '-g', 'daemon off;')")
    script = 'if test -w /dev/console; then exec "$@" >/dev/console 2>&1; else exec "$@" >/dev/null 2>&1; fi'
    return ("/bin/sh", "-c", script, "sh", *argv)


async def spawn_command(machines: Machines, vm: str, command: Command) -> int:
    """Start it so that it outlives the connection; its process id."""
    return (await machines.exec(vm, list(command.argv), keep=True, **command.options())).pid


async def run_command(machines: Machines, vm: str, command: Command) -> ExecResult:
    """Run to its end and collect the output. Raises Timeout (the command is killed), CommandError, GuestGone."""
    if command.stdin is None:
        result = await machines.run(
            vm, list(command.argv), input=command.input, timeout=command.timeout, **command.options()
        )
    else:
        process = await open_command(machines, vm, command)
        try:
            result = await process.wait()
        finally:
            await process.close()
    return checked(command, result)


def checked(command: Command, result: ExecResult) -> ExecResult:
    """Raise CommandError if the command asked for it."""
    if command.check and not result.ok:
        raise CommandError(command.argv, result)
    return result


async def open_command(machines: Machines, vm: str, command: Command) -> StreamedCommand:
    """Start it and return at once."""
    feeding = command.input is not None or command.stdin is not None
    process = await machines.exec(vm, list(command.argv), stdin=feeding, **command.options())
    return StreamedCommand(process, command)


class StreamedCommand:
    """A command that runs, with its deadline and the feeding of its stdin.

    Iterating gives `Output` events; `wait` the result. Leaving it (`close`) before its end hangs it up.
    """

    def __init__(self, process: GuestProcess, command: Command) -> None:
        self.process = process
        self.command = command
        loop = asyncio.get_running_loop()
        self._deadline = None if command.timeout is None else loop.time() + command.timeout
        self._feeder: asyncio.Task[None] | None = None
        if command.input is not None or not isinstance(command.stdin, (bool, type(None))):
            self._feeder = loop.create_task(self._feed())

    async def _feed(self) -> None:
        try:
            if self.command.input is not None:
                await self.process.write(self.command.input)
            else:
                file = self.command.stdin
                if isinstance(file, (bool, type(None))):
                    return
                while chunk := await asyncio.to_thread(file.read, CHUNK):
                    await self.process.write(chunk)
            await self.process.close_stdin()
        except GuestError:
            pass  # it ended, or closed its stdin, before it had read everything: as `yes | head -1` does
        except Exception:
            await self.process.close()  # the user's file failed: `wait` tells
            raise

    async def _in_time(self, call: Awaitable[T]) -> T:
        """Await within the deadline; kill the command and raise Timeout when it passes."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await call
        except TimeoutError as error:
            if isinstance(error, Timeout):
                raise
            await self.kill()
            raise Timeout(
                f"command {' '.join(self.command.argv)!r} ran longer than {self.command.timeout} s and was killed"
            ) from None

    async def __aiter__(self) -> AsyncIterator[Output]:
        events = aiter(self.process)
        end: Any = object()
        while True:
            event = await self._in_time(_next(events, end))
            if event is end:
                return
            yield event

    async def wait(self) -> ExecResult:
        """The result, once it has ended. Raises Timeout, GuestGone; CommandError if ``check`` was asked for."""
        try:
            return checked(self.command, await self._in_time(self.process.wait()))
        except GuestError:
            if self._feeder is not None and self._feeder.done() and not self._feeder.cancelled():
                self._feeder.result()
            raise

    async def kill(self) -> None:
        """SIGKILL to the whole process group."""
        await self.process.signal(9)
        await self.process.close()

    async def close(self) -> None:
        """Let go of it: a command that still runs is hung up (SIGHUP, then SIGKILL)."""
        if self._feeder is not None:
            self._feeder.cancel()
            await asyncio.wait([self._feeder])
        await self.process.close()


async def _next(events: AsyncIterator[Output], end: Any) -> Any:
    return await anext(events, end)


async def as_async(pieces: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Pieces from an iterable of either kind; one that blocks is read in a thread."""
    if isinstance(pieces, AsyncIterable):
        async for piece in pieces:
            yield piece
        return
    iterator = iter(pieces)
    while (data := await asyncio.to_thread(next, iterator, None)) is not None:
        yield data
