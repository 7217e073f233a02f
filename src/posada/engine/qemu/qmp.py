"""QMP sessions: a thin layer over the upstream ``qemu.qmp``, see docs/adr/0003-qmp-client.md.

One session per call of the engine: machines outlive clients, so nobody keeps a monitor to itself. Whatever QEMU does
not do (refuse, close, stand still) ends in an EngineError within a deadline, never in a wait without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from posada.engine.common.files import unix_socket
from posada.errors import EngineError, EngineGone

#: Seconds within which QEMU answers a command that does no I/O; far above what a loaded host needs.
TIMEOUT = 15.0

# The library logs what we raise anyway; without a handler Python would print it on the user's terminal.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

_HUNG = "it may be stopped or hung; end it with: posada kill"


class CommandRefused(EngineError):
    """QEMU answered with an error. ``command`` is what it refused."""

    def __init__(self, command: str, detail: str) -> None:
        super().__init__(f"QEMU refused {command}", detail=detail)
        self.command = command


class Session:
    """An open QMP session. Made by `connect`."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def execute(self, command: str, *, timeout: float = TIMEOUT, **arguments: Any) -> Any:
        """Run a command; underscores in argument names are dashes. ``timeout`` in seconds.

        Raises CommandRefused, EngineGone.
        """
        values = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return await asyncio.wait_for(self._client.execute(command, values), timeout)
        except ExecuteError as error:
            raise CommandRefused(command, str(error)) from None
        except TimeoutError:
            raise EngineGone(f"QEMU does not answer {command} within {timeout:g} s", hint=_HUNG) from None
        except (QMPError, EOFError, OSError) as error:
            raise EngineGone(f"QEMU went away during {command}", detail=str(error)) from None

    async def human(self, line: str) -> str:
        """A command of the human monitor, for what QMP lacks. Its errors come back as text."""
        return str(await self.execute("human-monitor-command", command_line=line))

    async def add_fd(self, fd: int, *, fdset: int | None = None) -> int:
        """Give QEMU a duplicate of ``fd`` in an fdset (a new one if None). Returns the set's number."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise EngineGone("QEMU went away", detail=str(error)) from None
        arguments = {} if fdset is None else {"fdset_id": fdset}
        return int((await self.execute("add-fd", **arguments))["fdset-id"])

    async def next_event(self, *names: str, timeout: float) -> dict[str, Any]:
        """The next event with one of these names since the session began. Raises TimeoutError, EngineGone."""
        async with asyncio.timeout(timeout):
            while True:
                try:
                    event = await self._client.events.get()
                except (QMPError, EOFError, OSError) as error:
                    raise EngineGone("QEMU went away", detail=str(error)) from None
                if event["event"] in names:
                    return dict(event)

    async def _close(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.disconnect(), 1.0)


@contextlib.asynccontextmanager
async def connect(path: Path, *, timeout: float = TIMEOUT) -> AsyncIterator[Session]:
    """A session on the monitor socket ``path``, closed at the end. ``timeout`` in seconds for the set-up.

    Raises EngineGone when nobody listens or answers.
    """
    sock, address, directory = unix_socket(path)
    client = QMPClient("posada")
    try:
        sock.connect(address)  # a local socket with a free backlog: does not block
        sock.setblocking(False)
        await asyncio.wait_for(client.connect(sock), timeout)
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise EngineGone(f"QEMU does not answer on its monitor within {timeout:g} s", hint=_HUNG) from None
        if isinstance(error, (QMPError, EOFError, OSError)):
            raise EngineGone("QEMU's monitor cannot be reached", detail=str(error)) from None
        raise
    finally:
        if directory is not None:
            os.close(directory)
    session = Session(client)
    try:
        yield session
    finally:
        await session._close()
