"""One side of a migration's connection: whole frames on a blocking stream with a time limit."""

from __future__ import annotations

import _socket
from collections.abc import Sequence

from posada.errors import EngineError, EngineGone
from posada.proto import migration
from posada.proto.migration import HEADER, Kind, MigrationError


class Link:
    def __init__(self, sock: _socket.socket) -> None:
        self._socket = sock

    @staticmethod
    def frame(kind: Kind, body: bytes = b"") -> list[memoryview]:
        return [memoryview(migration.header(kind, len(body)) + body)]

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Raises EngineGone."""
        try:
            for buffer in buffers:
                self._socket.sendall(buffer)
        except OSError as error:
            raise self.said(error) from error

    def expect(self, *kinds: Kind) -> tuple[Kind, int]:
        """The header of the next frame, which must be one of ``kinds``. Raises EngineError, also with what FAILED says."""
        try:
            kind, length = migration.read_header(self.read(HEADER.size))
        except MigrationError as error:
            raise EngineError("the migration failed", detail=str(error)) from error
        if kind is Kind.FAILED:
            raise EngineError("the other side gave up", detail=self.read(length).decode(errors="replace"))
        if kind not in kinds:
            raise EngineError(f"{kind.name} came, and {' or '.join(k.name for k in kinds)} was due")
        return kind, length

    def read(self, size: int) -> bytes:
        """Exactly so many bytes. Raises EngineGone."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> None:
        """Fill ``view``. Raises EngineGone."""
        at = 0
        while at < len(view):
            try:
                count = self._socket.recv_into(view[at:])
            except OSError as error:
                raise self.said(error) from error
            if not count:
                raise EngineGone("the other side of the migration is gone")
            at += count

    def reason(self, error: Exception) -> Exception:
        """Why sending failed: what the other side said of it before it hung up, if it did."""
        if isinstance(error, OSError):
            self._socket.settimeout(1)
            try:
                self.expect()
            except EngineGone:
                pass
            except EngineError as told:
                return told
        return self.said(error)

    @staticmethod
    def said(error: Exception) -> Exception:
        """As one of posada's."""
        return (
            EngineGone("the connection of the migration broke", detail=str(error))
            if isinstance(error, OSError)
            else error
        )
