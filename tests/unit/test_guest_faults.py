"""A guest that is silent, absent, torn, lying or hostile: each ends in a clear error, none in a hang."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from guest_kit import Wire, fake_client, flood, scripted, until_closed

from posada.errors import Busy, GuestError, GuestGone, HostError, ProtocolError, Timeout
from posada.guest import channel, link
from posada.guest.channel import ChannelLock
from posada.guest.client import GuestClient
from posada.proto import frames
from posada.proto.frames import FrameType, cbor_frame, frame


async def connect(path: Path, *, timeout: float = 10, alive: link.Alive | None = None) -> GuestClient:
    return await GuestClient.connect([path], timeout=timeout, alive=alive)


class TestConnecting:
    async def test_no_socket(self, tmp_path: Path) -> None:
        with pytest.raises(Timeout, match=r"did not answer within 0\.1 s"):
            await connect(tmp_path / "agent", timeout=0.1)

    async def test_the_socket_appears_later(self, tmp_path: Path) -> None:
        task = asyncio.create_task(connect(tmp_path / "agent"))
        await asyncio.wait([task], timeout=0.02)
        assert (tmp_path / "agent.lock").exists()  # it is trying

        async def script(wire: Wire) -> None:
            await wire.greet(name="late")

        async with scripted(tmp_path / "agent", script):
            async with await task as client:
                assert client.hello.name == "late"

    async def test_a_dead_machine_is_not_waited_for(self, tmp_path: Path) -> None:
        with pytest.raises(GuestGone, match="machine has ended"):
            await connect(tmp_path / "agent", alive=lambda: False)

    async def test_no_channel(self) -> None:
        with pytest.raises(GuestGone, match="no channel"):
            await GuestClient.connect([], timeout=1)

    async def test_a_channel_that_is_not_ours(self, tmp_path: Path) -> None:
        (tmp_path / "agent.lock").mkdir()
        with pytest.raises(HostError, match="cannot connect"):
            await connect(tmp_path / "agent")
        (tmp_path / ("d" * 100)).mkdir()
        with pytest.raises(HostError, match="too long"):
            await connect(tmp_path / ("d" * 100) / "agent")

    async def test_silence_times_out_and_lets_go_of_the_channel(self, tmp_path: Path) -> None:
        async with scripted(tmp_path / "agent", until_closed) as agent:
            with pytest.raises(Timeout):
                await connect(tmp_path / "agent", timeout=0.1)
            await agent
        lock = ChannelLock.take(tmp_path / "agent")
        assert lock is not None
        lock.release()

    async def test_a_guest_that_boots_is_not_flooded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As long as nobody reads, as QEMU does until the guest opens its port, one preamble must be all we send."""
        monkeypatch.setattr(link, "_RETRY", 0.01)
        booted = asyncio.Event()
        seen = bytearray()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await booted.wait()
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            seen.extend(await reader.readuntil(frames.CLIENT_PREAMBLE))
            nonce = await reader.readexactly(16)
            writer.write(frames.AGENT_PREAMBLE + nonce + cbor_frame(0, FrameType.HELLO, {"version": 1, "min": 1}))
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(serve, tmp_path / "agent"):
            task = asyncio.create_task(connect(tmp_path / "agent"))
            await asyncio.wait([task], timeout=0.2)  # twenty retries' worth of boot
            booted.set()
            async with await task:
                assert bytes(seen) == frames.CLIENT_PREAMBLE

    async def test_a_torn_link_is_resynchronised(self, tmp_path: Path) -> None:
        """The agent is in the middle of a frame of 60,000 bytes when we come."""

        async def script(wire: Wire) -> None:
            await wire.reader.readexactly(60_000)
            nonce = await wire.nonce()
            wire.send(frames.AGENT_PREAMBLE + nonce + cbor_frame(0, FrameType.HELLO, {"version": 1, "min": 1}))

        async with scripted(tmp_path / "agent", script):
            async with asyncio.timeout(5), await connect(tmp_path / "agent"):
                pass

    async def test_leftovers_and_garbage_before_the_answer(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            wire.send(frame(1, FrameType.DATA, b"of an earlier client") + os.urandom(100_000))
            await wire.greet()

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent"):
            pass

    async def test_garbage_without_end(self, tmp_path: Path) -> None:
        async with scripted(tmp_path / "agent", lambda wire: flood(wire, b"\xa5" * 65536)):
            with pytest.raises(Timeout):
                await connect(tmp_path / "agent", timeout=0.2)

    async def test_eof_instead_of_an_answer(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.nonce()

        async with scripted(tmp_path / "agent", script):
            with pytest.raises(GuestGone):
                await connect(tmp_path / "agent")

    async def test_the_guest_says_that_it_cannot_boot(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            nonce = await wire.nonce()
            failed = cbor_frame(0, FrameType.EVENT, {"event": "boot-failed", "error": "no root: /dev/vda"})
            wire.send(frames.AGENT_PREAMBLE + nonce + failed)
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script):
            with pytest.raises(GuestError, match="cannot boot: no root: /dev/vda"):
                await connect(tmp_path / "agent")

    @pytest.mark.parametrize(("version", "least"), [(0, 0), (9, 2)])
    async def test_no_common_version(self, tmp_path: Path, version: int, least: int) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet(version=version, min=least)
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script):
            with pytest.raises(GuestError, match="speaks versions"):
                await connect(tmp_path / "agent")

    async def test_a_newer_agent_that_speaks_ours_is_fine(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet(version=9, min=1, novelty=[1, 2])

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            assert client.hello.version == 9

    async def test_a_hello_that_lies(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet(window=1 << 60)
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script):
            with pytest.raises(ProtocolError, match="HELLO"):
                await connect(tmp_path / "agent")


def hold(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    lock = ChannelLock.take(path)
    assert lock is not None
    ready.set()
    signal.pause()


class TestChannels:
    async def test_each_client_gets_its_own(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, _):
            channels = [tmp_path / "agent0", tmp_path / "agent1"]
            async with await GuestClient.connect(channels, timeout=10) as second:
                assert len(guest.links) == 2
                with pytest.raises(Busy, match="all 2 channels"):
                    await GuestClient.connect(channels, timeout=0.1)
                third = asyncio.create_task(GuestClient.connect(channels, timeout=10))
                await second.call("ping")
                await second.close()
                async with await third as client:
                    await client.call("ping")

    async def test_a_client_that_is_gone_holds_nothing(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            for held in list(guest.links):
                held.abort()
            await client._link.wait_ended()
            async with await GuestClient.connect([tmp_path / "agent0"], timeout=10) as again:
                await again.call("ping")

    async def test_a_killed_process_holds_nothing(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        holder = context.Process(target=hold, args=(tmp_path / "agent", ready))
        holder.start()
        await asyncio.to_thread(ready.wait)
        assert ChannelLock.take(tmp_path / "agent") is None
        holder.kill()
        holder.join()
        lock = ChannelLock.take(tmp_path / "agent")
        assert lock is not None
        lock.release()
        lock.release()

    async def test_a_lock_file_that_was_replaced_is_not_trusted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = channel.fcntl.flock

        def flock(fd: int, operation: int) -> None:
            real(fd, operation)
            (tmp_path / "agent.lock").unlink(missing_ok=True)

        monkeypatch.setattr(channel.fcntl, "flock", flock)
        assert ChannelLock.take(tmp_path / "agent") is None

    async def test_a_link_is_not_followed_to_lock(self, tmp_path: Path) -> None:
        (tmp_path / "agent.lock").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic links"):
            ChannelLock.take(tmp_path / "agent")
        assert not (tmp_path / "elsewhere").exists()


class TestHostileAgents:
    """Each script answers the handshake, then breaks the protocol while a command waits."""

    @pytest.mark.parametrize(
        ("evil", "why"),
        [
            (bytes(10), "type 0"),
            (b"\xff" * 20, "bytes"),
            (frame(1, FrameType.DATA, b"x") * 5, "before OPENED"),
            (cbor_frame(1, FrameType.OPENED, {"pid": "one", "exec": 1}), "pid"),
            (cbor_frame(1, FrameType.OPENED, {}), "pid"),
            (cbor_frame(2, FrameType.OPENED, {"pid": 1, "exec": 1}), "not open"),
        ],
    )
    async def test_exec(self, tmp_path: Path, evil: bytes, why: str) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.OPEN)
            wire.send(evil)
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(ProtocolError, match=why):
                await client.exec(["true"])

    async def test_more_than_the_window(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.OPEN)
            wire.send(cbor_frame(1, FrameType.OPENED, {"pid": 1, "exec": 1}))
            wire.send(frame(1, FrameType.DATA, bytes(65536)) * 5)
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            process = await client.exec(["true"])
            with pytest.raises(ProtocolError, match="window"):
                await client.call("ping")
            with pytest.raises(ProtocolError, match="window"):
                await process.wait()

    async def test_after_a_violation_the_link_is_gone(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.CALL)
            wire.send(bytes(10))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script) as agent, await connect(tmp_path / "agent") as client:
            waiting = asyncio.create_task(client.call("ping"))
            with pytest.raises(ProtocolError):
                await waiting
            with pytest.raises(GuestGone):
                await client.run(["true"])
            await agent

    async def test_a_torn_frame_and_the_end(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.OPEN)
            wire.send(cbor_frame(1, FrameType.OPENED, {"pid": 1, "exec": 1}))
            wire.send(frame(1, FrameType.DATA, b"x" * 1000)[:500])

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(GuestGone):
                await client.run(["true"])

    async def test_a_command_closed_without_an_end(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.OPEN)
            wire.send(cbor_frame(1, FrameType.OPENED, {"pid": 1, "exec": 1}) + cbor_frame(1, FrameType.CLOSE, {}))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(GuestError, match="closed before its process ended"):
                await client.run(["true"])

    async def test_a_file_cut_off(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.OPEN)
            wire.send(cbor_frame(1, FrameType.OPENED, {"size": 100, "mode": 0o644}))
            wire.send(frame(1, FrameType.DATA, b"half") + cbor_frame(1, FrameType.CLOSE, {}))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(ProtocolError, match="in the middle"):
                await client.read_file("/file")

    async def test_single_bytes_do_not_cost_an_object_each(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.OPEN)
            pieces = frame(1, FrameType.DATA, b"o") + frame(1, FrameType.DATA, b"e", 1)
            ends = (
                frame(1, FrameType.EOF) + frame(1, FrameType.EOF, flags=1) + cbor_frame(1, FrameType.EXIT, {"code": 0})
            )
            wire.send(cbor_frame(1, FrameType.OPENED, {"pid": 1, "exec": 1}) + pieces * 10_000)
            wire.send(cbor_frame(0, FrameType.REPLY, {"id": 1, "ok": {}}) + ends + cbor_frame(1, FrameType.CLOSE, {}))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            process = await client.exec(["true"])
            await client.call("ping")
            assert len(process._stream._inbox) <= 65
            result = await process.wait()
            assert (len(result.stdout), len(result.stderr)) == (10_000, 10_000)

    async def test_asking_without_reading_the_answers(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await flood(wire, frame(0, FrameType.PING, bytes(64)) * 1000)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            # As ProtocolError when the call waits already, or as GuestGone when it comes later.
            with pytest.raises(GuestError, match="does not read the answers"):
                await client.call("ping")

    async def test_the_agent_ends_the_link(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.CALL)
            wire.send(cbor_frame(0, FrameType.CLOSE, {"error": "restarted"}))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(GuestGone, match="restarted"):
                await client.call("ping")

    async def test_a_silent_guest_whose_machine_has_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The socket stays open, as when something else holds it; only `alive` knows."""
        monkeypatch.setattr(link, "_ALIVE_INTERVAL", 0.01)
        runs = True

        async def script(wire: Wire) -> None:
            nonlocal runs
            await wire.greet()
            await wire.expect(FrameType.CALL)
            runs = False
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script):
            async with await connect(tmp_path / "agent", alive=lambda: runs) as client:
                with pytest.raises(GuestGone, match="machine has ended"):
                    await client.call("ping")

    async def test_a_late_answer_to_a_cancelled_call_is_forgotten(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            _, first = await wire.expect(FrameType.CALL)
            _, second = await wire.expect(FrameType.CALL)
            for body in (first, second):
                wire.send(cbor_frame(0, FrameType.REPLY, {"id": body["id"], "ok": {"op": body["op"]}}))

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await client.call("first")
            assert await client.call("second") == {"op": "second"}

    @pytest.mark.parametrize(
        "answer",
        [
            {"type": "dragon", "mode": 0, "size": 0},
            {"type": "file", "mode": -1, "size": 0},
            {"type": "file", "mode": 0},
            {"type": "file", "mode": 0, "size": "9"},
        ],
    )
    async def test_a_stat_that_lies(self, tmp_path: Path, answer: dict[str, object]) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.CALL)
            wire.send(cbor_frame(0, FrameType.REPLY, {"id": 1, "ok": answer}))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(ProtocolError, match="answered wrongly"):
                await client.stat("/x")

    @pytest.mark.parametrize("name", ["", "a/b", "../x", "a\0b", "x" * 256, 7])
    async def test_a_listing_with_names_that_are_none(self, tmp_path: Path, name: object) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.CALL)
            entry = {"name": name, "type": "file", "mode": 0, "size": 0, "mtime_ns": 0}
            wire.send(cbor_frame(0, FrameType.REPLY, {"id": 1, "ok": {"entries": [entry], "more": False}}))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(ProtocolError, match="answered wrongly"):
                await client.list_dir("/x")

    async def test_a_listing_without_end(self, tmp_path: Path) -> None:
        async def script(wire: Wire) -> None:
            await wire.greet()
            await wire.expect(FrameType.CALL)
            wire.send(cbor_frame(0, FrameType.REPLY, {"id": 1, "ok": {"entries": [], "more": True}}))
            await until_closed(wire)

        async with scripted(tmp_path / "agent", script), await connect(tmp_path / "agent") as client:
            with pytest.raises(ProtocolError, match="come to an end"):
                await client.list_dir("/x")
