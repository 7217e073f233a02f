"""What the client's objects share: one open host, and the ephemeral machines that were made through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posada.errors import NotFound, Unsupported
from posada.model.machine import MachineSpec
from posada.model.progress import quiet

if TYPE_CHECKING:
    from posada.host.host import Host
    from posada.model.progress import Progress
    from posada.model.records import VmRecord


class Core:
    """An open host. Closing it ends the ephemeral machines made through it; all others live on."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.ephemeral: set[str] = set()
        self.closed = False

    async def launch(self, spec: MachineSpec, *, progress: Progress | None, timeout: float | None) -> VmRecord:
        """Create, start, wait until ready. On failure or cancellation nothing is left of it.

        ``timeout`` bounds the wait for ready, in seconds.
        """
        report = progress or quiet
        record = await self.create(spec, progress=report)
        try:
            record = await self.host.vms.start(record.uuid, progress=report)
            if has_agent(self.host, record):
                report(None, f"waiting for {record.name}")
                await self.host.vms.wait_ready(record.uuid, timeout=timeout)
            return self.host.vms.get(record.uuid)
        except BaseException:
            await asyncio.shield(self.delete(record.uuid))
            raise

    async def create(self, spec: MachineSpec, *, progress: Progress | None) -> VmRecord:
        record = await self.host.vms.create(spec, progress=progress or quiet)
        self.adopt([record])
        return record

    def adopt(self, records: Sequence[VmRecord]) -> None:
        """Remember those that end with this connection."""
        self.ephemeral.update(record.uuid for record in records if record.spec.ephemeral)

    async def keep(self, uuid: str) -> VmRecord:
        """Make it outlive this process."""
        record = await self.host.vms.keep(uuid)
        self.ephemeral.discard(uuid)
        return record

    async def delete(self, uuid: str) -> None:
        """Delete it whatever its state; one that is gone already is fine."""
        self.ephemeral.discard(uuid)
        try:
            await self.host.vms.delete(uuid, force=True)
        except NotFound:
            pass

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            await asyncio.gather(*(self.delete(uuid) for uuid in tuple(self.ephemeral)), return_exceptions=True)
        finally:
            await self.host.close()


def has_agent(host: Host, record: VmRecord) -> bool:
    """Whether posada's agent runs in the guest: its image has it and boots by its own kernel."""
    if record.image is None or record.spec.boot.kernel is not None or record.spec.boot.initrd is not None:
        return False
    image = host.images.resolve(record.image)
    return image is not None and image.agent


async def open_core(url: str | None = None, *, home: Path | None = None, runtime: Path | None = None) -> Core:
    """Open this host's state. Raises StateError, HostError; Unsupported for a URL."""
    if url is not None and url not in ("local", "local:"):
        raise Unsupported(
            "local", f"remote hosts such as {url!r} yet", hint="leave the URL out: posada.connect()"
        )
    from posada.host.host import Host

    return Core(await Host.open(home, runtime))


@dataclass
class _Shared:
    """The connection that `posada.run` and `posada.create` use in one event loop.

    It is held by an async generator that waits at its only yield: a loop closes its async generators when it ends
    (`loop.shutdown_asyncgens`), and that is the only hook there is for "the loop ends".
    """

    holder: AsyncGenerator[Core, None]
    opening: asyncio.Future[Core]

    @property
    def usable(self) -> bool:
        if not self.opening.done():
            return True
        return not self.opening.cancelled() and self.opening.exception() is None and not self.opening.result().closed


_shared: dict[tuple[asyncio.AbstractEventLoop, Path], _Shared] = {}


async def _hold(key: tuple[asyncio.AbstractEventLoop, Path]) -> AsyncGenerator[Core, None]:
    core = await open_core()
    try:
        yield core
    finally:
        _shared.pop(key, None)
        await core.close()


async def shared_core() -> Core:
    """This loop's connection to the default state directory, opened at the first call, closed when the loop ends."""
    from posada.host.paths import Paths

    key = (asyncio.get_running_loop(), Paths.default().home)
    shared = _shared.get(key)
    if shared is None or not shared.usable:
        holder = _hold(key)
        shared = _shared[key] = _Shared(holder, asyncio.ensure_future(_first(holder)))
    return await asyncio.shield(shared.opening)


async def _first(holder: AsyncGenerator[Core, None]) -> Core:
    return await anext(holder)
