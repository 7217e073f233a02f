"""The machines of one host."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from posada.client._async.vm import VM
from posada.client._core import Core
from posada.client._fields import SpecFields, build_spec
from posada.client._pending import pending
from posada.client._runtime import AsyncRuntime
from posada.model.machine import MachineSpec

if TYPE_CHECKING:
    from posada.model.progress import Progress


class Vms:
    """``host.vms``: list, find and make machines."""

    def __init__(self, rt: AsyncRuntime, core: Core) -> None:
        self._rt = rt
        self._core = core

    async def list(self, *, labels: Mapping[str, str] | None = None) -> builtins.list[VM]:
        """All machines, or those that carry all of these labels, by name."""
        records = self._rt.now(self._core.host.vms.list, labels=labels or {})
        return [VM(self._rt, self._core, record) for record in records]

    @pending
    async def get(self, ref: str) -> VM:
        """The machine of that name, uuid, or unique uuid prefix (4 characters or more). Raises NotFound."""
        return VM(self._rt, self._core, self._rt.now(self._core.host.vms.get, ref))

    @pending
    async def run(
        self,
        image: str | None = None,
        *,
        spec: MachineSpec | Mapping[str, Any] | None = None,
        keep: bool = False,
        timeout: float | None = 60,
        progress: Progress | None = None,
        **fields: Unpack[SpecFields],
    ) -> VM:
        """As `posada.aio.run`, on this host."""
        wanted = build_spec(image, spec, {"ephemeral": not keep, **fields})
        record = await self._rt.run(self._core.launch(wanted, progress=progress, timeout=timeout))
        return VM(self._rt, self._core, record, owned=True)

    @pending
    async def create(
        self,
        image: str | None = None,
        *,
        spec: MachineSpec | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **fields: Unpack[SpecFields],
    ) -> VM:
        """As `posada.aio.create`, on this host."""
        record = await self._rt.run(self._core.create(build_spec(image, spec, fields), progress=progress))
        return VM(self._rt, self._core, record, owned=True)
