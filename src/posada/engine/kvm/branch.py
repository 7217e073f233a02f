"""Points in time and copies: see `Capturer` for what they promise, `posada.vmm.branching` for the monitor's side.

A fork's children are processes that the source's monitor forks from itself. Before that each is given, by messages on the
control socket, everything that is to be its own. From then on a child is to us what a monitor is that we started: it says
that it runs on a connection of its own, and dies with us until we let go of it.

A snapshot is a state file and a stack of memory files, ``memory.0`` the lowest. A machine that was restored stands on the
files it came from: its own next snapshot has links to them, and one file more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import Any

from posada.engine.base import Capture, CaptureFailed, Forked, Launch, NewLayer, SnapshotFiles
from posada.engine.common import cgroups
from posada.engine.common.files import open_file
from posada.engine.common.identity import jail_uid
from posada.engine.common.running import current, new_cid, write_running
from posada.engine.common.uncut import in_thread, uncut
from posada.engine.kvm import config, folders, machine, net, stack
from posada.engine.kvm.control import Session, connect
from posada.engine.kvm.files import Descriptors, clear
from posada.engine.kvm.spawn import Newborn, inherit, limits
from posada.errors import EngineError, EngineGone, PosadaError
from posada.model.records import Running
from posada.proto.monitor import Op
from posada.storage import qcow2
from posada.vmm.config import RestoreConfig

#: Seconds for what moves memory: a capture writes it to disk.
LONG = 600.0
#: Seconds for what happens in a pause.
PAUSE = 60.0
#: Each is a process that starts.
_NETWORKS_AT_ONCE = 8

_joining: set[asyncio.Future[None]] = set()


class Layers(contextlib.ExitStack):
    """The new layers of a machine's disks, as the monitor gets them: descriptors and the words for them."""

    def __init__(self, layers: Sequence[NewLayer], fds: Sequence[int] = ()) -> None:
        """``fds`` go before. Raises HostError, ImageError."""
        super().__init__()
        self.fds = list(fds)
        self.words: list[dict[str, Any]] = []
        with contextlib.ExitStack() as undo:
            for layer in layers:
                top = len(self.fds)
                for path in (layer.path, *_may_be_written(layer.path)):
                    self.fds.append(open_file(path, writable=path == layer.path))
                    undo.callback(os.close, self.fds[-1])
                self.words.append({"disk": layer.disk, "top": top, "frozen": [*range(top + 1, len(self.fds))]})
            self.push(undo.pop_all())


def _may_be_written(top: Path) -> Iterator[Path]:
    """The files of which one is what the disk is written to now: the layer below ``top``, and what is below that as long
    as nobody has ever written there: a machine may never have got such a layer (`posada.host.layers`)."""
    info = qcow2.inspect(top)
    if info.backing is None:
        raise EngineError(f"{top} stands on nothing")
    while info.backing is not None:
        top = top.parent / info.backing
        yield top
        if not qcow2.is_qcow2(top):
            return
        info = qcow2.inspect(top)
        if top.stat().st_size > qcow2.empty_length(info.size):
            return


async def _paused(work: Awaitable[Any]) -> Any:
    """To its end, whatever happens to us; failures come out as CaptureFailed, which says what was switched."""
    try:
        return await uncut(work)
    except (PosadaError, OSError) as error:
        raise CaptureFailed(str(error), switched=getattr(error, "switched", ())) from error


async def switch(running: Running, layers: Sequence[NewLayer]) -> float:
    """See `Capturer.switch`."""
    machine.require_alive(running)
    async with connect(Path(running.runtime)) as session:
        with Layers(layers) as new:
            done = await _paused(session.call(Op.SWITCH, {"layers": new.words}, fds=new.fds, timeout=PAUSE))
    return float(done["pause"])


async def capture(running: Running, target: Path, layers: Sequence[NewLayer]) -> Capture:
    """See `Capturer.capture`."""
    machine.require_alive(running)
    runtime = Path(running.runtime)
    shape = config.Shape.from_private(current(running).private)
    try:
        files = await in_thread(stack.begin, running, target)
    except (PosadaError, OSError) as error:
        raise CaptureFailed(str(error), switched=()) from error
    with files:
        async with connect(runtime) as session:
            with Layers(layers, files.fds) as new:
                args = {"memory": 0, "devices": 1, "pagemap": 2, "layers": new.words, "complete": files.complete}
                done = await _paused(session.call(Op.CAPTURE, args, fds=new.fds, timeout=LONG))
        try:
            await in_thread(files.finish)
        except OSError as error:
            raise CaptureFailed(str(error), switched=[layer.disk for layer in layers]) from error
    private = {"files": files.count, **shape.to_private()}
    return Capture(pause=float(done["pause"]), memory_bytes=int(done["bytes"]), private=private)


async def restore(
    launches: Sequence[Launch], snapshot: SnapshotFiles, *, paused: bool
) -> Sequence[Running | Exception]:
    """See `Capturer.restore`. Each is a monitor of its own, over the same memory files."""
    count, shape = stack.count(snapshot), config.Shape.from_private(snapshot.private)
    some = (_restore_one(launch, snapshot, count, shape, paused) for launch in launches)
    outcomes = await asyncio.gather(*some, return_exceptions=True)
    return [_outcome(outcome) for outcome in outcomes]


