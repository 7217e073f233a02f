"""What the client's objects share: one open host, and the ephemeral machines that were made through it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posada.errors import NotFound, Unsupported
from posada.model.machine import MachineSpec
from posada.model.progress import quiet

if TYPE_CHECKING:
    from posada.host.host import Host
    from posada.model.capabilities import Capabilities
    from posada.model.progress import Progress
    from posada.model.records import VmRecord


class Core:
    """An open host. Closing it ends the ephemeral machines made through it; all others live on."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.ephemeral: set[str] = set()
        self._holder = asyncio.create_task(self._hold(), name="posada-connection")

    async def launch(self, spec: MachineSpec, *, progress: Progress | None, timeout: float | None) -> VmRecord:
        """Create, start, wait until ready. On failure or cancellation nothing is left of it.

        ``timeout`` bounds the wait for ready, in seconds.
        """
        report = progress or quiet
        record = await self.create(spec, progress=report)
        try:
            record = await self.host.vms.start(record.uuid, progress=report)
            if self.host.house.has_agent(record):
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

    @property
    def closed(self) -> bool:
        return self._holder.done()

    async def _hold(self) -> None:
        """Wait for nothing, then close it.

        Loops cancel their tasks when they end (`asyncio.run` does), and that is the only hook there is for "the loop
        ends and nobody has closed it".
        """
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            try:
                await asyncio.gather(*(self.delete(uuid) for uuid in tuple(self.ephemeral)), return_exceptions=True)
            finally:
                await self.host.close()

    async def close(self) -> None:
        """Idempotent."""
        self._holder.cancel()
        await asyncio.wait([self._holder])
        if not self._holder.cancelled():
            self._holder.result()


async def open_core(url: str | None = None, *, home: Path | None = None, runtime: Path | None = None) -> Core:
    """Open this host's state. Raises StateError, HostError; Unsupported for a URL."""
    if url is not None and url not in ("local", "local:"):
        raise Unsupported(
            "local", f"remote hosts such as {url!r} yet", hint="leave the URL out: posada.connect()"
        )
    from posada.host.host import Host

    core = Core(await Host.open(home, runtime))
    await asyncio.sleep(0)  # its holder must have begun: a task that is cancelled before that does not run at all
    return core


def engine_capabilities(name: str | None) -> Capabilities:
    """What an engine can do on this host; None: the one that is chosen."""
    from posada.engine.registry import choose, load

    return (choose(MachineSpec()) if name is None else load(name)).capabilities()


_shared: dict[tuple[asyncio.AbstractEventLoop, Path], asyncio.Task[Core]] = {}


async def shared_core() -> Core:
    """The connection to the default state directory that `posada.run` and `posada.create` use in this event loop."""
    from posada.host.paths import Paths

    key = (asyncio.get_running_loop(), Paths.default().home)
    opening = _shared.get(key)
    if opening is None or (opening.done() and not _usable(opening)):
        for old in [k for k in _shared if k[0].is_closed()]:
            del _shared[old]
        opening = _shared[key] = asyncio.create_task(open_core(), name="posada-open")
    return await asyncio.shield(opening)


def _usable(opening: asyncio.Task[Core]) -> bool:
    return not opening.cancelled() and opening.exception() is None and not opening.result().closed
