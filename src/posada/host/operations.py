"""How long work runs: intent first, undo on failure, and somebody else's turn after a kill -9.

::

    pending ──► running ──► done
       │           ├──────► failed      (undone)
       └───────────┴──────► cancelled   (undone)

Whatever takes several steps runs inside ``async with operations.run(...) as op``, with the locks of its vms held:

1. The intent is in the database before the first step: what recovery must know to finish the action or to roll it back,
   should this process vanish. `Operation.intend` adds to it as the action learns more.
2. When the body raises or is cancelled, what it pushed onto ``op.undo`` is run: that which only this process can know.
   Then comes the very handler that would clean up after a kill -9 (`posada.host.recovery`): there is one truth about
   what half an action is. All this goes to its end however often Ctrl-C is pressed.
3. When the body ends the operation is *done*.

The operation names its owner (pid + start time). One that is open and whose owner is dead is what recovery looks for; a
cleaning up that fails hands its operation to recovery too: it stays open, without an owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec

from posada.errors import Cancelled, NotFound, PosadaError
from posada.host import faults
from posada.host.db import Database
from posada.host.events import Events
from posada.host.process import NOBODY, alive, me
from posada.host.wakeup import Wakeups
from posada.model.progress import Progress
from posada.model.records import OperationRecord, OperationState

log = logging.getLogger(__name__)

#: Progress is written to the database at most this often, in seconds.
_REPORT_INTERVAL = 0.1

OPEN = frozenset({OperationState.PENDING, OperationState.RUNNING})


CleanUp = Callable[[OperationRecord], Awaitable[object]]
"""Finishes a broken operation or rolls it back, with the locks of its vms held."""


class Operation:
    """One action in progress, seen by those who do it."""

    def __init__(self, operations: Operations, record: OperationRecord, progress: Progress | None) -> None:
        self._operations = operations
        self._progress = progress
        self._reported = 0.0
        self.record = record
        self.undo = AsyncExitStack()
        """Run if the body fails: ``op.undo.callback(...)``, ``op.undo.push_async_callback(...)``; else dropped."""

    @property
    def id(self) -> str:
        return self.record.id

    def intend(self, **intent: Any) -> None:
        """Add to the intent. It is durable (against kill -9) when this returns: call it *before* the step."""
        self._put(intent={**self.record.intent, **intent})

    def report(self, progress: float | None, message: str) -> None:
        """Say how far it is (0 to 1; None: unknown) to the caller and to whoever watches."""
        if self._progress is not None:
            self._progress(progress, message)
        fraction = self.record.progress if progress is None else min(max(progress, 0.0), 1.0)
        now = time.monotonic()
        if message == self.record.message and now - self._reported < _REPORT_INTERVAL:
            return
        self._reported = now
        self._put(progress=fraction, message=message[:500])
        self._operations.changed()

    def succeed(self, **result: Any) -> None:
        """Set the result that watchers get. The operation is done when the block ends."""
        self.record = msgspec.structs.replace(self.record, result=result)

    def _put(self, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, updated=time.time(), **changes)
        self._operations.put(self.record)


class Operations:
    """All operations of one house, this process's and others'."""

    def __init__(self, db: Database, events: Events, wakeups: Wakeups, clean_up: CleanUp) -> None:
        self._db = db
        self._clean_up = clean_up
        self._events = events
        self._wakeups = wakeups
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._given_up: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def run(
        self, kind: str, target: str, vms: Sequence[str], progress: Progress | None = None, **intent: Any
    ) -> AsyncIterator[Operation]:
        """Do something in several steps; see the top of this file.

        ``target`` is what people see; ``vms`` are the uuids whose locks recovery must take. Raises what the body
        raises; Cancelled when somebody cancelled the operation by its id.
        """
        now = time.time()
        record = OperationRecord(
            id=uuid.uuid4().hex[:12],
            kind=kind,
            target=target,
            state=OperationState.RUNNING,
            owner=me(),
            created=now,
            updated=now,
            intent={**intent, "vms": list(vms)},
        )
        self._db.put_operation(record, new=True)
        op = Operation(self, record, progress)
        task = asyncio.current_task()
        try:
            with self._cancellable(record.id):
                faults.point(f"{kind}.begun")
                yield op
                faults.point(f"{kind}.ending")
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            op.record = msgspec.structs.replace(op.record, error="cancelled" if cancelled else _words(error))
            undone = await _to_the_end(self._undo(op))
            self._finish(op, OperationState.CANCELLED if cancelled else OperationState.FAILED, undone)
            if cancelled and task is not None and self._db.cancel_requested(record.id) and task.uncancel() == 0:
                raise Cancelled(f"the {kind} of {target} was cancelled") from None
            raise
        op.undo.pop_all()
        self._finish(op, OperationState.DONE, True)

    async def close(self) -> None:
        """No operation of this process runs any more."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def put(self, record: OperationRecord) -> None:
        self._db.put_operation(record)

    def changed(self) -> None:
        self._wakeups.ring()

    def interrupted(self, record: OperationRecord) -> bool:
        """It is open and nobody works on it any more."""
        return record.state in OPEN and (not alive(record.owner) or record.id in self._given_up)

    async def _undo(self, op: Operation) -> bool:
        try:
            try:
                await op.undo.aclose()
            finally:
                await self._clean_up(op.record)
        except Exception:
            log.exception("undoing the %s of %s failed; recovery will go on", op.record.kind, op.record.target)
            return False
        return True

    def _finish(self, op: Operation, state: OperationState, undone: bool) -> None:
        changes: dict[str, Any] = {"updated": time.time()}
        if undone:
            changes |= {"state": state, "progress": 1.0 if state is OperationState.DONE else op.record.progress}
        else:
            changes |= {"owner": NOBODY}
        op.record = msgspec.structs.replace(op.record, **changes)
        try:
            self._db.put_operation(op.record)
        except PosadaError:
            # A full disk. What happened has happened; recovery, also our own, will find out what that was.
            log.exception("the end of the %s of %s could not be recorded", op.record.kind, op.record.target)
            self._given_up.add(op.id)
        if state is not OperationState.DONE:
            self._events.emit(
                f"operation.{state}",
                None,
                id=op.id,
                kind=op.record.kind,
                target=op.record.target,
                error=op.record.error,
            )
        else:
            self.changed()

    # seeing and cancelling

    def list(self, limit: int = 100) -> list[OperationRecord]:
        """Newest first."""
        return self._db.operations(limit)

    def get(self, id: str) -> OperationRecord:
        """Raises NotFound."""
        record = self._db.operation(id)
        if record is None:
            raise NotFound("operation", id, hint="posada op ls lists them")
        return record

    def cancel(self, id: str) -> None:
        """Ask for an end; what was done is undone. Works from any process. Nothing happens to a finished one.

        Raises NotFound; PosadaError when its owner is dead (recovery finishes it instead).
        """
        record = self.get(id)
        if record.state not in OPEN:
            return
        if not alive(record.owner):
            raise PosadaError(f"operation {id} has no living owner", hint="roll it back with: posada recover")
        self._db.request_cancel(id)
        self._wakeups.ring()

    async def watch(self, id: str) -> AsyncIterator[OperationRecord]:
        """Its record now, and again whenever it changes, until it is finished or its owner is dead. Raises NotFound."""
        with self._wakeups.listen() as listener:
            seen = self.get(id)
            yield seen
            while seen.state in OPEN and alive(seen.owner):
                with contextlib.suppress(TimeoutError):  # a dead owner rings no bell
                    await asyncio.wait_for(listener.changed(), 1.0)
                record = self.get(id)
                if record != seen:
                    seen = record
                    yield seen

    @contextlib.contextmanager
    def _cancellable(self, id: str) -> Iterator[None]:
        task = asyncio.current_task()
        if task is not None:
            self._tasks[id] = task
            if self._watcher is None:
                self._watcher = asyncio.create_task(self._watch_cancels(), name="posada-cancels")
        try:
            yield
        finally:
            self._tasks.pop(id, None)
            if not self._tasks and self._watcher is not None:
                self._watcher.cancel()
                self._ending.add(self._watcher)
                self._watcher.add_done_callback(self._ending.discard)
                self._watcher = None

    async def _watch_cancels(self) -> None:
        """While operations of this process run: cancel the tasks of those for which that was asked."""
        with self._wakeups.listen() as listener:
            while True:
                for id, task in list(self._tasks.items()):
                    if self._db.cancel_requested(id):
                        self._tasks.pop(id)
                        task.cancel()
                await listener.changed()


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


async def _to_the_end(work: Coroutine[Any, Any, bool]) -> bool:
    """Await it however often the caller is cancelled meanwhile: half an undo is worse than a late one."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()