async def _restore_one(
    launch: Launch, snapshot: SnapshotFiles, count: int, shape: config.Shape, paused: bool
) -> Running:
    machine.check(launch)
    async with contextlib.AsyncExitStack() as undo:
        network = await net.connect(launch)
        undo.push_async_callback(network.abandon)
        clear(launch.runtime)
        kept = await in_thread(stack.keep, launch, snapshot, count)
        undo.callback(stack.forget, launch)
        with Descriptors(launch, network.take()) as files:
            memory = tuple(files.add(open_file(path, writable=False)) for path in kept)
            devices = files.add(open_file(snapshot.path / stack.DEVICES, writable=False))
            how = RestoreConfig(devices, memory, paused)
            document = config.restored(
                launch,
                files.inherited,
                cid=new_cid(),
                uid=jail_uid(launch.uuid),
                shape=shape,
                restore=how,
            )
            newborn = inherit(document, files)
        running = await machine.settle(launch, newborn, network.ports, {**stack.private(launch, count), **shape.to_private()})
        undo.pop_all()
    return running


class _Child:
    """One machine on its way out of a fork: `connect`, `give`, and after the fork `live`. What fails is its own failure."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.failure: Exception | None = None
        self.newborn: Newborn | None = None
        self.network = net.Network()
        self.private: dict[str, Any] = {}

    async def connect(self, gate: asyncio.Semaphore) -> None:
        """Its network, which takes longer than all the rest."""
        async with gate:
            try:
                machine.check(self.launch)
                self.network = await net.connect(self.launch)
            except (PosadaError, OSError) as error:
                self.failure = error

    async def give(self, session: Session, source: Running) -> None:
        """Send what it gets. Raises EngineGone: then nothing works any more."""
        if self.failure is not None:
            return
        try:
            clear(self.launch.runtime)
            count = await in_thread(stack.inherited, source, self.launch) if source.private.get("files") else 0
            shape = config.Shape.from_private(source.private)
            self.private = {**stack.private(self.launch, count), **shape.to_private()}
            with Descriptors(self.launch, self.network.take(), *folders.twins(self.launch)) as files:
                uid = jail_uid(self.launch.uuid)
                document = config.forked(self.launch, files.sent, cid=new_cid(), uid=uid, shape=shape)
                await session.call(Op.CHILD, {"config": document.to_dict()}, fds=files.given)
                self.newborn = Newborn(files.connection())
        except EngineGone:
            raise
        except (PosadaError, OSError) as error:
            self.failure = error
        finally:
            await self.network.abandon()

    async def live(self) -> Running:
        """Wait until it runs, record it, let go of it. On failure nothing is left of it."""
        try:
            if self.failure is not None or self.newborn is None:
                raise self.failure or EngineError("the child was given nothing")
            found = await self.newborn.born()
            running = machine.record(self.launch, found, self.network.ports, self.private)
            write_running(self.launch.runtime, running)
            self.newborn.commit()
        except BaseException:
            await self.abandon()
            raise
        # In its own time: it is 12 ms of waiting in the kernel, and until then it lives in its source's limits.
        joining = asyncio.ensure_future(in_thread(_limit, self.launch, found.pid))
        _joining.add(joining)
        joining.add_done_callback(_joining.discard)
        return running

    async def abandon(self) -> None:
        """Nothing of it is left. Idempotent."""
        await self.network.abandon()
        if self.newborn is not None:
            await self.newborn.abandon()
        stack.forget(self.launch)


def _limit(launch: Launch, pid: int) -> None:
    cgroups.join(limits(launch), pid)


async def fork(running: Running, children: Sequence[Launch], layers: Sequence[NewLayer]) -> Forked:
    """See `Capturer.fork`."""
    machine.require_alive(running)
    running = current(running)
    some = [_Child(launch) for launch in children]
    try:
        gate = asyncio.Semaphore(_NETWORKS_AT_ONCE)
        await asyncio.gather(*(child.connect(gate) for child in some))
        async with connect(Path(running.runtime)) as session:
            for child in some:
                await child.give(session, running)
            with Layers(layers) as new:
                forked = await _paused(session.call(Op.FORK, {"layers": new.words}, fds=new.fds, timeout=PAUSE))
        # Those that were given something, in order: the others failed before.
        for child, told in zip([c for c in some if c.failure is None], forked["children"], strict=True):
            if "error" in told:
                child.failure = EngineError("the monitor could not be forked", detail=str(told["error"]))
        outcomes = await asyncio.gather(*(child.live() for child in some), return_exceptions=True)
    except BaseException as error:
        await asyncio.gather(*(child.abandon() for child in some), return_exceptions=True)
        if isinstance(error, (PosadaError, OSError)):
            raise CaptureFailed(str(error), switched=()) from error
        raise
    return Forked(children=tuple(map(_outcome, outcomes)), pause=float(forked["pause"]))


def _outcome(outcome: Running | BaseException) -> Running | Exception:
    if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
        raise outcome
    return outcome
