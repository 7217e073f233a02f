"""Commands, calls and connections through the client, against the fake agent."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from guest_kit import fake_client

from posada.errors import CommandError, GuestError, GuestGone, StreamClosed, Timeout
from posada.guest.client import GuestClient
from posada.guest.fake_agent import FakeGuest
from posada.guest.process import GuestProcess
from posada.model.exec import Output, Pty
from posada.proto.frames import WINDOW


def alive(guest: FakeGuest) -> int:
    """How many processes run in the guest."""
    return sum(job.running for job in guest.execs.values())


async def until_ended(guest: FakeGuest) -> None:
    async with asyncio.timeout(10):
        while guest.execs or guest.endings:
            await asyncio.wait([*guest.endings, *guest.tasks], return_when=asyncio.FIRST_COMPLETED)


class TestRun:
    async def test_output_and_status(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            result = await client.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
        assert (result.stdout, result.stderr) == ("out\n", "err\n")
        assert (result.exit_code, result.signal, result.status, result.ok) == (3, None, 3, False)

    async def test_ended_by_a_signal(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            result = await client.run(["sh", "-c", "kill -9 $$"])
        assert (result.exit_code, result.signal, result.status, result.ok) == (None, 9, 137, False)

    async def test_cwd_and_environment(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            (guest.root / "work").mkdir()
            result = await client.run(["sh", "-c", "pwd; echo $COLOUR"], cwd="/work", env={"COLOUR": "blue"})
            assert result.stdout == f"{guest.root}/work\nblue\n"
            result = await client.run(["/usr/bin/env"], env={"ONLY": "this"}, clear_env=True)
            assert result.stdout == "ONLY=this\n"

    @pytest.mark.parametrize("size", [0, 1, 65536, 65537, 3 * WINDOW + 17])
    async def test_input_goes_through(self, tmp_path: Path, size: int) -> None:
        async with fake_client(tmp_path) as (_, client):
            result = await client.run(["cat"], input=b"x" * size)
        assert len(result.stdout_bytes) == size

    async def test_without_input_there_is_none(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            assert (await client.run(["cat"])).ok

    async def test_input_that_is_not_read_does_not_matter(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            assert (await client.run(["head", "-c1"], input=b"x" * (4 * WINDOW))).stdout == "x"

    async def test_what_cannot_be_executed(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            with pytest.raises(GuestError, match="no-such-command") as caught:
                await client.run(["no-such-command"])
            assert caught.value.errno_name == "ENOENT"
            (guest.root / "plain").write_text("text")
            with pytest.raises(GuestError) as caught:
                await client.exec([str(guest.root / "plain")])
            assert caught.value.errno_name == "EACCES"

    async def test_check(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            assert (await client.run(["true"], check=True)).ok
            with pytest.raises(CommandError, match="status 1") as caught:
                await client.run(["false"], check=True)
            assert caught.value.result.exit_code == 1

    async def test_too_much_output_says_to_stream(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            with pytest.raises(GuestError, match="stream"):
                await client.run(["yes"], max_output=100_000)
            await until_ended(guest)

    async def test_timeout_ends_the_command(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            with pytest.raises(Timeout, match=r"longer than 0\.1 s"):
                await client.run(["sleep", "600"], timeout=0.1)
            await until_ended(guest)
            assert (await client.run(["true"])).ok

    async def test_cancelling_ends_the_command(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            task = asyncio.create_task(client.run(["sleep", "600"]))
            while not alive(guest):
                await client.call("ping")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_ended(guest)

    async def test_a_command_is_a_list(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            for wrong in ("ls -l", b"ls", []):
                with pytest.raises(ValueError, match="list of its words"):
                    await client.run(wrong)  # type: ignore[arg-type]

    async def test_a_request_that_is_too_long(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            with pytest.raises(GuestError, match="at most 65536") as caught:
                await client.run(["echo", "x" * 70000])
            assert caught.value.errno_name == "E2BIG"
            assert (await client.run(["true"])).ok

    async def test_a_hundred_at_once_take_turns_on_64_streams(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            results = await asyncio.gather(*(client.run(["echo", str(i)]) for i in range(100)))
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(100)]

    async def test_the_client_costs_less_than_a_millisecond(self, tmp_path: Path) -> None:
        """A round trip through client, socket and fake agent; the best of many, since the host may be busy."""
        async with fake_client(tmp_path) as (_, client):
            times = []
            for _ in range(200):
                start = time.perf_counter()
                await client.call("ping")
                times.append(time.perf_counter() - start)
        assert min(times) < 0.001


class TestProcess:
    async def test_talking_to_a_command(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            process = await client.exec(["cat"], stdin=True)
            assert process.pid > 0
            await process.write(b"one")
            assert await process.read() == Output("stdout", b"one", "one")
            await process.write(b"two")
            assert await process.read() == Output("stdout", b"two", "two")
            await process.close_stdin()
            assert await process.read() is None
            assert (await process.wait()).ok

    async def test_iterating_then_waiting(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            process = await client.exec(["sh", "-c", "echo out; echo err >&2"])
            seen = [(o.stream, o.text) async for o in process]
            assert sorted(seen) == [("stderr", "err\n"), ("stdout", "out\n")]
            result = await process.wait()
            assert (result.ok, result.stdout_bytes) == (True, b"")

    async def test_waiting_collects_what_was_not_read(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            process = await client.exec(["sh", "-c", "echo one; read x; echo two"], stdin=True)
            first = await process.read()
            assert first is not None
            await process.close_stdin()
            assert first.text + (await process.wait()).stdout == "one\ntwo\n"

    async def test_characters_split_over_pieces_come_whole(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            process = await client.exec(["cat"], stdin=True)
            texts = []
            for byte in "aü水".encode():
                await process.write(bytes([byte]))
                output = await process.read()
                assert output is not None
                texts.append(output.text)
            assert texts == ["a", "", "ü", "", "", "水"]
            await process.write(b"\xe6\xb0")
            await process.close_stdin()
            assert "".join([o.text async for o in process]) == "�"

    async def test_signals(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            process = await client.exec(
                ["sh", "-c", "trap 'echo usr1; exit 5' USR1; echo up; while :; do sleep 0.01; done"]
            )
            assert (await process.read()) == Output("stdout", b"up\n", "up\n")
            await process.signal(signal.SIGUSR1, group=False)
            result = await process.wait()
            assert (result.stdout, result.exit_code) == ("usr1\n", 5)
            await process.signal(signal.SIGKILL)

    async def test_terminal(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            command = ["sh", "-c", "stty size; read x; stty size; echo $TERM"]
            process = await client.exec(command, stdin=True, pty=Pty(30, 90, "vt100"))
            text = ""
            while not text.endswith("30 90\r\n"):
                output = await process.read()
                assert output is not None
                text += output.text
            await process.resize(40, 100)
            await process.write(b"go\n")
            result = await process.wait()
            assert result.stdout.replace("\r", "").endswith("40 100\nvt100\n")

    async def test_leaving_it_hangs_it_up(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            async with await client.exec(["sleep", "600"]):
                assert alive(guest) == 1
            await until_ended(guest)

    async def test_a_command_that_ignores_the_hangup_is_killed(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            process = await client.exec(["sh", "-c", "trap '' HUP; echo up; while :; do sleep 0.05; done"])
            assert await process.read() is not None
            await process.close()
            await until_ended(guest)

    async def test_writing_to_what_has_ended(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            process = await client.exec(["true"], stdin=True)
            await process.wait()
            with pytest.raises(StreamClosed):
                await process.write(b"x" * (2 * WINDOW))

    async def test_writing_without_stdin(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            async with await client.exec(["sleep", "600"]) as process:
                with pytest.raises(StreamClosed, match="stdin=True"):
                    await process.write(b"x")

    async def test_kept_command_outlives_its_connection(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            process = await client.exec(["sh", "-c", "read x; echo got $x"], stdin=True, keep=True)
            number = process.exec_id
            await client.close()
            async with await GuestClient.connect([tmp_path / "agent0"], timeout=10) as again:
                execs = (await again.call("execs"))["execs"]
                assert [(e["exec"], e["running"]) for e in execs] == [(number, True)]
                process = await again.attach(number)
                await process.write(b"it\n")
                assert (await process.wait()).stdout == "got it\n"
                with pytest.raises(GuestError) as caught:
                    await again.attach(number)
                assert caught.value.errno_name == "ESRCH"
            assert alive(guest) == 0

    async def test_a_grandchild_that_keeps_the_pipes_does_not_hold_up_the_end(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            result = await client.run(["sh", "-c", "sleep 600 & echo $!"], timeout=10)
            assert result.exit_code == 0
            os.kill(int(result.stdout), signal.SIGKILL)


class TestIsolation:
    async def test_a_slow_reader_blocks_nobody(self, tmp_path: Path) -> None:
        """One command writes without end and nobody reads it; everything else goes on."""
        async with fake_client(tmp_path) as (guest, client):
            slow = await client.exec(["yes"])
            for i in range(20):
                assert (await client.run(["echo", str(i)])).stdout == f"{i}\n"
            await client.write_file("/big", b"x" * (2 * WINDOW))
            assert len(await client.read_file("/big")) == 2 * WINDOW
            assert alive(guest) == 1
            total = 0
            async for output in slow:  # and it goes on where it was, beyond its window
                total += len(output.data)
                if total > 3 * WINDOW:
                    break
            await slow.close()

    async def test_at_most_a_window_is_held(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            slow = await client.exec(["yes"])
            for _ in range(200):
                await client.call("ping")
            held = sum(len(data) for _, data in slow._stream._inbox)
            assert 0 < held <= WINDOW
            await slow.close()

    async def test_64_streams_at_once(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            processes: list[GuestProcess] = [await client.exec(["cat"], stdin=True) for _ in range(64)]
            await client.call("ping")
            waiting = asyncio.create_task(client.run(["echo", "65"]))
            for number, process in enumerate(processes):
                await process.write(str(number).encode())
            for number, process in enumerate(processes):
                output = await process.read()
                assert output is not None
                assert output.data == str(number).encode()
            assert not waiting.done()
            await processes[7].close_stdin()
            assert (await waiting).stdout == "65\n"
            for process in processes:
                await process.close()


class TestConnections:
    async def test_echo_server_with_half_close(self, tmp_path: Path) -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"<" + await reader.read() + b">")
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, fake_client(tmp_path) as (_, client):
            async with await client.open_tcp(port) as socket:
                await socket.write(b"x" * 600_000)
                socket.write_eof()
                received = b""
                while data := await socket.read():
                    received += data
            assert received == b"<" + b"x" * 600_000 + b">"

    async def test_refused(self, tmp_path: Path) -> None:
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with fake_client(tmp_path) as (_, client):
            with pytest.raises(GuestError) as caught:
                await client.open_tcp(port)
            assert caught.value.errno_name == "ECONNREFUSED"

    async def test_unix(self, tmp_path: Path) -> None:
        async def hello(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")
            writer.close()

        async with fake_client(tmp_path) as (guest, client):
            async with await asyncio.start_unix_server(hello, guest.root / "sock"):
                async with await client.open_unix("/sock") as socket:
                    assert await socket.read() == b"hello"
                    assert await socket.read() == b""


class TestEnds:
    async def test_a_dead_guest_ends_all_that_waits_at_once(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            process = await client.exec(["sleep", "600"])
            socket = await client.exec(["cat"], stdin=True)
            waiting = [
                asyncio.ensure_future(process.wait()),
                asyncio.ensure_future(client.run(["sleep", "600"])),
                asyncio.ensure_future(socket.write(b"x" * (10 * WINDOW))),
            ]
            await client.call("ping")
            await guest.close()
            async with asyncio.timeout(5):
                for result in await asyncio.gather(*waiting, return_exceptions=True):
                    assert isinstance(result, GuestGone)
            assert client.gone
            for later in (client.run(["true"]), client.call("ping"), client.read_file("/x"), process.wait()):
                with pytest.raises(GuestGone):
                    await later

    async def test_a_closed_client_says_so(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            await client.close()
            await client.close()
            with pytest.raises(GuestGone, match="closed"):
                await client.call("ping")

    async def test_closing_does_not_wait_for_a_guest_that_stands_still(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            for held in guest.links:
                held._transport.pause_reading()  # type: ignore[union-attr]
            waiting = [asyncio.ensure_future(client.write_file(f"/{i}", bytes(WINDOW))) for i in range(20)]
            while not client._link._unread() > WINDOW:
                await asyncio.wait(waiting, timeout=0.01)
            async with asyncio.timeout(5):
                await client.close()
                for result in await asyncio.gather(*waiting, return_exceptions=True):
                    assert isinstance(result, GuestGone)

    async def test_output_that_came_before_the_end_is_not_lost(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            process = await client.exec(["sh", "-c", "echo last words; sleep 600"])
            while not process._stream._inbox:
                await client.call("ping")
            await guest.close()
            await client._link.wait_ended()
            output = await process.read()
            assert output is not None
            assert output.data == b"last words\n"
            with pytest.raises(GuestGone):
                await process.read()
