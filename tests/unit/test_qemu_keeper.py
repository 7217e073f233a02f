"""The keeper beside a shell script that plays QEMU: no guest, but a real jail, real exits, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from posada.engine.base import Launch
from posada.engine.common import process
from posada.engine.qemu import cgroups
from posada.engine.qemu.argv import Invocation
from posada.engine.qemu.files import Descriptors
from posada.engine.qemu.spawn import Spawned, jail_uid, spawn
from posada.engine.qemu.status import status_of
from posada.errors import EngineError, EngineGone
from posada.model.machine import make_spec
from posada.model.records import Process

FDS = {"console": 3, "monitor": 4}
ME = process.find(os.getpid())

class Kit:
    """Starts scripts, and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.runtime = folder / "run"
        self.runtime.mkdir(mode=0o700)
        self.log = folder / "log"
        self.uuid = str(uuid.uuid4())
        self.started: list[Spawned] = []

    def launch(self, **spec: Any) -> Launch:
        owner = spec.pop("owner", ME)
        return Launch(
            uuid=self.uuid,
            name="x",
            spec=make_spec(image="x", **spec),
            runtime=self.runtime,
            log=self.log,
            owner=owner,
        )

    async def run(self, script: str, *, commit: bool = True, argv: tuple[str, ...] = (), **spec: Any) -> Spawned:
        with Descriptors() as files:
            invocation = Invocation(argv or ("/bin/sh", "-c", script), FDS)
            spawned = await spawn(self.launch(**spec), invocation, files, "tcg")
        self.started.append(spawned)
        if commit:
            with contextlib.suppress(EngineGone):  # a script that ended at once
                spawned.commit()
        return spawned

    async def end(self, spawned: Spawned) -> process.ExitRecord:
        """The exit record, once the keeper is done."""
        await process.ended(spawned.process, 10)
        await process.ended(spawned.keeper, 10)
        record = process.read_exit(self.runtime)
        assert record is not None
        return record


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    found = Kit(tmp_path)
    yield found
    for spawned in found.started:
        await spawned.abandon()
    assert not [p for s in found.started for p in (s.process, s.keeper) if process.alive(p)]


