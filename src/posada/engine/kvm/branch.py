"""Points in time and copies: see `Capturer` for what they promise."""

from __future__ import annotations

from collections.abc import Sequence

from posada.engine.base import Capture, Forked, Launch, NewLayer, SnapshotFiles
from posada.errors import Unsupported
from posada.model.records import Running


async def capture(running: Running, target: object, layers: Sequence[NewLayer]) -> Capture:
    raise Unsupported("kvm", "capture")


async def switch(running: Running, layers: Sequence[NewLayer]) -> float:
    raise Unsupported("kvm", "switch")


async def restore(
    launches: Sequence[Launch], snapshot: SnapshotFiles, *, paused: bool
) -> Sequence[Running | Exception]:
    raise Unsupported("kvm", "restore")


async def fork(running: Running, children: Sequence[Launch], layers: Sequence[NewLayer]) -> Forked:
    raise Unsupported("kvm", "fork")
