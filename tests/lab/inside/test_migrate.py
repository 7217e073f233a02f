"""A running Debian moves from one monitor to another with its disk, which it goes on writing to, in their real jails."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from posada.engine.common import process
from posada.engine.common.identity import jail_uid
from posada.engine.common.running import new_cid
from posada.engine.kvm import config, machine
from posada.engine.kvm.control import connect
from posada.engine.kvm.files import Descriptors, channels
from posada.engine.kvm.spawn import Newborn, inherit
from posada.errors import EngineError, PosadaError
from posada.guest.client import GuestClient
from posada.host.host import Host
from posada.host.launch import build_launch
from posada.model.machine import make_spec
from posada.model.records import Running, VmRecord
from posada.proto.monitor import Op

NAME = "mover"
#: It writes all the time: to its memory, and through that to its disk.
WRITER = "i=0; while :; do i=$((i+1)); echo $i >> /root/count; [ $((i % 50)) = 0 ] && sync -d /root/count; done"


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = await Host.open()
    spec = make_spec(
        image="debian:12",
        engine="kvm",
        name=NAME,
        memory="256MiB",
        nics=[],
        boot={"append": "mitigations=off norandmaps"},
    )
    await host.vms.create(spec)
    try:
        await host.vms.start(NAME)
        await host.vms.wait_ready(NAME, timeout=120)
        yield host
    finally:
        await host.vms.delete(NAME, force=True)
        await host.close()


class Destination:
    """A monitor that waits for ``vm``, on the same files."""

    def __init__(self, host: Host, vm: VmRecord, place: Path) -> None:
        launch = build_launch(host.vms._house, vm, boot=False)
        self.launch = msgspec.structs.replace(launch, runtime=place, log=place / "console.log")
        self.sock, theirs = socket.socketpair()
        with Descriptors(self.launch, ()) as files:
            stream = files.add(theirs.detach())
            document = config.boot(self.launch, files.inherited, cid=new_cid(), uid=jail_uid(vm.uuid))
            self.newborn: Newborn = inherit(dataclasses.replace(document, incoming=stream), files)

    async def take(self, source: Running) -> Mapping[str, Any]:
        """Ask the source to send its machine here."""
        pagemap = os.open(f"/proc/{source.process.pid}/pagemap", os.O_RDONLY)
        try:
            async with connect(Path(source.runtime)) as session:
                args = {"fd": 0, "pause": 0.3, "pagemap": 1}
                return await session.call(Op.MIGRATE, args, fds=[self.sock.fileno(), pagemap], timeout=120)
        finally:
            os.close(pagemap)
            self.sock.close()


async def sh(client: GuestClient, script: str) -> str:
    done = await client.run(["sh", "-c", script])
    assert done.exit_code == 0, done
    return done.stdout.strip()


async def grows(client: GuestClient) -> bool:
    first = int(await sh(client, "tail -n1 /root/count"))
    async with asyncio.timeout(30):
        while int(await sh(client, "tail -n1 /root/count")) <= first:
            pass
    return True


async def test_debian_moves_with_its_disk_while_it_writes(host: Host) -> None:
    vm = host.vms.get(NAME)
    assert vm.running is not None
    guest = await host.vms.guest(NAME)
    digest = await sh(guest, "head -c 30000000 /dev/urandom > /root/big; sha256sum < /root/big")
    await sh(guest, f"({WRITER}) > /dev/null 2>&1 &")
    assert await grows(guest)
    with tempfile.TemporaryDirectory(prefix="pm-") as scratch:
        destination = Destination(host, vm, Path(scratch))
        moved = await destination.take(vm.running)
        there = await machine.settle(destination.launch, destination.newborn, ())
        try:
            print(f"pause {moved['pause'] * 1000:.0f} ms, {moved['bytes'] >> 20} MiB, {moved['rounds']} rounds")  # noqa: T201
            async with await GuestClient.connect(channels(Path(scratch)), timeout=60, alive=lambda: True) as client:
                assert await grows(client)
                await sh(client, "echo 3 > /proc/sys/vm/drop_caches")
                assert await sh(client, "sha256sum < /root/big") == digest
                async with connect(Path(vm.running.runtime)) as session:
                    with pytest.raises(PosadaError, match="writes to the disk"):
                        await session.call(Op.RESUME)
                    with pytest.raises(EngineError, match="another monitor's"):
                        await session.call(Op.FORK, {"layers": []})
                await sh(client, "sync")
                assert await sh(client, "dmesg | grep -ciE 'I/O error|EXT4-fs error' || true") == "0"
        finally:
            await machine.kill(there.process, Path(scratch))
        top = destination.launch.disks[0].chain[-1][0]
        words = ["qemu-img", "check", "-f", "qcow2", str(top)]
        checked = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False)
        assert checked.returncode in (0, 3), checked.stdout + checked.stderr


async def test_a_destination_that_is_killed_leaves_the_machine_where_it_was(host: Host) -> None:
    vm = host.vms.get(NAME)
    assert vm.running is not None
    await sh(await host.vms.guest(NAME), f"({WRITER}) > /dev/null 2>&1 &")
    with tempfile.TemporaryDirectory(prefix="pm-") as scratch:
        destination = Destination(host, vm, Path(scratch))
        found = await destination.newborn.named()
        assert found is not None
        asked = asyncio.ensure_future(destination.take(vm.running))
        await asyncio.sleep(0)
        process.send(found, signal.SIGKILL)
        with pytest.raises(PosadaError):
            await asked
        await destination.newborn.abandon()
    assert not machine.status_of(vm.running.process, Path(vm.running.runtime)).paused
    assert await grows(await host.vms.guest(NAME))
    assert await sh(await host.vms.guest(NAME), "sync && dmesg | grep -ciE 'I/O error' || true") == "0"
