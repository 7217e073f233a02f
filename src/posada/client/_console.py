"""The serial console as a byte stream, and the waiting that watches a guest. Pure asyncio."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from posada.errors import GuestError, GuestGone, HostError, Timeout

if TYPE_CHECKING:
    from pathlib import Path

    from posada.host.machines import Machines

#: How much console output a wait for text looks back over.
WINDOW = 1 << 18

#: Seconds between two tries of a condition that the guest cannot announce (a port, a command): from, to.
FIRST_TRY, LAST_TRY = 0.02, 0.5

#: Seconds between two looks at a log that is followed, as `tail -f` looks.
FOLLOW_INTERVAL = 0.1


class ConsoleStream:
    """One connection to a console: recent output first, then what comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, machines: Machines, vm: str) -> ConsoleStream:
        """Raises InvalidState unless it runs, HostError if the console does not answer."""
        path = machines.console(vm)
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError as error:
            raise HostError(f"the console of the vm does not answer: {error}", hint="look at: posada logs") from None
        return cls(reader, writer)

    async def read(self) -> bytes:
        """Some output; nothing when the machine has ended."""
        return await self._reader.read(1 << 16)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data


def read_log(path: Path) -> bytes:
    """A console log, what was rotated away first. Lines end as text's do, not as a serial line's."""
    return (_from(path.with_name(path.name + ".1"), 0) + _from(path, 0)).replace(b"\r\n", b"\n")


async def follow_log(machines: Machines, vm: str) -> AsyncIterator[bytes]:
    """A console's log, and what is added to it until the machine does not run any more. Lines end as text's do."""
    held = b""
    async for data in _follow(machines, vm):
        data = held + data
        held = data[-1:] if data.endswith(b"\r") else b""  # its newline may come with the next piece
        yield data[: len(data) - len(held)].replace(b"\r\n", b"\n")
    if held:
        yield held


async def _follow(machines: Machines, vm: str) -> AsyncIterator[bytes]:
    path = machines.log(vm)
    old, inode, data = _from(path.with_name(path.name + ".1"), 0), _inode(path), _from(path, 0)
    if old or data:
        yield old + data
    start, ended = len(data), asyncio.ensure_future(machines.wait(vm))
    try:
        while True:
            last = ended.done()
            if _inode(path) != inode or _size(path) < start:
                # Rotated, by name or by copy: the rest of the old one, then the new one from its beginning.
                yield _from(path.with_name(path.name + ".1"), start)
                inode, start = _inode(path), 0
            data = _from(path, start)
            start += len(data)
            if data:
                yield data
            if last:
                return
            await asyncio.wait([ended], timeout=FOLLOW_INTERVAL)
    finally:
        ended.cancel()
        await asyncio.wait([ended])


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _from(path: Path, start: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""


async def wait_for_text(machines: Machines, vm: str, pattern: str, timeout: float | None) -> str:
    """Until the console has printed what the regular expression finds. Returns what it found."""
    wanted = re.compile(pattern.encode(), re.MULTILINE)
    seen = b""
    stream = await ConsoleStream.open(machines, vm)
    try:
        async with asyncio.timeout(timeout):
            async for data in stream:
                seen = (seen + data)[-WINDOW:]
                if match := wanted.search(seen):
                    return match[0].decode(errors="replace")
    except TimeoutError:
        tail = seen[-400:].decode(errors="replace").strip()
        raise Timeout(f"the console did not print {pattern!r} within {timeout} s; its end: {tail!r}") from None
    finally:
        await stream.close()
    raise GuestGone(f"the machine ended before its console printed {pattern!r}")


async def _until(condition: Callable[[], Awaitable[bool]], timeout: float | None, what: str) -> None:
    """Try until it holds. The guest cannot tell when, so the tries come ever more slowly."""
    pause = FIRST_TRY
    try:
        async with asyncio.timeout(timeout):
            while not await condition():
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_TRY)
    except TimeoutError:
        raise Timeout(f"{what} did not come within {timeout} s") from None


async def wait_for_port(machines: Machines, vm: str, port: int, host: str, timeout: float | None) -> None:
    """Until something in the guest accepts TCP connections on the port."""
    guest = await machines.guest(vm)

    async def accepts() -> bool:
        try:
            stream = await guest.open_tcp(port, host)
        except GuestGone:
            raise
        except GuestError:
            return False
        stream.close()
        return True

    await _until(accepts, timeout, f"port {port} of {host} in the guest")


async def wait_for_file(machines: Machines, vm: str, path: str, timeout: float | None) -> None:
    """Until the path exists in the guest."""
    guest = await machines.guest(vm)

    async def exists() -> bool:
        try:
            await guest.stat(path)
        except GuestError as error:
            if error.errno_name in ("ENOENT", "ENOTDIR"):
                return False
            raise
        return True

    await _until(exists, timeout, f"file {path} in the guest")


async def wait_for_command(machines: Machines, vm: str, argv: Sequence[str], timeout: float | None) -> None:
    """Until the command ends with status 0."""

    async def succeeds() -> bool:
        return (await machines.run(vm, list(argv))).ok

    await _until(succeeds, timeout, f"success of {' '.join(argv)!r}")
