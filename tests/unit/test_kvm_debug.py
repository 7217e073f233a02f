"""A machine of the kvm engine, jailed as always, under a debugger: stopped, looked at, let go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest
from gdb_client import Client
from kvm_engine_kit import LOAD, Console, Kit, count, needs_kvm, program

from posada.engine.base import CaptureFailed
from posada.engine.kvm.engine import KvmEngine
from posada.model.records import Running

pytestmark = [needs_kvm, pytest.mark.timeout(60)]


def look(port: int) -> dict[str, int | str]:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        client = Client(connection)
        seen: dict[str, int | str] = {
            "stop": client.ask("?"),
            "rip": client.register("rip"),
            "cr0": client.register("cr0"),
        }
        seen["code"] = client.ask(f"m{LOAD:x},{len(program()):x}")
        seen["step"] = client.ask("s")
        seen["next"] = client.register("rip")
        assert client.ask("D") == "OK"
    return seen


async def test_a_debugger_looks_into_a_jailed_machine_and_leaves(kit: Kit) -> None:
    engine = KvmEngine(kit.folder / "probe")
    launch = kit.launch()
    running = await engine.start(launch)
    try:
        await debugged(kit, engine, running)
    finally:
        await engine.kill(running)
        engine.reap(launch.runtime)


def listening(pid: int, port: int) -> set[str]:
    """The socket that listens at ``port``, as a process's descriptor shows it."""
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{line[9]}]" for line in lines if line[1] == f"0100007F:{port:04X}" and line[3] == "0A"}


def held(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # our own connection, which it closes now
            found.add(os.readlink(fd))
    return found


async def debugged(kit: Kit, engine: KvmEngine, running: Running) -> None:
    runtime = Path(running.runtime)
    assert await count(runtime, b"+") == 1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        await engine.debug(running, os.dup(listener.fileno()))
    seen = await asyncio.to_thread(look, port)
    assert seen["stop"] == "T05thread:1;"
    assert LOAD <= int(seen["rip"]) < LOAD + len(program())
    assert seen["code"] == program().hex()
    assert int(seen["cr0"]) & 1
    assert seen["step"] == "T05thread:1;"
    assert seen["next"] != seen["rip"]
    assert await count(runtime, b"+") == 2  # it runs on
    (child,) = (await engine.fork(running, [inherits := kit.launch()], [])).children
    assert isinstance(child, Running)
    try:
        assert await count(Path(child.runtime), b"+") == 3
        ours = listening(os.getpid(), port)
        assert ours, "the source listens no more"
        assert ours & held(running.process.pid)
        assert not ours & held(child.process.pid)
    finally:
        await engine.kill(child)
        engine.reap(inherits.runtime)
    attached = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port))
    with attached:
        client = Client(attached)
        assert await asyncio.to_thread(client.ask, "?") == "T05thread:1;"
        with pytest.raises(CaptureFailed, match="a debugger is attached"):
            await engine.fork(running, [kit.launch()], [])
    console = await Console.open(runtime)
    console.type(b"q")
    status = await engine.wait(running, 10)
    assert status.ended == "guest powered off"
    console.close()
