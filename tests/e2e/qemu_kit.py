"""Machines of the qemu engine without a host above it: launches, overlays, agents; and nothing left afterwards."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posada.engine.base import DiskFile, Launch, NewLayer, SnapshotFiles
from posada.engine.common import process
from posada.engine.qemu import cgroups
from posada.engine.qemu.engine import QemuEngine
from posada.guest.client import GuestClient
from posada.host.host import Host
from posada.model.exec import IdentityReset
from posada.model.machine import make_spec
from posada.model.records import Running
from posada.storage.qcow2 import create_overlay

Chain = tuple[tuple[Path, str], ...]
ROOT = "root"
APPEND = (
    "console=ttyS0 quiet mitigations=off posada.root=/dev/vda posada.rootfs=ext4 posada.rw=1 posada.hostname=source "
    "posada.net=10.0.2.15/24 posada.gw=10.0.2.2 posada.dns=10.0.2.3"
)


class Box:
    """One machine of a test, and the chain its root disk stands on."""

    def __init__(self, running: Running, launch: Launch, chain: Chain) -> None:
        self.running, self.launch, self.chain = running, launch, chain


class Kit:
    """Makes machines in a directory of its own. `close` ends what is left, and returns what should not be there."""

    def __init__(self, engine: QemuEngine, disk: Path, kernel: Path, initrd: Path) -> None:
        self.engine, self.disk, self.kernel, self.initrd = engine, disk, kernel, initrd
        self.folder = Path(tempfile.mkdtemp(prefix="posada-qemu-"))
        self.size = disk.stat().st_size
        self.boxes: list[Box] = []

    @classmethod
    async def open(cls, home: Path, runtime: Path, image: str) -> Kit:
        async with await Host.open(home, runtime) as host:
            record = host.house.images.resolve(image)
            assert record is not None
            assert record.kernel is not None
            assert record.disk is not None
            folder = host.house.images.folder(record)
            initrd = host.house.images.initrd_for(record)
            assert initrd is not None
        return cls(QemuEngine(runtime), folder / record.disk, folder / record.kernel, initrd)

    def overlay(self, below: Chain, name: str = "layer") -> Path:
        path = self.folder / f"{name}-{secrets.token_hex(4)}.qcow2"
        create_overlay(path, size=self.size, backing=below[-1][0], backing_format=below[-1][1])
        return path

    def disk_file(self, chain: Chain, name: str = ROOT) -> DiskFile:
        return DiskFile(name=name, size=self.size, chain=chain)

    def launch(self, chain: Chain, *more: DiskFile, boot: bool = False, **spec: Any) -> Launch:
        name = f"m{secrets.token_hex(3)}"
        runtime = self.folder / str(uuid.uuid4())
        runtime.mkdir(mode=0o700)
        return Launch(
            uuid=runtime.name,
            name=name,
            spec=make_spec(image="x", **{"memory": "256MiB", **spec}),
            runtime=runtime,
            log=self.folder / f"{name}.log",
            disks=(*((self.disk_file(chain),) if chain else ()), *more),
            macs=("52:54:00:12:34:56",),
            kernel=self.kernel if boot else None,
            initrd=self.initrd if boot else None,
            append=APPEND if boot else "",
            agent=True,
            owner=process.find(os.getpid()),
            generation_id=str(uuid.uuid4()),
        )

    def child_launch(self, source: Box, chain: Chain | None = None, *more: DiskFile, **spec: Any) -> Launch:
        """A launch with an overlay of its own on the source's chain, with the source's spec."""
        below = chain or source.chain
        same = {
            "memory": source.launch.spec.memory,
            "cpus": source.launch.spec.cpus,
            "ports": [p.guest for p in source.launch.spec.ports],
        }
        return self.launch((*below, (self.overlay(below, "child"), "qcow2")), *more, **{**same, **spec})

    async def boot(self, **spec: Any) -> Box:
        base: Chain = ((self.disk, "raw"),)
        chain: Chain = (*base, (self.overlay(base, "boot"), "qcow2"))
        launch = self.launch(chain, boot=True, **spec)
        return self.keep(await self.engine.start(launch), launch, chain)

    def keep(self, running: Running, launch: Launch, chain: Chain) -> Box:
        self.boxes.append(Box(running, launch, chain))
        return self.boxes[-1]

    async def fork(self, source: Box, count: int = 1, more: Sequence[DiskFile] = (), **spec: Any) -> list[Box]:
        """Children, their processes running: the source prepared if its agent can be asked."""
        launches = [self.child_launch(source, None, *more, **spec) for _ in range(count)]
        layer = self.overlay(source.chain, "source")
        forked = await self.engine.fork(source.running, launches, [NewLayer(disk=ROOT, path=layer)])
        source.chain = (*source.chain, (layer, "qcow2"))
        made = []
        for launch, outcome in zip(launches, forked.children, strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            made.append(self.keep(outcome, launch, launch.disks[0].chain))
        return made

    async def capture(self, source: Box, name: str) -> tuple[SnapshotFiles, Chain]:
        target = self.folder / name
        target.mkdir()
        layer = self.overlay(source.chain, "source")
        capture = await self.engine.capture(source.running, target, [NewLayer(disk=ROOT, path=layer)])
        frozen = source.chain
        source.chain = (*source.chain, (layer, "qcow2"))
        memory = source.launch.spec.memory
        return SnapshotFiles(path=target, memory=memory, private=capture.private), frozen

    async def restore(self, snapshot: SnapshotFiles, chain: Chain, **options: Any) -> Box:
        launch = self.launch((*chain, (self.overlay(chain, "restored"), "qcow2")))
        (outcome,) = await self.engine.restore([launch], snapshot, **options)
        if isinstance(outcome, Exception):
            raise outcome
        return self.keep(outcome, launch, launch.disks[0].chain)

    async def client(self, box: Box) -> GuestClient:
        def alive() -> bool:
            return self.engine.status(box.running).alive

        return await GuestClient.connect(self.engine.agent_channels(box.running), timeout=60, alive=alive)

    async def sh(self, box: Box, script: str) -> str:
        """Output of a shell in the guest, which must succeed."""
        async with await self.client(box) as client:
            result = await client.run(["sh", "-c", script], timeout=60, check=True)
            return result.stdout

    async def renew(self, box: Box, token: bytes | None = None) -> None:
        """identity.reset, as the host does it."""
        async with await self.client(box) as client:
            await client.identity_reset(
                IdentityReset(
                    generation=1,
                    hostname=box.launch.name,
                    machine_id=uuid.uuid4().hex,
                    entropy=secrets.token_bytes(64),
                    time_ns=time.time_ns(),
                    token=token,
                    ssh_host_keys=False,
                )
            )

    async def end(self, box: Box) -> None:
        await self.engine.kill(box.running)
        self.boxes.remove(box)
        self.engine.reap(box.launch.runtime)
        left = [str(p) for p in box.launch.runtime.iterdir()]
        left += [str(p) for p in cgroups.directories(box.launch.uuid) if p.exists()]
        keeper = box.running.keeper
        left += [f"keeper {keeper.pid}"] if keeper is not None and process.alive(keeper) else []
        assert not left, f"left behind: {left}"

    async def close(self) -> None:
        await asyncio.gather(*(self.end(box) for box in list(self.boxes)))
        shutil.rmtree(self.folder)
