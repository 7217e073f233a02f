"""Where monitors of the kvm engine come from: one process for all that a process starts, gone with it, and not before."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from kvm_engine_kit import Kit, count, needs_kvm

from posada.engine.common import process
from posada.engine.kvm import spawn
from posada.engine.kvm.engine import KvmEngine
from posada.model.records import Running
from posada.vmm.nursery import MAX_FDS

pytestmark = [needs_kvm, pytest.mark.timeout(60)]


@asynccontextmanager
async def running(kit: Kit) -> AsyncIterator[Running]:
    engine = KvmEngine(kit.folder / "probe")
    launch = kit.launch()
    found = await engine.start(launch)
    try:
        yield found
    finally:
        await engine.kill(found)
        engine.reap(launch.runtime)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descriptors(pid: int) -> set[str]:
    return {os.readlink(entry).partition(":")[0] for entry in Path(f"/proc/{pid}/fd").iterdir()}


async def test_machines_share_one_that_keeps_nothing_of_theirs(kit: Kit) -> None:
    async with running(kit) as first, running(kit) as second:
        nursery = parent(first.process.pid)
        assert nursery == parent(second.process.pid)
        assert parent(nursery) != os.getpid(), "who starts machines has no children of them"
        assert descriptors(nursery) == {"/dev/null", "socket"}
        assert await count(Path(first.runtime), b"++") == 2
        assert await count(Path(second.runtime)) == 0


async def test_machines_outlive_it_and_the_next_one_has_another(kit: Kit) -> None:
    async with running(kit) as first:
        nursery = process.find(parent(first.process.pid))
        os.kill(nursery.pid, signal.SIGKILL)
        await process.ended(nursery, 10)
        assert await count(Path(first.runtime), b"+") == 1
        async with running(kit) as second:
            assert parent(second.process.pid) != nursery.pid
            assert await count(Path(second.runtime)) == 0


async def test_it_ends_when_it_is_let_go_of_and_its_machines_do_not(kit: Kit) -> None:
    async with running(kit) as first:
        nursery = process.find(parent(first.process.pid))
        spawn.forget()
        await process.ended(nursery, 10)
        assert not process.alive(nursery)
        assert await count(Path(first.runtime), b"+") == 1


def test_more_descriptors_than_fit_into_a_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(spawn._Nursery, "__init__", lambda self: setattr(self, "_sock", ours))
    with ours, theirs, open("/dev/null") as file:
        spawn._Nursery().ask([file.fileno()] * (2 * MAX_FDS + 1))
        packets = [socket.recv_fds(theirs, 1, MAX_FDS) for _ in range(3)]
        for _, fds, _, _ in packets:
            for fd in fds:
                os.close(fd)
    assert [(data, len(fds)) for data, fds, _, _ in packets] == [(b"+", MAX_FDS), (b"+", MAX_FDS), (b".", 1)]
