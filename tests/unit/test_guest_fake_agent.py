"""What the fake agent states about forks, identity and power; the rest of it is tested through the client."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from guest_kit import fake_client

from posada.errors import GuestError
from posada.guest.client import GuestClient
from posada.guest.fake_agent import FakeGuest
from posada.model.exec import IdentityReset


def identity(**changes: object) -> IdentityReset:
    fields: dict[str, object] = {
        "generation": 3, "hostname": "child", "machine_id": "ab" * 16, "macs": ("52:54:00:00:00:01",),
        "entropy": os.urandom(64), "time_ns": time.time_ns(), "token": b"token", "ssh_host_keys": False,
    }  # fmt: skip
    return IdentityReset(**{**fields, **changes})  # type: ignore[arg-type]


async def test_a_fork(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as (source, client):
        await client.write_file("/data", b"before")
        await client.fork_prepare(b"token")
        child = source.copy()
        await client.fork_done(b"token")
        await client.write_file("/data", b"after")
        try:
            await child.serve([tmp_path / "child"])
            async with await GuestClient.connect([tmp_path / "child"], timeout=10) as other:
                assert other.hello.generation == 0
                steps = await other.identity_reset(identity())
                assert set(steps.values()) == {"ok"}
                assert await other.read_file("/data") == b"before"
                assert await other.read_file("/etc/hostname") == b"child\n"
                assert await other.read_file("/run/posada/generation") == b"3\n"
            async with await GuestClient.connect([tmp_path / "child"], timeout=10) as other:
                assert (other.hello.generation, other.hello.hostname) == (3, "child")
                assert other.hello.boot_id == client.hello.boot_id
            assert [reset.machine_id for reset in child.resets] == ["ab" * 16]
        finally:
            await child.close()
        assert not child.root.exists()
        assert source.resets == []
        assert await client.read_file("/data") == b"after"


async def test_processes_stand_still_while_a_fork_is_prepared(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as (_, client):
        process = await client.exec(["cat"], stdin=True)
        await client.fork_prepare(b"token")
        await process.write(b"x")
        reading = asyncio.create_task(process.read())
        await asyncio.wait([reading], timeout=0.1)
        assert not reading.done()
        with pytest.raises(GuestError, match="no fork"):
            await client.fork_done(b"another")
        await client.fork_done(b"token")
        output = await reading
        assert output is not None
        assert output.data == b"x"
        await process.close()


async def test_a_link_lost_while_prepared_hangs_up_nothing(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as (guest, client):
        await client.exec(["sleep", "600"])
        await client.fork_prepare(b"token")
        await client.close()
        async with await GuestClient.connect([tmp_path / "agent0"], timeout=10) as again:
            await again.fork_done(b"token")
            assert [e["running"] for e in (await again.call("execs"))["execs"]] == [True]
            assert not guest.endings


@pytest.mark.parametrize("changes", [{"token": b"wrong"}, {"entropy": b"short"}, {"generation": "one"}])
async def test_a_reset_that_is_refused_changes_nothing(tmp_path: Path, changes: dict[str, object]) -> None:
    async with fake_client(tmp_path) as (guest, client):
        await client.fork_prepare(b"token")
        with pytest.raises(GuestError):
            await client.identity_reset(identity(**changes))
        assert (guest.hostname, guest.token) == ("fake", b"token")


async def test_failures_can_be_ordered(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as (guest, client):
        guest.failures["identity.reset"] = ("step macs: No such device", "ENODEV")
        with pytest.raises(GuestError, match="step macs") as caught:
            await client.identity_reset(identity(token=None))
        assert caught.value.errno_name == "ENODEV"


async def test_power() -> None:
    asked: list[str] = []
    guest = FakeGuest(on_power=asked.append)
    try:
        channel = guest.root / "agent"
        await guest.serve([channel])
        async with await GuestClient.connect([channel], timeout=10) as client:
            await client.call("poweroff")
            await client.call("reboot")
    finally:
        await guest.close()
    assert asked == ["poweroff", "reboot"]


async def test_paths_stay_below_its_root(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as (guest, client):
        await client.write_file("/../../escape", b"x")
        assert (guest.root / "escape").exists()
        with pytest.raises(GuestError, match="not absolute"):
            await client.read_file("relative")
