"""Talking to a monitor: one session per call of the engine, on its SOCK_SEQPACKET socket.

Whatever the monitor does not do (refuse, close, stand still) ends in an EngineError within a deadline.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posada import errors
from posada.engine.common.files import unix_socket
from posada.errors import EngineError, EngineGone, PosadaError
from posada.proto.monitor import (
    MAX_MESSAGE,
    Failure,
    MonitorProtocolError,
    Op,
    Reply,
    Request,
    decode_reply,
    encode_request,
)

#: Seconds within which a monitor answers what does no I/O; far above what a loaded host needs.
TIMEOUT = 15.0
_HUNG = "it may be stopped or hung; end it with: posada kill"
#: Errors a monitor may raise on this side, by name. Any other is an EngineError.
_KINDS: dict[str, type[PosadaError]] = {
    kind.__name__: kind
    for kind in (errors.HostError, errors.ImageError, errors.StateError, errors.Timeout, errors.GuestError)
}


def error_of(failure: Failure) -> PosadaError:
    """The exception for an answer. It carries ``switched`` (see `CaptureFailed`)."""
    error = _KINDS.get(failure.kind, EngineError)(failure.message)
    error.switched = failure.switched  # type: ignore[attr-defined]
    return error


class Session:
    """An open connection. Made by `connect`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._last = 0

    async def call(
        self, op: Op, args: Mapping[str, Any] = {}, *, fds: Sequence[int] = (), timeout: float = TIMEOUT
    ) -> Mapping[str, Any]:
        """Ask, and wait for the answer. ``fds`` go along. ``timeout`` in seconds.

        Raises what the monitor raised (EngineError, HostError, StateError …) and EngineGone.
        """
        await self.send(op, args, fds=fds)
        return await self.answer(op, timeout=timeout)

    async def send(self, op: Op, args: Mapping[str, Any] = {}, *, fds: Sequence[int] = ()) -> None:
        """Only ask; `answer` fetches the answers, which come in order."""
        self._last += 1
        try:
            data = encode_request(Request(self._last, op, args), len(fds))
        except MonitorProtocolError as error:
            raise EngineError(f"the request {op.value} cannot be sent", detail=str(error)) from None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        deadline = asyncio.get_running_loop().time() + TIMEOUT
        while True:
            try:
                self._sock.sendmsg([data], rights)
                return
            except BlockingIOError:
                if asyncio.get_running_loop().time() > deadline:
                    raise EngineGone("the monitor takes no requests", hint=_HUNG) from None
                await asyncio.sleep(0.001)
            except OSError as error:
                raise EngineGone("the monitor went away", detail=str(error)) from None

    async def answer(self, op: Op, *, timeout: float = TIMEOUT) -> Mapping[str, Any]:
        """The next answer, which is ``op``'s."""
        reply = await self._receive(op, timeout)
        if reply.error is not None:
            raise error_of(reply.error)
        return reply.ok or {}

    async def _receive(self, op: Op, timeout: float) -> Reply:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                data = await loop.sock_recv(self._sock, MAX_MESSAGE + 1)
            if not data:
                raise EngineGone(f"the monitor went away during {op.value}")
            return decode_reply(data)
        except TimeoutError:
            raise EngineGone(f"the monitor does not answer {op.value} within {timeout:g} s", hint=_HUNG) from None
        except OSError as error:
            raise EngineGone(f"the monitor went away during {op.value}", detail=str(error)) from None
        except MonitorProtocolError as error:
            raise EngineGone("the monitor speaks nonsense", detail=str(error), hint="posada kill") from None


@contextlib.asynccontextmanager
async def connect(runtime: Path) -> AsyncIterator[Session]:
    """A session with the monitor of a runtime directory, closed at the end. Raises EngineGone when nobody listens."""
    sock, address, directory = unix_socket(runtime / "control.sock", socket.SOCK_SEQPACKET)
    with sock:
        try:
            # A local socket: it connects at once, or its backlog is full and the monitor hangs.
            sock.setblocking(False)
            sock.connect(address)
        except OSError as error:
            raise EngineGone("the monitor cannot be reached", detail=str(error), hint=_HUNG) from None
        finally:
            if directory is not None:
                os.close(directory)
        yield Session(sock)
