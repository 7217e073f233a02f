"""Long-running actions and what happens on a host."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator

from posada.client._core import Core
from posada.client._runtime import AsyncRuntime
from posada.model.records import Event, OperationRecord, OperationState


class Operation:
    """A long-running action: building an image, a snapshot, a fork. It may belong to another process."""

    def __init__(self, rt: AsyncRuntime, core: Core, record: OperationRecord) -> None:
        self._rt = rt
        self._operations = core.host.operations
        self.record = record
        """The whole record as it was last read; `refresh` reads it again."""

    def __repr__(self) -> str:
        return f"<posada.Operation {self.id} {self.record.kind} {self.record.state}>"

    def refresh(self) -> OperationRecord:
        """Read the record again."""
        self.record = self._rt.now(self._operations.get, self.id)
        return self.record

    @property
    def id(self) -> str:
        """Unique on the host."""
        return self.record.id

    @property
    def kind(self) -> str:
        """What is done, such as ``image.build``."""
        return self.record.kind

    @property
    def state(self) -> OperationState:
        """pending, running, done, failed or cancelled."""
        return self.refresh().state

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.refresh().progress

    async def cancel(self) -> None:
        """Ask whoever does it to stop and clean up. Nothing happens to one that is finished."""
        self._rt.now(self._operations.cancel, self.id)

    async def wait(self) -> OperationRecord:
        """Wait until it is done, failed or cancelled."""
        async for record in self:
            self.record = record
        return self.refresh()

    async def __aiter__(self) -> AsyncIterator[OperationRecord]:
        async for record in self._rt.iterate(self._operations.watch(self.id)):
            yield record


class Operations:
    """``host.operations``: list and find long-running actions."""

    def __init__(self, rt: AsyncRuntime, core: Core) -> None:
        self._rt = rt
        self._core = core

    async def list(self) -> builtins.list[Operation]:
        """The recent ones, newest first."""
        records = self._rt.now(self._core.host.operations.list)
        return [Operation(self._rt, self._core, record) for record in records]

    async def get(self, id: str) -> Operation:
        """Raises NotFound."""
        return Operation(self._rt, self._core, self._rt.now(self._core.host.operations.get, id))


class Events:
    """``host.events``: what happened on this host."""

    def __init__(self, rt: AsyncRuntime, core: Core) -> None:
        self._rt = rt
        self._events = core.host.events

    async def list(self, *, after: int = 0, limit: int = 1000) -> builtins.list[Event]:
        """Those after the event with id ``after``, oldest first."""
        return self._rt.now(self._events.list, after=after, limit=limit)

    async def follow(self, *, after: int | None = None) -> AsyncIterator[Event]:
        """Events as they happen, for ever; from the one after ``after`` on if it is given."""
        async for event in self._rt.iterate(self._events.follow(after=after)):
            yield event
