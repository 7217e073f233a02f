"""Machines that begin with another one's memory and devices: children of a fork, and restored ones.

QEMU takes 60 ms to come up, so it is started first, on a memory file that is still empty, and the file is filled behind its
back: it maps the file privately, so it sees what is written there until it writes to a page itself. That it has written
none yet is checked before the devices are loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from posada.engine.base import Launch
from posada.engine.common.running import new_cid, write_running
from posada.engine.common.uncut import uncut
from posada.engine.qemu import machine, pages, ports, qmp
from posada.engine.qemu.argv import build
from posada.engine.qemu.files import Descriptors, reopen
from posada.engine.qemu.layout import Layout
from posada.engine.qemu.probe import Facts
from posada.engine.qemu.spawn import Spawned, spawn
from posada.errors import EngineError, EngineGone, Unsupported
from posada.model.records import Running

#: Seconds for QEMU to load the devices of a machine; it takes 10 ms.
_LOAD_TIMEOUT = 30.0


def check_host(layout: Layout, facts: Facts) -> None:
    """Raise Unsupported if a machine saved elsewhere, or earlier, cannot go on here."""
    if layout.accelerator == "kvm" and facts.accelerator != "kvm":
        hint = "restore it on a host with hardware virtualisation, or clone its disks"
        raise Unsupported("qemu", f"a machine that was saved under KVM, on a host without it ({facts.kvm})", hint=hint)
    if machine.version_of(layout.machine) > machine.version_of(facts.machine):
        hint = "install that QEMU, or clone its disks"
        raise Unsupported("qemu", f"a machine that was saved by a newer QEMU ({layout.machine})", hint=hint)
    if layout.nested and not facts.nested:
        hint = "load kvm_amd or kvm_intel with nested=1"
        raise Unsupported("qemu", "a machine with nested virtualisation on a host without it", hint=hint)
    if layout.vsock and not facts.vsock:
        raise Unsupported("qemu", "a machine with vsock on a host without it", hint="modprobe vhost_vsock")


class Newborn:
    """One machine on its way: `open`, then `load` once memory and devices are there, then `finish` or `abandon`."""

    def __init__(self, launch: Launch, layout: Layout, facts: Facts) -> None:
        self.launch, self.layout = launch, layout
        self._facts = facts
        self._cid = new_cid() if layout.vsock else 0
        self._spawned: Spawned | None = None
        self._stack = contextlib.AsyncExitStack()
        self._session: qmp.Session | None = None
        self._state_uri = ""

    async def open(self, memory: int, state: int | Path) -> None:
        """Start QEMU on the memory file, its vcpus and devices waiting for ``state``. On failure nothing is left.

        ``state`` may be filled later; the same descriptor or path serves any number of machines.
        """
        try:
            ports.check_free(self.launch.spec.ports)
            facts = self._facts
            invocation = build(
                self.launch,
                self.layout,
                binary=facts.binary,
                incoming=True,
                file_uri=facts.file_uri,
                cid=self._cid,
            )
            self._state_uri = invocation.state_uri
            with Descriptors() as files:
                files.give("ram", reopen(memory, os.O_RDWR))
                path = f"/proc/self/fd/{state}" if isinstance(state, int) else state
                files.give("state", os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                self._spawned = await spawn(self.launch, invocation, files, self.layout.accelerator)
            try:
                connection = qmp.connect(self.launch.runtime / "qmp.sock")
                self._session = await self._stack.enter_async_context(connection)
            except EngineGone as error:
                raise await machine.explain(self._spawned, self.launch.runtime, error) from None
        except BaseException:
            await self.abandon()
            raise

    async def load(self, sealed: asyncio.Future[None], *, paused: bool) -> Running:
        """Load the devices, run, record. The memory file is filled. On failure nothing is left.

        ``sealed``: done when nobody can change the memory file any more. Until then the machine only loads: its balloon
        could punch holes into what others map.
        """
        spawned, session = self._spawned, self._session
        if spawned is None or session is None:
            raise EngineError("the machine was not opened")
        try:
            written = sum(length for _, _, length in pages.private(spawned.process.pid))
            if written:
                raise EngineError(f"QEMU wrote {written} bytes of guest memory before it was given any")
            await session.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            await session.execute("migrate-incoming", uri=self._state_uri)
            await self._loaded(session)
            await asyncio.shield(sealed)
            if not paused:
                await session.execute("cont")
            running = await machine.record(session, spawned, self.launch, self.layout, cid=self._cid)
            if paused:
                (self.launch.runtime / "paused").touch(0o600)
            await self._stack.aclose()
            write_running(self.launch.runtime, running)
            spawned.commit()
        except EngineGone as error:
            failure = await machine.explain(spawned, self.launch.runtime, error)
            await self.abandon()
            raise failure from None
        except BaseException:
            await self.abandon()
            raise
        return running

    async def _loaded(self, session: qmp.Session) -> None:
        try:
            while True:
                event = await session.next_event("MIGRATION", timeout=_LOAD_TIMEOUT)
                status = event["data"]["status"]
                if status == "completed":
                    return
                if status == "failed":
                    raise EngineGone("QEMU could not load the saved devices")
        except TimeoutError:
            raise EngineError(f"QEMU did not load the saved devices within {_LOAD_TIMEOUT:g} s") from None

    async def abandon(self) -> None:
        """End it; nothing of it is left."""
        await self._stack.aclose()
        if self._spawned is not None:
            await self._spawned.abandon()


async def open_all(newborns: list[Newborn], memory: int, state: int | Path) -> list[BaseException | None]:
    """Open them together. The outcome of each, in order."""
    return await asyncio.gather(*(n.open(memory, state) for n in newborns), return_exceptions=True)


async def load_all(
    newborns: list[Newborn], opened: list[BaseException | None], seal: Coroutine[Any, Any, None], *, paused: bool
) -> list[Running | Exception]:
    """Load those that opened, together, while ``seal`` is awaited. The outcome of each, in order."""
    alive = [n for n, error in zip(newborns, opened, strict=True) if error is None]
    sealed = asyncio.ensure_future(seal)
    try:
        results = await asyncio.gather(*(n.load(sealed, paused=paused) for n in alive), return_exceptions=True)
    finally:
        with contextlib.suppress(Exception):  # the loads have it
            await uncut(sealed)
    loaded = iter(results)
    outcomes: list[Running | Exception] = []
    for error in opened:
        outcome = next(loaded) if error is None else error
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            raise outcome
        outcomes.append(outcome)
    return outcomes
