"""QMP against servers that answer, refuse, hang and vanish."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from posada.engine.qemu import ports, qmp
from posada.errors import EngineGone, HostError
from posada.model.records import PortRecord

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": ["oob"]}}
Answer = Callable[[str, dict], object]
Serve = Callable[[Answer], Awaitable[Path]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """A QMP server; ``answer(command, arguments)`` returns what goes into ``return``, an exception to refuse, None to hang."""
    servers: list[asyncio.Server] = []

    async def start(answer: Answer) -> Path:
        async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(json.dumps(GREETING).encode() + b"\r\n")
            while chunk := await reader.read(4096):  # one request at a time, and no newline behind it
                message = json.loads(chunk)
                known = message["execute"] == "qmp_capabilities"
                result = {} if known else answer(message["execute"], message.get("arguments", {}))
                if isinstance(result, ConnectionError):
                    break
                if result is None:
                    continue
                if isinstance(result, Exception):
                    reply: dict = {"error": {"class": "GenericError", "desc": str(result)}}
                else:
                    reply = {"return": result}
                if "id" in message:
                    reply["id"] = message["id"]
                writer.write(json.dumps(reply).encode() + b"\r\n")
            writer.close()

        servers.append(await asyncio.start_unix_server(session, tmp_path / "qmp.sock"))
        return tmp_path / "qmp.sock"

    yield start
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_a_command_is_answered(serve: Serve) -> None:
    path = await serve(lambda command, arguments: {"command": command, **arguments})
    async with qmp.connect(path) as session:
        assert await session.execute("block_resize", node_name="a", size=1) == {
            "command": "block_resize", "node-name": "a", "size": 1,
        }  # fmt: skip


async def test_a_refusal_names_the_command(serve: Serve) -> None:
    path = await serve(lambda command, arguments: ValueError("no such device"))
    async with qmp.connect(path) as session:
        with pytest.raises(qmp.CommandRefused, match=r"QEMU refused device_del: .*no such device"):
            await session.execute("device_del", id="x")


async def test_no_answer_ends_in_an_error_that_says_what_to_do(serve: Serve) -> None:
    path = await serve(lambda command, arguments: None)
    began = time.monotonic()
    async with qmp.connect(path) as session:
        with pytest.raises(EngineGone, match=r"does not answer stop within 0.1 s \(.*posada kill"):
            await session.execute("stop", timeout=0.1)
    assert time.monotonic() - began < 5


async def test_an_end_in_the_middle_of_a_command_is_noticed_at_once(serve: Serve) -> None:
    path = await serve(lambda command, arguments: ConnectionError())
    async with qmp.connect(path) as session:
        with pytest.raises(EngineGone, match="went away during stop"):
            await session.execute("stop")


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(EngineGone, match=r"cannot be reached: .*No such file"):
        async with qmp.connect(tmp_path / "none"):
            pass


async def test_somebody_mute(tmp_path: Path) -> None:
    """A stopped QEMU: the kernel takes the connection, nobody greets."""
    sock, address, _ = qmp.unix_socket(tmp_path / "mute")
    sock.bind(address)
    sock.listen(1)
    with sock, pytest.raises(EngineGone, match=r"does not answer on its monitor within 0.1 s"):
        async with qmp.connect(tmp_path / "mute", timeout=0.1):
            pass


async def test_somebody_who_talks_nonsense(tmp_path: Path) -> None:
    async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\xff\xfe not json\r\n" * 100)
        writer.close()

    server = await asyncio.start_unix_server(session, tmp_path / "odd")
    async with server:
        with pytest.raises(EngineGone):
            async with qmp.connect(tmp_path / "odd", timeout=5):
                pass


async def test_paths_longer_than_a_socket_address(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    sock, address, directory = qmp.unix_socket(folder / "long.sock")
    assert directory is not None
    sock.bind(address)
    sock.listen(1)
    assert (folder / "long.sock").is_socket()
    client, address, _ = qmp.unix_socket(folder / "long.sock")
    with sock, client:
        client.connect(address)


USERNET = """Hub -1 (net0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[ESTABLISHED]   14       127.0.0.1 36231       10.0.2.15    81     0     0\r
  TCP[HOST_FORWARD]   8       127.0.0.1 36231       10.0.2.15    81     0     0\r
  TCP[HOST_FORWARD]   3               * 46657       10.0.2.15    80     0     0\r
  UDP[HOST_FORWARD]  11       127.0.0.1 42203       10.0.2.15    82     0     0\r
"""


async def test_forwards_are_read_as_they_are_bound(serve: Serve) -> None:
    path = await serve(lambda command, arguments: USERNET)
    async with qmp.connect(path) as session:
        assert await ports.bound(session) == [
            PortRecord(81, 36231, "127.0.0.1", "tcp"),
            PortRecord(80, 46657, "0.0.0.0", "tcp"),
            PortRecord(82, 42203, "127.0.0.1", "udp"),
        ]


async def test_a_forward_that_qemu_refuses_is_an_error(serve: Serve) -> None:
    def answer(command: str, arguments: dict) -> object:
        return USERNET if arguments["command-line"] == "info usernet" else "Could not set up host forwarding rule"

    path = await serve(answer)
    async with qmp.connect(path) as session:
        with pytest.raises(HostError, match="Could not set up"):
            await ports.add(session, PortRecord(90, 1, "127.0.0.1", "tcp"))
