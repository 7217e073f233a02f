"""What a contract test works with."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # host_kit is there

from posada.errors import GuestError
from posada.host.host import Host
from posada.model.exec import ExecResult
from posada.model.machine import MachineSpec, make_spec
from posada.model.records import VmRecord

IMAGE = "debian:12"
MASTER = "master"


@dataclass
class Inn:
    """What a test works with: an open host, and short ways to do and to see things."""

    host: Host
    engine: str
    base: Path

    def __post_init__(self) -> None:
        self.vms = self.host.vms

    def spec(self, **fields: Any) -> MachineSpec:
        return make_spec({"image": IMAGE, "engine": self.engine, "memory": "256MiB", **fields})

    async def boot(self, name: str = "one", **fields: Any) -> VmRecord:
        """A new machine, ready."""
        await self.vms.create(self.spec(name=name, **fields))
        await self.vms.start(name)
        await self.vms.wait_ready(name, timeout=120)
        return self.vms.get(name)

    async def machine(self, name: str = "one") -> VmRecord:
        """A running machine, ready; a fork of the master where booting takes long."""
        if self.engine == "fake":
            return await self.boot(name)
        return (await self.vms.fork(MASTER, 1, names=[name]))[0]

    async def sh(self, ref: str, *argv: str) -> ExecResult:
        return await self.vms.run(ref, argv)

    async def put(self, ref: str, path: str, text: str) -> None:
        await (await self.vms.guest(ref)).write_file(path, text, mkdir=True)

    async def see(self, ref: str, path: str) -> str | None:
        """A file's text; None when there is none."""
        try:
            return (await (await self.vms.guest(ref)).read_file(path)).decode()
        except GuestError as error:
            if error.errno_name == "ENOENT":
                return None
            raise

    async def until(self, condition: Callable[[], object], timeout: float = 20.0) -> None:
        """Wait until ``condition()`` is true; for what other processes do, and tell nobody of."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the condition did not become true")
            await asyncio.sleep(0.02)


#: One file in the guest's memory, one on its disk.
RAM, DISK = "/dev/shm/note", "/root/note"
