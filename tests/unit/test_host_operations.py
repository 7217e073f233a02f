"""Operations: intent, undo, cancel from anywhere, and who goes on when the owner is dead."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from posada.errors import Cancelled, NotFound, PosadaError
from posada.host.db import Database
from posada.host.events import Events
from posada.host.operations import Operation, Operations
from posada.host.process import NOBODY, Process
from posada.host.wakeup import Wakeups
from posada.model.records import OperationRecord, OperationState


class Desk:
    """Operations over a database, and what was cleaned up."""

    def __init__(self, folder: Path) -> None:
        listeners = folder / "listeners"
        listeners.mkdir(exist_ok=True)
        self.db = Database(folder / "state.db")
        wakeups = Wakeups(listeners)
        self.events = Events(self.db, wakeups)
        self.operations = Operations(self.db, self.events, wakeups, self.clean_up)
        self.cleaned: list[OperationRecord] = []
        self.broken = False

    async def clean_up(self, op: OperationRecord) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise OSError("the disk is on fire")
        self.cleaned.append(op)

    async def close(self) -> None:
        await self.operations.close()
        self.db.close()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    await desk.close()


async def test_done(desk: Desk) -> None:
    undone, reported = [], []
    async with desk.operations.run("make", "thing", ["u"], lambda f, m: reported.append((f, m)), colour="red") as op:
        op.undo.callback(undone.append, 1)
        stored = desk.operations.get(op.id)
        assert stored.state is OperationState.RUNNING
        assert stored.intent == {"colour": "red", "vms": ["u"]}, "the intent is there before the first step"
        op.intend(step=2)
        assert desk.operations.get(op.id).intent["step"] == 2
        op.report(0.5, "half")
        op.report(None, "who knows")
        op.succeed(answer=42)
    done = desk.operations.get(op.id)
    assert (done.state, done.progress, done.result, done.error) == (OperationState.DONE, 1.0, {"answer": 42}, None)
    assert reported == [(0.5, "half"), (None, "who knows")]
    assert undone == [] and desk.cleaned == []


async def _failing(desk: Desk, undone: list[int]) -> Operation:
    made: list[Operation] = []

    async def work() -> None:
        async with desk.operations.run("make", "thing", []) as op:
            made.append(op)
            op.undo.callback(undone.append, 1)
            op.undo.callback(undone.append, 2)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await work()
    return made[0]


async def test_failed(desk: Desk) -> None:
    undone: list[int] = []
    op = await _failing(desk, undone)
    failed = desk.operations.get(op.id)
    assert (failed.state, failed.error) == (OperationState.FAILED, "no")
    assert undone == [2, 1], "the last step first"
    assert [c.id for c in desk.cleaned] == [op.id] and desk.cleaned[0].error == "no"


async def test_an_undo_that_fails_is_left_to_recovery(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.broken = True
    op = await _failing(desk, [])
    left = desk.operations.get(op.id)
    assert (left.state, left.owner) == (OperationState.RUNNING, NOBODY)
    assert "recovery" in caplog.text


async def test_cancelled_by_its_id(desk: Desk) -> None:
    undone: list[str] = []
    began = asyncio.Event()

    async def work() -> None:
        async with desk.operations.run("make", "thing", []) as op:
            op.undo.callback(undone.append, op.id)
            began.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await began.wait()
    (record,) = desk.operations.list()
    other = Desk(desk.db.path.parent)  # as another process would
    other.operations.cancel(record.id)
    with pytest.raises(Cancelled):
        await asyncio.wait_for(task, 5)
    assert undone == [record.id]
    assert desk.operations.get(record.id).state is OperationState.CANCELLED
    other.operations.cancel(record.id)  # a finished one: nothing happens
    await other.close()


async def test_the_undo_runs_to_its_end_however_often_it_is_cancelled(desk: Desk) -> None:
    steps: list[str] = []
    began = asyncio.Event()

    async def slow() -> None:
        steps.append("begun")
        for _ in range(5):
            await asyncio.sleep(0.01)
        steps.append("ended")

    async def work() -> None:
        async with desk.operations.run("make", "thing", []) as op:
            op.undo.push_async_callback(slow)
            began.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await began.wait()
    for _ in range(4):
        task.cancel()
        await asyncio.sleep(0.005)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["begun", "ended"]


async def test_a_dead_owner_cannot_be_asked_to_cancel(desk: Desk) -> None:
    async with desk.operations.run("make", "thing", []) as op:
        pass
    record = msgspec.structs.replace(op.record, state=OperationState.RUNNING, owner=Process(1, 1))
    desk.db.put_operation(record)
    with pytest.raises(PosadaError, match="recover"):
        desk.operations.cancel(op.id)
    with pytest.raises(NotFound):
        desk.operations.cancel("none")
    seen = [r async for r in desk.operations.watch(op.id)]
    assert [r.owner for r in seen] == [Process(1, 1)], "watching ends with the owner"


async def test_watch(desk: Desk) -> None:
    seen: list[tuple[str, str]] = []
    go = asyncio.Event()

    async def work() -> str:
        async with desk.operations.run("make", "thing", []) as op:
            for step in ("one", "two"):
                op.report(None, step)
                await go.wait()
                go.clear()
        return op.id

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    async for record in desk.operations.watch(desk.operations.list()[0].id):
        seen.append((record.state.value, record.message))
        go.set()
    await task
    assert seen[0] == ("running", "one") and seen[-1][0] == "done"
    assert ("running", "two") in seen


async def test_events_follow_across_connections(desk: Desk, tmp_path: Path) -> None:
    other = Desk(tmp_path)
    desk.events.emit("before")
    got: list[str] = []

    async def read() -> None:
        async for event in other.events.follow():
            got.append(event.kind)
            if event.kind == "last":
                return

    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    for kind in ("a", "b", "last"):
        desk.events.emit(kind, n=1)
    await asyncio.wait_for(task, 5)
    assert got == ["a", "b", "last"]
    assert [e.kind async for e in _take(other.events.follow(after=0), 2)] == ["before", "a"]
    await other.close()


async def _take(source: AsyncIterator[object], count: int) -> AsyncIterator[object]:
    async for item in source:
        yield item
        count -= 1
        if not count:
            return


async def test_a_dead_listener_is_cleared_away(desk: Desk, tmp_path: Path) -> None:
    listeners = tmp_path / "listeners"
    ready_in, ready_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        listener = Wakeups(listeners).listen()
        os.write(ready_out, b"x")
        signal.pause()
        os._exit(len(str(listener)))
    os.read(ready_in, 1)
    os.close(ready_in)
    os.close(ready_out)
    assert len(list(listeners.iterdir())) == 1
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, pid, 0)
    desk.events.emit("ring")
    assert list(listeners.iterdir()) == []
