"""A point of a machine to return to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posada.client._core import Core
from posada.client._pending import pending
from posada.client._runtime import AsyncRuntime
from posada.model.records import SnapshotKind, SnapshotRecord

if TYPE_CHECKING:
    from posada.client._async.vm import VM
    from posada.model.progress import Progress


class Snapshot:
    """Made by `VM.snapshot`, found in `VM.snapshots`. Snapshots of one machine form a tree (``parent``)."""

    def __init__(self, rt: AsyncRuntime, core: Core, record: SnapshotRecord) -> None:
        self._rt = rt
        self._core = core
        self.record = record
        """The whole record. It never changes."""

    def __repr__(self) -> str:
        return f"<posada.Snapshot {self.name!r} {self.kind}>"

    @property
    def id(self) -> str:
        """Unique on the host."""
        return self.record.id

    @property
    def name(self) -> str:
        """Unique in its machine."""
        return self.record.name

    @property
    def kind(self) -> SnapshotKind:
        """``full`` (memory, devices, disks) or ``disks``."""
        return self.record.kind

    @property
    def parent(self) -> str | None:
        """The id of the snapshot the machine descended from when this one was taken."""
        return self.record.parent

    @property
    def created(self) -> float:
        """When, in seconds since the epoch."""
        return self.record.created

    @property
    def pause(self) -> float:
        """How long the machine stood still for it, in seconds."""
        return self.record.pause

    @pending
    async def vm(self) -> VM:
        """The machine it is a snapshot of."""
        from posada.client._async.vm import VM

        return VM(self._rt, self._core, self._rt.now(self._core.host.vms.get, self.record.vm))

    async def restore(self, *, progress: Progress | None = None) -> None:
        """Return its machine to this point, in place."""
        await (await self.vm()).restore(self, progress=progress)

    async def fork(
        self, n: int = 1, *, names: Sequence[str] | None = None, progress: Progress | None = None
    ) -> list[VM]:
        """``n`` new running machines from this point. As `VM.fork`."""
        return await (await self.vm()).fork(n, snapshot=self, names=names, progress=progress)

    @pending
    async def clone(self, name: str | None = None) -> VM:
        """A new machine, off, with the disks of this point."""
        return await (await self.vm()).clone(name, snapshot=self)

    async def delete(self, *, recursive: bool = False) -> None:
        """Delete it; with ``recursive`` also all that descend from it. Raises InUse, which names what depends on it."""
        vms = self._core.host.vms
        await self._rt.run(vms.delete_snapshot(self.record.vm, self.id, recursive=recursive))
