"""Connections to the guests' agents: one per vm and process, kept, so that a command costs no handshake."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from posada.errors import GuestGone, Timeout, Unsupported
from posada.model.records import Running, VmRecord

if TYPE_CHECKING:
    from posada.guest.client import GuestClient
    from posada.host.house import House

#: Bytes of console that an error about a dead guest carries.
TAIL = 2000
#: Seconds for a machine to end after its channels closed.
ENDING = 2.0


class Guests:
    """The pool of one house."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._clients: dict[str, tuple[Running, GuestClient]] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._attending: dict[str, asyncio.Task[None]] = {}

    async def connect(self, vm: VmRecord, *, timeout: float | None = 30.0) -> GuestClient:
        """The connection to the agent of a running vm; made now if there is none, or it broke.

        Raises Unsupported (a guest without agent), GuestGone with the console's tail (the machine ended), Timeout.
        """
        from posada.guest.client import GuestClient

        if not self._house.has_agent(vm):
            raise Unsupported(
                vm.engine,
                f"commands in {vm.name!r}: its guest has no posada agent",
                hint="use an image that posada built",
            )
        running = self._house.running(vm)
        async with self._connecting.setdefault(vm.uuid, asyncio.Lock()):
            known = self._clients.get(vm.uuid)
            if known is not None and known[0].process == running.process and not known[1].gone:
                return known[1]
            await self.drop(vm.uuid)
            engine = self._house.engine(vm.engine)
            try:
                client = await GuestClient.connect(
                    engine.agent_channels(running), timeout=timeout, alive=lambda: engine.status(running).alive
                )
            except GuestGone as error:
                status = engine.status(running)
                if status.alive:
                    raise
                raise self.gone(vm, status.ended) from error
            self._clients[vm.uuid] = (running, client)
            if vm.spec.limits.idle is not None:
                work = self._attend(vm.uuid, client, min(vm.spec.limits.idle / 3, 10.0))
                self._attending[vm.uuid] = asyncio.create_task(work, name=f"attend {vm.name}")
            return client

    async def _attend(self, uuid: str, client: GuestClient, interval: float) -> None:
        """A machine in which a command runs or a copy goes on is not idle, however long it takes."""
        while not client.gone:
            if client.busy:
                self._house.touch(uuid)
            await asyncio.sleep(interval)

    def gone(self, vm: VmRecord, ended: str | None) -> GuestGone:
        """The error that says how a machine ended and what it said last."""
        tail = console_tail(self._house.paths.log(vm.uuid))
        text = f"vm {vm.name!r} ended: {ended or 'its process is gone'}"
        return GuestGone(f"{text}; the console's last lines:\n{tail}" if tail else text, hint=f"posada logs {vm.name}")

    async def explain(self, vm: VmRecord, error: GuestGone) -> GuestGone:
        """``error``, or how the machine ended if that is why: its sockets close some time before it has ended."""
        if vm.running is None:
            return self.gone(vm, vm.exit) if vm.exit else error
        try:
            status = await self._house.engine(vm.engine).wait(vm.running, ENDING)
        except Timeout:
            return error
        return self.gone(vm, status.ended)

    async def drop(self, uuid: str) -> None:
        """Close the connection, if there is one."""
        attending = self._attending.pop(uuid, None)
        if attending is not None:
            attending.cancel()
        known = self._clients.pop(uuid, None)
        if known is not None:
            with contextlib.suppress(Exception):
                await known[1].close()

    def forget(self, uuid: str) -> None:
        """As `drop`, from where one cannot wait: the machine is gone."""
        if uuid in self._clients:
            self._house.spawn(self.drop(uuid), f"drop {uuid}")

    async def close(self) -> None:
        await asyncio.gather(*(self.drop(uuid) for uuid in list(self._clients)))


def console_tail(log: os.PathLike[str], size: int = TAIL) -> str:
    """The last lines of a console log; text only."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            text = file.read(size).decode("utf-8", "replace")
    except OSError:
        return ""
    clean = "".join(c for c in text if c == "\n" or c == "\t" or c.isprintable())
    return "\n".join(clean.splitlines()[-20:]).strip()
