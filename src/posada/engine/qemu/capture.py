"""Capture: memory, devices and disks of a running machine, from one pause.

Order inside the pause: stop, devices, memory, disks, devices again, continue. The devices are saved a second time because a
stopped QEMU still takes what clients write to the agent's ports and puts it into the guest's buffers: if the two saves
differ, the memory that was copied in between may belong to neither, and both are done again. The stream ends by itself:
a stopped guest makes no new buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from posada.engine.base import Capture, CaptureFailed, NewLayer
from posada.engine.common.uncut import beside, in_thread, uncut
from posada.engine.qemu import ram
from posada.engine.qemu.disks import Switch
from posada.engine.qemu.files import reopen
from posada.engine.qemu.machine import Machine
from posada.engine.qemu.mirror import Mirror
from posada.engine.qemu.qmp import Session
from posada.errors import EngineError, PosadaError
from posada.model.records import Running

MEMORY, DEVICES = "memory", "devices"
#: Device state is 0.1 MB; more than this is not one.
DEVICES_MAX = 64 << 20
_ROUNDS = 5


class Source:
    """A machine that is being captured. Use as: `prepare`, `freeze`, then read ``memory`` and ``devices``; `close`."""

    def __init__(self, machine: Machine, session: Session, layers: Sequence[NewLayer]) -> None:
        self.machine, self.layout = machine, machine.layout
        self._session = session
        self.switch = Switch(session, self.layout, layers)
        self.pause = 0.0
        self._fdset = -1
        self._stack = contextlib.ExitStack()
        with self._stack as stack:
            size = self.layout.memory
            self.memory = self._own(ram.create(size))
            self.devices = self._own(os.memfd_create("posada-devices", os.MFD_CLOEXEC))
            self._writer = self._own(reopen(self.devices, os.O_WRONLY))
            self._mirror = Mirror(machine.process.pid, self.memory, size)
            stack.callback(self._mirror.close)
            self._stack = stack.pop_all()

    def _own(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    async def forget(self) -> None:
        """Have QEMU close its end of ``devices``: it keeps what it was given as long as anybody is connected."""
        if self._fdset >= 0:
            with contextlib.suppress(EngineError):
                await uncut(self._session.execute("remove-fd", fdset_id=self._fdset))

    def close(self) -> None:
        self._stack.close()

    async def prepare(self) -> None:
        """While the machine runs: open the new layers, copy what is likely not to change, so that the pause is short.

        On failure nothing has changed.
        """
        self._fdset = await self._session.add_fd(self._writer)
        try:
            await beside(in_thread(self._mirror.prepare), self.switch.prepare())
        except BaseException:
            await self.switch.undo()
            raise

    async def freeze(self) -> None:
        """The pause, which cancellation does not cut: it is short, and half of it is of no use to anybody.

        The machine runs again afterwards if it ran before, whatever happens. Raises EngineError, HostError;
        ``switch.switched`` tells whether the disks were switched.
        """
        await uncut(self._freeze())

    async def seal(self) -> None:
        """Fix the copy for good. Before anybody runs on it."""
        await in_thread(self._seal)

    async def _freeze(self) -> None:
        ran = bool((await self._session.execute("query-status"))["running"])
        began = time.monotonic()
        try:
            await self._session.execute("stop")
            await self._save()
        finally:
            if ran:
                await self._session.execute("cont")
            self.pause = time.monotonic() - began
            await self.switch.undo()

    def _seal(self) -> None:
        self._mirror.close()
        ram.seal(self.memory)

    async def _save(self) -> None:
        before = await self._save_devices()
        for _ in range(_ROUNDS):
            await beside(in_thread(self._mirror.copy), self.switch.commit())
            after = await self._save_devices()
            if after == before:
                return
            before = after
        raise EngineError("the machine's devices do not come to rest", hint="try again when less is sent to the guest")

    async def _save_devices(self) -> bytes:
        os.ftruncate(self.devices, 0)
        os.lseek(self._writer, 0, os.SEEK_SET)  # QEMU's descriptor is a duplicate: it shares the offset
        # live=false: the disks stay ours (they are not inactivated).
        arguments = {"filename": f"/dev/fdset/{self._fdset}", "live": False}
        await self._session.execute("xen-save-devices-state", timeout=60, **arguments)
        return os.pread(self.devices, DEVICES_MAX, 0)


@contextlib.asynccontextmanager
async def source(running: Running, layers: Sequence[NewLayer]) -> AsyncIterator[Source]:
    """A machine about to be captured. Failures inside come out as CaptureFailed, which says what was switched."""
    machine = Machine(running)
    async with machine.session() as session:
        found = Source(machine, session, layers)
        try:
            yield found
        except (PosadaError, OSError) as error:
            raise CaptureFailed(str(error), switched=found.switch.switched) from error
        except asyncio.CancelledError as error:
            if not found.switch.switched:
                raise
            raise CaptureFailed("cancelled", switched=found.switch.switched) from error
        finally:
            await found.forget()
            found.close()


async def capture(running: Running, target: Path, layers: Sequence[NewLayer]) -> Capture:
    """See `Capturer.capture`. Memory and devices are written to ``target`` after the machine runs again."""
    async with source(running, layers) as frozen:
        await frozen.prepare()
        await frozen.freeze()
        await frozen.seal()
        written = await in_thread(_store, frozen, target)
        private = {"layout": msgspec.to_builtins(frozen.layout)}
        return Capture(pause=frozen.pause, memory_bytes=written, private=private)


def _store(frozen: Source, target: Path) -> int:
    """Durable when it returns. Raises HostError (no space)."""
    written = ram.save(frozen.memory, target / MEMORY, frozen.layout.memory)
    ram.save(frozen.devices, target / DEVICES, os.fstat(frozen.devices).st_size)
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return written


async def switch(running: Running, layers: Sequence[NewLayer]) -> float:
    """See `Capturer.switch`."""
    machine = Machine(running)
    async with machine.session() as session:
        change = Switch(session, machine.layout, layers)
        try:
            await change.prepare()
            return await uncut(_switch(session, change))
        except (PosadaError, OSError) as error:
            raise CaptureFailed(str(error), switched=change.switched) from error


async def _switch(session: Session, change: Switch) -> float:
    ran = bool((await session.execute("query-status"))["running"])
    began = time.monotonic()
    try:
        await session.execute("stop")
        await change.commit()
    finally:
        if ran:
            await session.execute("cont")
        await change.undo()
    return time.monotonic() - began
