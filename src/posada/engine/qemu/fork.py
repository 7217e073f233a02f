"""Fork and restore: see `Capturer` for what they promise, `capture` and `incoming` for how."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from posada.engine.base import Forked, Launch, NewLayer, SnapshotFiles
from posada.engine.common.uncut import in_thread
from posada.engine.qemu import capture, ram
from posada.engine.qemu.incoming import Newborn, check_host, load_all, open_all
from posada.engine.qemu.layout import read_layout
from posada.engine.qemu.probe import Facts
from posada.errors import EngineError
from posada.model.records import Running


async def _abandon(newborns: Sequence[Newborn]) -> None:
    await asyncio.gather(*(newborn.abandon() for newborn in newborns), return_exceptions=True)


async def fork(running: Running, children: Sequence[Launch], layers: Sequence[NewLayer], facts: Facts) -> Forked:
    """Children are started before the pause and wait for memory and devices."""
    async with capture.source(running, layers) as source:
        newborns = [Newborn(launch, source.layout, facts) for launch in children]
        try:
            opening = asyncio.ensure_future(open_all(newborns, source.memory, source.devices))
            try:
                await source.prepare()
                if len(children) >= (os.cpu_count() or 1):
                    await asyncio.wait([opening])  # they would take the processors from the pause
                await source.freeze()
            finally:
                opened = await opening
            outcomes = await load_all(newborns, opened, source.seal(), paused=False)
        except BaseException:
            await _abandon(newborns)
            raise
        return Forked(children=tuple(outcomes), pause=source.pause)


async def restore(
    launches: Sequence[Launch], snapshot: SnapshotFiles, facts: Facts, *, paused: bool
) -> list[Running | Exception]:
    """The machines are started while the memory file is read."""
    layout = read_layout(snapshot.private)
    if layout.memory != snapshot.memory:
        raise EngineError(f"the snapshot's memory is {layout.memory} bytes in one record, {snapshot.memory} in another")
    check_host(layout, facts)
    newborns = [Newborn(launch, layout, facts) for launch in launches]
    memory = ram.create(layout.memory)
    try:
        opening = asyncio.ensure_future(open_all(newborns, memory, snapshot.path / capture.DEVICES))
        try:
            await in_thread(ram.load, snapshot.path / capture.MEMORY, memory, layout.memory)
        finally:
            opened = await opening
        return await load_all(newborns, opened, in_thread(ram.seal, memory), paused=paused)
    except BaseException:
        await _abandon(newborns)
        raise
    finally:
        os.close(memory)