async def read_until(path: Path, text: bytes) -> bytes:
    """What a console client sees, up to ``text``."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        async with asyncio.timeout(10):
            return await reader.readuntil(text)
    finally:
        writer.close()


async def test_the_exit_status_and_the_last_words_are_recorded(kit: Kit) -> None:
    record = await kit.end(await kit.run("echo broken >&2; exit 3"))
    assert (record.code, record.signal, record.crashed) == (3, None, True)
    assert record.stderr == "broken\n"
    assert record.reason == "QEMU ended with status 3"


async def test_an_endless_stderr_is_cut_to_its_tail(kit: Kit) -> None:
    record = await kit.end(await kit.run("yes 0123456789 | head -c 300000 >&2; echo end >&2; exit 1"))
    assert 4 << 10 < len(record.stderr) <= 8 << 10
    assert record.stderr.endswith("end\n")


async def test_a_kill_that_was_asked_for_is_no_crash(kit: Kit) -> None:
    spawned = await kit.run("exec sleep 60")
    (kit.runtime / "kill").touch()
    process.send(spawned.process, signal.SIGKILL)
    record = await kit.end(spawned)
    assert (record.reason, record.crashed, record.signal) == ("killed", False, 9)


async def test_a_kill_by_somebody_else_is_a_crash(kit: Kit) -> None:
    spawned = await kit.run("exec sleep 60")
    process.send(spawned.process, signal.SIGSEGV)
    record = await kit.end(spawned)
    assert (record.reason, record.crashed) == ("QEMU was killed by signal 11", True)


@pytest.mark.parametrize(
    ("event", "reason", "crashed"),
    [
        ({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}}, "guest powered off", False),
        ({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}}, "guest rebooted", False),
        ({"event": "GUEST_PANICKED", "data": {"action": "shutdown"}}, "guest panicked", True),
        ({"event": "SHUTDOWN", "data": []}, "QEMU ended with status 0", True),
        ({"event": "SHUTDOWN", "data": {"reason": ["a"]}}, "ended", False),
    ],
    ids=["off", "reboot", "panic", "nonsense", "odd"],
)
async def test_the_monitor_says_why_it_ended(kit: Kit, event: object, reason: str, crashed: bool) -> None:
    record = await kit.end(await kit.run(f"echo '{json.dumps(event)}' >&4"))
    assert (record.reason, record.crashed) == (reason, crashed)


async def test_a_panic_without_pvpanic_is_known_by_the_console(kit: Kit) -> None:
    event = '{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}'
    script = f"echo '[ 1.0] Kernel panic - not syncing: no init' >&3; echo '{event}' >&4"
    record = await kit.end(await kit.run(script))
    assert (record.reason, record.crashed) == ("guest panicked: Kernel panic - not syncing: no init", True)


async def test_the_console_goes_to_the_log_and_to_every_client(kit: Kit) -> None:
    await kit.run("echo one >&3; read line <&3; echo got $line >&3; exec sleep 60")
    first = await read_until(kit.runtime / "console.sock", b"one\n")
    assert first == b"one\n"
    reader, writer = await asyncio.open_unix_connection(kit.runtime / "console.sock")
    writer.write(b"typed\n")
    async with asyncio.timeout(10):
        assert await reader.readuntil(b"got typed\n") == b"one\ngot typed\n"
    writer.close()
    assert await read_until(kit.runtime / "console.sock", b"got typed\n") == b"one\ngot typed\n"
    assert kit.log.read_bytes() == b"one\ngot typed\n"


async def test_a_client_that_does_not_read_is_dropped_and_stops_nobody(kit: Kit) -> None:
    rounds = 10
    burst = f"i=0; while [ $i -lt {rounds} ]; do read go <&3; yes 0123456789abcde | head -c 320000 >&3; i=$((i+1)); done"
    await kit.run(f"{burst}; exec sleep 60")
    slow_reader, slow_writer = await asyncio.open_unix_connection(kit.runtime / "console.sock", limit=1024)
    reader, writer = await asyncio.open_unix_connection(kit.runtime / "console.sock")
    async with asyncio.timeout(20):
        for _ in range(rounds):
            writer.write(b"go\n")
            assert len(await reader.readexactly(320_000)) == 320_000
        with contextlib.suppress(ConnectionResetError):
            assert len(await slow_reader.read(-1)) < rounds * 320_000
    writer.close()
    slow_writer.close()
    assert kit.log.stat().st_size <= 1 << 20
    assert kit.log.with_name("log.1").stat().st_size <= 1 << 20


async def test_without_a_commit_it_ends_with_its_starter(kit: Kit) -> None:
    spawned = await kit.run("exec sleep 60", commit=False)
    spawned._control.close()
    record = await kit.end(spawned)
    assert record.reason == "the client that started it is gone"


async def test_it_dies_with_its_owner(kit: Kit) -> None:
    owner = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220
    spawned = await kit.run("exec sleep 60", owner=process.find(owner.pid))
    assert process.alive(spawned.process)
    owner.kill()
    record = await kit.end(spawned)
    owner.wait()
    assert (record.reason, record.crashed) == ("its owner is gone", False)


async def test_it_outlives_an_owner_that_disowned_it(kit: Kit) -> None:
    owner = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220
    spawned = await kit.run("read x <&3; exit 7", owner=process.find(owner.pid))
    (kit.runtime / "disowned").touch()
    owner.kill()
    owner.wait()
    _, writer = await asyncio.open_unix_connection(kit.runtime / "console.sock")
    writer.write(b"\n")
    record = await kit.end(spawned)
    writer.close()
    assert record.code == 7


async def test_an_owner_whose_pid_was_given_to_another_counts_as_gone(kit: Kit) -> None:
    spawned = await kit.run("exec sleep 60", owner=Process(os.getpid(), ME.start + 1))
    assert (await kit.end(spawned)).reason == "its owner is gone"


async def test_its_lifetime_ends_it(kit: Kit) -> None:
    spawned = await kit.run("exec sleep 60", limits={"lifetime": 0.05})
    assert (await kit.end(spawned)).reason == "its lifetime is over"


async def test_idleness_counts_from_the_last_activity(kit: Kit) -> None:
    spawned = await kit.run("exec sleep 60", limits={"idle": 600})
    os.utime(kit.runtime / "activity", (0, 0))
    # The keeper looks when something happens: a console client comes.
    _, writer = await asyncio.open_unix_connection(kit.runtime / "console.sock")
    assert (await kit.end(spawned)).reason == "it was idle for too long"
    writer.close()


async def test_a_deadline_can_pause_instead(kit: Kit) -> None:
    """The request goes out on the second monitor; the marker tells `status`."""
    spawned = await kit.run(
        "read caps <&4; read stop <&4; echo \"$stop\" >&3; exec sleep 60", limits={"lifetime": 0.05, "action": "pause"}
    )
    assert await read_until(kit.runtime / "console.sock", b"\n") == b'{"execute":"stop"}\n'
    assert status_of(spawned.process, kit.runtime).paused


async def test_sigterm_to_the_keeper_ends_the_machine(kit: Kit) -> None:
    spawned = await kit.run("exec sleep 60")
    process.send(spawned.keeper, signal.SIGTERM)
    assert (await kit.end(spawned)).reason == "killed"


async def test_a_killed_keeper_leaves_the_machine_running(kit: Kit) -> None:
    # The script goes on writing to a console that nobody reads any more.
    spawned = await kit.run("read x <&3; exec sleep 60")
    process.send(spawned.keeper, signal.SIGKILL)
    await process.ended(spawned.keeper, 10)
    assert process.alive(spawned.process)
    process.send(spawned.process, signal.SIGKILL)
    await process.ended(spawned.process, 10)
    status = status_of(spawned.process, kit.runtime)
    assert (status.alive, status.crashed) == (False, True)


async def test_a_missing_binary_is_an_error_and_leaves_nothing(kit: Kit) -> None:
    with pytest.raises(EngineError, match=r"cannot run /nowhere/qemu: .*No such file"):
        await kit.run("", argv=("/nowhere/qemu",))
    assert not kit.started


async def test_the_jail(kit: Kit) -> None:
    """New session, no privileges to gain, no descriptors but those given, no core, own uid when we are root."""
    script = "exec >&3; cat /proc/self/status; ls /proc/$$/fd | tr '\\n' ' '; ulimit -c; umask; cut -d' ' -f6 /proc/$$/stat"
    spawned = await kit.run(f"{script}; echo end; exec sleep 60")
    out = (await read_until(kit.runtime / "console.sock", b"end\n")).decode()
    assert "NoNewPrivs:\t1" in out
    lines = out.splitlines()
    assert lines[-4].split() == ["0", "1", "2", "3", "4", "0"]  # …, and ulimit -c
    assert lines[-3] == "0077"
    assert int(lines[-2]) == spawned.keeper.pid != os.getsid(0)
    uid = jail_uid("x")
    if uid is not None:
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert int(status["Uid"].split()[0]) >= 1_900_000_000
        assert status["Groups"].strip() == ""
        assert int(status["CapEff"], 16) == 0


async def test_cgroups_hold_it_and_are_removed_with_it(kit: Kit) -> None:
    spawned = await kit.run("read x <&3")
    paths = cgroups.directories(kit.uuid)
    if not [path for path in paths if path.exists()]:
        pytest.skip("no writable cgroups here")
    async with asyncio.timeout(10):
        while not all(  # noqa: ASYNC110 (the kernel tells nobody)
            str(spawned.process.pid) in (path / "cgroup.procs").read_text().split() for path in paths
        ):
            await asyncio.sleep(0.001)
    await spawned.abandon()
    assert not [path for path in paths if path.exists()]
