"""The client against the real agent, which runs here as a process that listens on a unix socket (``--listen``).

It sees this host's files and processes, so the tests stay below their temporary directory.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from test_guest_files import describe, make_tree

from posada.errors import GuestError, GuestGone, StreamClosed, Timeout
from posada.guest.binary import agent_binary
from posada.guest.client import GuestClient
from posada.model.exec import IdentityReset, Output, Pty
from posada.model.files import FileType, Transfer
from posada.proto import frames
from posada.proto.frames import WINDOW, FrameType, cbor_frame, frame


@pytest.fixture(scope="session")
def binary() -> Path:
    return agent_binary("x86_64")


@asynccontextmanager
async def agent(binary: Path, directory: Path, *options: str) -> AsyncIterator[tuple[Path, asyncio.subprocess.Process]]:
    """The agent's process and socket."""
    socket = directory / "agent"
    process = await asyncio.create_subprocess_exec(binary, "--listen", socket, *options)
    try:
        yield socket, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def real_client(binary: Path, directory: Path, *options: str) -> AsyncIterator[GuestClient]:
    async with agent(binary, directory, *options) as (socket, _):
        async with await GuestClient.connect([socket], timeout=10) as client:
            yield client


async def until_gone(pid: int) -> None:
    """Until a process that is not ours has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(10):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)


class TestLink:
    async def test_hello(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            hello = client.hello
        assert (hello.version, hello.min, hello.window, hello.init) == (1, 1, WINDOW, False)
        assert (hello.kernel, hello.arch, hello.hostname) == (
            os.uname().release,
            os.uname().machine,
            os.uname().nodename,
        )
        assert hello.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    async def test_one_client_after_another(self, binary: Path, tmp_path: Path) -> None:
        async with agent(binary, tmp_path) as (socket, _):
            for _ in range(20):
                async with await GuestClient.connect([socket], timeout=10) as client:
                    assert await client.call("ping") == {}

    @pytest.mark.parametrize(
        "junk",
        [
            b"\xff" * 100_000,
            frames.CLIENT_PREAMBLE[:9],
            frames.CLIENT_PREAMBLE + b"half a nonce",
            frames.CLIENT_PREAMBLE + bytes(16) + frames.HEADER.pack(60_000, 1, FrameType.DATA, 0) + b"torn",
            frames.CLIENT_PREAMBLE
            + bytes(16)
            + cbor_frame(0, FrameType.CALL, {"id": 1, "op": "ping", "args": {}})[:-2],
        ],
    )
    async def test_whatever_an_earlier_client_left_in_the_channel(
        self, binary: Path, tmp_path: Path, junk: bytes
    ) -> None:
        """As on a virtio port, which does not close: the junk comes first, on the same connection."""
        async with agent(binary, tmp_path) as (socket, _):
            await until_listening(socket)
            link_socket = tmp_path / "link"

            async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                up_reader, up_writer = await asyncio.open_unix_connection(socket)
                up_writer.write(junk)
                await asyncio.wait(
                    [asyncio.ensure_future(pipe(reader, up_writer)), asyncio.ensure_future(pipe(up_reader, writer))]
                )

            async with await asyncio.start_unix_server(relay, link_socket):
                async with await GuestClient.connect([link_socket], timeout=10) as client:
                    assert (await client.run(["echo", "clean"])).stdout == "clean\n"

    @pytest.mark.parametrize(
        "evil",
        [
            bytes(10),
            b"\xff" * 10,
            frame(0, FrameType.CALL, b"\xc1\x00"),
            frame(0, FrameType.CALL, b"\x9f\xff"),
            cbor_frame(0, FrameType.CALL, {"id": 1}),
            cbor_frame(0, FrameType.REPLY, {"id": 1, "ok": {}}),
            frame(5, FrameType.EOF, b"x"),
        ],
    )
    async def test_a_client_that_breaks_the_protocol_can_come_again(
        self, binary: Path, tmp_path: Path, evil: bytes
    ) -> None:
        async with agent(binary, tmp_path) as (socket, process):
            await until_listening(socket)
            _, writer = await asyncio.open_unix_connection(socket)
            writer.write(frames.CLIENT_PREAMBLE + bytes(16) + evil)
            writer.close()
            async with await GuestClient.connect([socket], timeout=10) as client:
                assert (await client.run(["true"])).ok
            assert process.returncode is None

    async def test_the_agent_dies(self, binary: Path, tmp_path: Path) -> None:
        async with agent(binary, tmp_path) as (socket, process):
            async with await GuestClient.connect([socket], timeout=10) as client:
                waiting = [
                    asyncio.ensure_future(client.run(["sleep", "1000"])),
                    asyncio.ensure_future(client.exec(["cat"])),
                ]
                await client.call("ping")
                process.kill()
                async with asyncio.timeout(5):
                    results = await asyncio.gather(*waiting, return_exceptions=True)
                assert isinstance(results[0], GuestGone)
                with pytest.raises(GuestGone):
                    await client.call("ping")


async def until_listening(socket: Path) -> None:
    async with asyncio.timeout(10):
        async with await GuestClient.connect([socket]):
            pass


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


class TestExec:
    async def test_output_status_and_signals(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            result = await client.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
            assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
            result = await client.run(["sh", "-c", "kill -9 $$"])
            assert (result.exit_code, result.signal) == (None, 9)

    async def test_surroundings(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "work").mkdir()
        async with real_client(binary, tmp_path) as client:
            result = await client.run(
                ["sh", "-c", "pwd; echo $COLOUR"], cwd=str(tmp_path / "work"), env={"COLOUR": "blue"}
            )
            assert result.stdout == f"{tmp_path}/work\nblue\n"
            assert (await client.run(["env"], env={"ONLY": "this"}, clear_env=True)).stdout == "ONLY=this\n"
            assert "PATH=/usr/local/sbin:" in (await client.run(["env"])).stdout
            assert (await client.run(["cat"])).stdout == ""

    @pytest.mark.parametrize("size", [0, 1, 65536, 65537, 3 * WINDOW + 17])
    async def test_input(self, binary: Path, tmp_path: Path, size: int) -> None:
        data = os.urandom(size)
        async with real_client(binary, tmp_path) as client:
            assert (await client.run(["cat"], input=data)).stdout_bytes == data

    async def test_input_that_is_not_read(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            assert (await client.run(["head", "-c1"], input=b"x" * (4 * WINDOW))).stdout == "x"
            process = await client.exec(["true"], stdin=True)
            await process.wait()
            with pytest.raises(StreamClosed):
                await process.write(b"x" * (2 * WINDOW))

    async def test_what_cannot_be_executed(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("text")
        async with real_client(binary, tmp_path) as client:
            for argv, name, options in (
                (["no-such-command"], "ENOENT", {}),
                ([str(tmp_path / "nothing")], "ENOENT", {}),
                ([str(tmp_path / "plain")], "EACCES", {}),
                ([str(tmp_path)], "EACCES", {}),
                (["true"], "ENOENT", {"cwd": "/nowhere"}),
            ):
                with pytest.raises(GuestError) as caught:
                    await client.run(argv, **options)  # type: ignore[arg-type]
                assert caught.value.errno_name == name
                wrong = str(options.get("cwd", argv[0]))
                assert f"{wrong}: {os.strerror(getattr(errno, name))}" in str(caught.value)
            with pytest.raises(GuestError, match="no such user"):
                await client.run(["true"], user="no-such-user")

    async def test_streaming(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            process = await client.exec(["cat"], stdin=True)
            for data in (b"one", b"two"):
                await process.write(data)
                assert await process.read() == Output("stdout", data, data.decode())
            await process.close_stdin()
            assert await process.read() is None
            assert (await process.wait()).ok

    async def test_signals_and_groups(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            process = await client.exec(["sh", "-c", "sleep 600 & echo $!; wait"])
            output = await process.read()
            assert output is not None
            await process.signal(signal.SIGTERM)
            assert (await process.wait()).signal == signal.SIGTERM
            await until_gone(int(output.text))

    async def test_terminal(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            script = "stty size; read x; stty size; echo $TERM; test -t 0 && test -t 2 && echo terminal"
            process = await client.exec(["sh", "-c", script], stdin=True, pty=Pty(30, 90, "vt100"))
            text = ""
            while not text.endswith("30 90\r\n"):
                output = await process.read()
                assert output is not None
                text += output.text
            await process.resize(40, 100)
            await process.write(b"go\n")
            assert (await process.wait()).stdout.replace("\r", "").endswith("40 100\nvt100\nterminal\n")

    async def test_leaving_hangs_up(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            async with await client.exec(["sleep", "600"]) as process:
                pid = process.pid
            await until_gone(pid)
            with pytest.raises(Timeout):
                await client.run(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"], timeout=0.5)
            await until_gone(int((tmp_path / "pid").read_text()))

    async def test_streams_left_early_are_free_again(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(4 * WINDOW))
        async with real_client(binary, tmp_path) as client, asyncio.timeout(30):
            for _ in range(80):  # more than there are streams
                async with await client.exec(["yes"]) as process:
                    assert await process.read() is not None
                pieces = client.read_stream(f"{tmp_path}/file")
                assert await anext(pieces)
                await pieces.aclose()  # type: ignore[attr-defined]
            assert (await client.run(["true"])).ok
            assert client._link._link.streams <= 1

    async def test_a_message_that_is_not_accepted_ends_the_link(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            process = await client.exec(["sleep", "600"])
            client._link._write(frame(0, FrameType.CALL, b"\xc1\x00"))
            with pytest.raises(GuestGone, match="ended the link"):
                await process.wait()
            await until_gone(process.pid)

    async def test_what_ignores_the_hangup_is_killed(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            process = await client.exec(["sh", "-c", "trap '' HUP; echo up; while :; do sleep 0.05; done"])
            assert await process.read() is not None
            await process.close()
            await until_gone(process.pid)

    async def test_the_end_of_the_client_hangs_up(self, binary: Path, tmp_path: Path) -> None:
        async with agent(binary, tmp_path) as (socket, _):
            async with await GuestClient.connect([socket], timeout=10) as client:
                pid = (await client.exec(["sleep", "600"])).pid
            await until_gone(pid)

    async def test_kept(self, binary: Path, tmp_path: Path) -> None:
        async with agent(binary, tmp_path) as (socket, _):
            async with await GuestClient.connect([socket], timeout=10) as client:
                process = await client.exec(["sh", "-c", "echo early; read x; echo got $x"], stdin=True, keep=True)
                number = process.exec_id
            async with await GuestClient.connect([socket], timeout=10) as client:
                assert [e["exec"] for e in (await client.call("execs"))["execs"] if e["running"]] == [number]
                process = await client.attach(number)
                await process.write(b"it\n")
                assert (await process.wait()).stdout.removeprefix("early\n") == "got it\n"
                with pytest.raises(GuestError):
                    await client.attach(number + 1)

    async def test_a_grandchild_that_keeps_the_pipes(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            result = await client.run(["sh", "-c", "sleep 600 & echo $!"], timeout=10)
            assert result.exit_code == 0
            os.kill(int(result.stdout), signal.SIGKILL)

    async def test_many_at_once(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            results = await asyncio.gather(*(client.run(["echo", str(i)]) for i in range(150)))
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(150)]

    async def test_a_slow_reader_blocks_nobody(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            slow = await client.exec(["yes"])
            for i in range(20):
                assert (await client.run(["echo", str(i)])).stdout == f"{i}\n"
            total = 0
            async for output in slow:
                total += len(output.data)
                if total > 20 * WINDOW:
                    break
            await slow.close()
            await until_gone(slow.pid)

    async def test_a_round_trip_takes_milliseconds(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            pings, runs = [], []
            for _ in range(50):
                start = time.perf_counter()
                await client.call("ping")
                pings.append(time.perf_counter() - start)
                start = time.perf_counter()
                await client.run(["true"])
                runs.append(time.perf_counter() - start)
        assert min(pings) < 0.001
        assert min(runs) < 0.010


class TestFiles:
    @pytest.mark.parametrize("size", [0, 1, 65536, 65537, 5 * WINDOW + 1])
    async def test_content(self, binary: Path, tmp_path: Path, size: int) -> None:
        data = os.urandom(size)
        async with real_client(binary, tmp_path) as client:
            path = f"{tmp_path}/made/file"
            await client.write_file(path, data, mode=0o640, mkdir=True)
            assert await client.read_file(path) == data
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
        assert [p.name for p in (tmp_path / "made").iterdir()] == ["file"]

    async def test_ranges(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            path = f"{tmp_path}/file"
            await client.write_file(path, b"0123456789")
            assert await client.read_file(path, offset=3, length=4) == b"3456"
            assert await client.read_file(path, offset=8, length=100) == b"89"
            assert await client.read_file(path, offset=100) == b""
            await client.write_file(path, b"xy", offset=4)
            await client.write_file(path, b"!", append=True)
            assert await client.read_file(path) == b"0123xy6789!"
            assert b"posada-agent" in await client.read_file("/proc/self/comm")

    async def test_an_abandoned_write_leaves_nothing(self, binary: Path, tmp_path: Path) -> None:
        async def source() -> AsyncIterator[bytes]:
            yield b"new" * 100_000
            raise RuntimeError("out of ink")

        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "file").write_text("old")
        async with real_client(binary, tmp_path) as client:
            with pytest.raises(RuntimeError, match="ink"):
                await client.write_stream(f"{tmp_path}/d/file", source())
            await client.call("ping")
            assert (tmp_path / "d" / "file").read_text() == "old"
            assert [p.name for p in (tmp_path / "d").iterdir()] == ["file"]

    async def test_errors(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        async with real_client(binary, tmp_path) as client:
            for work, name in (
                (client.read_file(f"{tmp_path}/nothing"), "ENOENT"),
                (client.read_file(f"{tmp_path}"), "EISDIR"),
                (client.write_file(f"{tmp_path}/no/such", b"x"), "ENOENT"),
                (client.stat(f"{tmp_path}/file/below"), "ENOTDIR"),
                (client.mkdir(f"{tmp_path}/file"), "EEXIST"),
                (client.remove(f"{tmp_path}/nothing"), "ENOENT"),
                (client.rename(f"{tmp_path}/nothing", f"{tmp_path}/x"), "ENOENT"),
                (client.list_dir(f"{tmp_path}/nothing"), "ENOENT"),
                (client.download(f"{tmp_path}/nothing", tmp_path / "out"), "ENOENT"),
            ):
                with pytest.raises(GuestError) as caught:
                    await work
                assert caught.value.errno_name == name, work

    async def test_names(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            top = f"{tmp_path}/d"
            await client.mkdir(f"{top}/a/b", parents=True)
            await client.mkdir(f"{top}/a/b", parents=True)
            await client.write_file(f"{top}/a/file", b"12345", mode=0o600)
            await client.symlink("file", f"{top}/a/link")
            info, link = await client.stat(f"{top}/a/file"), await client.stat(f"{top}/a/link", follow=False)
            assert (info.type, info.size, info.mode, info.uid) == (FileType.FILE, 5, 0o600, os.getuid())
            assert info.mtime_ns == os.stat(f"{top}/a/file").st_mtime_ns
            assert (link.type, link.target) == (FileType.LINK, "file")
            assert (await client.stat(f"{top}/a/link")).type is FileType.FILE
            await client.chmod(f"{top}/a/file", 0o400)
            await client.rename(f"{top}/a/file", f"{top}/a/renamed")
            entries = [(e.name, e.type, e.mode & 0o777) for e in await client.list_dir(f"{top}/a")]
            assert entries == [
                ("b", FileType.DIRECTORY, 0o755), ("link", FileType.LINK, 0o777), ("renamed", FileType.FILE, 0o400),
            ]  # fmt: skip
            with pytest.raises(GuestError):
                await client.remove(f"{top}/a")
            await client.remove(f"{top}/a", recursive=True)
            assert await client.list_dir(top) == []

    async def test_a_long_listing(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        names = [f"{i:04}-{'x' * 120}" for i in range(1234)]
        for name in names:
            (tmp_path / "d" / name).touch()
        async with real_client(binary, tmp_path) as client:
            assert [e.name for e in await client.list_dir(f"{tmp_path}/d")] == names

    async def test_trees_there_and_back(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "tree").mkdir()
        make_tree(tmp_path / "tree")
        async with real_client(binary, tmp_path) as client:
            sent = await client.upload(tmp_path / "tree", f"{tmp_path}/srv/copy")
            assert describe(tmp_path / "srv" / "copy") == describe(tmp_path / "tree")
            got = await client.download(f"{tmp_path}/srv/copy", tmp_path / "back")
            assert describe(tmp_path / "back") == describe(tmp_path / "tree")
            assert (got.files, got.bytes, got.skipped) == (13, sent.bytes, ())
            # Again, into what is there: merged, read-only files replaced.
            await client.upload(tmp_path / "tree", f"{tmp_path}/srv/copy/../copy/")
            assert describe(tmp_path / "srv" / "copy" / "tree") == describe(tmp_path / "tree")

    async def test_a_link_to_a_directory_is_followed_at_the_top(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").write_text("x")
        (tmp_path / "link").symlink_to("real")
        async with real_client(binary, tmp_path) as client:
            assert await client.download(f"{tmp_path}/link", tmp_path / "out") == Transfer(files=1, bytes=1)
            assert await client.download(f"{tmp_path}/real/", tmp_path / "out2") == Transfer(files=1, bytes=1)
            assert await client.download(f"{tmp_path}/real/.", tmp_path / "out3") == Transfer(files=1, bytes=1)
        for name in ("out", "out2", "out3"):
            assert (tmp_path / name / "file").read_text() == "x"

    async def test_fifos_do_not_block(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        os.mkfifo(tmp_path / "d" / "fifo")
        async with real_client(binary, tmp_path) as client, asyncio.timeout(10):
            await client.download(f"{tmp_path}/d", tmp_path / "out")
            assert not (tmp_path / "out" / "fifo").exists()
            with pytest.raises(GuestError):
                await client.download(f"{tmp_path}/d/fifo", tmp_path / "out")
            assert await client.read_file(f"{tmp_path}/d/fifo") == b""  # as cat would find it, had it a writer once

    async def test_watching(self, binary: Path, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        async with real_client(binary, tmp_path) as client, asyncio.timeout(10):
            changes = client.watch(f"{tmp_path}/d")
            first = asyncio.ensure_future(anext(changes))
            await client.call("ping")
            await client.call("ping")
            (tmp_path / "d" / "new").write_text("x")
            notice = await first
            assert notice.body["name"] == "new"
            await changes.aclose()  # type: ignore[attr-defined]

    async def test_throughput(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            data = os.urandom(32 << 20)
            start = time.perf_counter()
            await client.write_file(f"{tmp_path}/file", data)
            assert await client.read_file(f"{tmp_path}/file") == data
            assert time.perf_counter() - start < 10


class TestConnections:
    async def test_echo_with_half_close(self, binary: Path, tmp_path: Path) -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"<" + await reader.read() + b">")
            writer.close()

        tcp = await asyncio.start_server(echo, "127.0.0.1", 0)
        unix = await asyncio.start_unix_server(echo, tmp_path / "echo")
        port = tcp.sockets[0].getsockname()[1]
        async with tcp, unix, real_client(binary, tmp_path) as client:
            for socket in (await client.open_tcp(port), await client.open_unix(f"{tmp_path}/echo")):
                await socket.write(b"x" * 600_000)
                socket.write_eof()
                received = b""
                while data := await socket.read():
                    received += data
                assert received == b"<" + b"x" * 600_000 + b">"
                socket.close()

    async def test_refused(self, binary: Path, tmp_path: Path) -> None:
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with real_client(binary, tmp_path) as client:
            with pytest.raises(GuestError) as caught:
                await client.open_tcp(port)
            assert caught.value.errno_name == "ECONNREFUSED"


class TestCalls:
    async def test_metrics(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            metrics = await client.call("metrics")
        assert metrics["mem_total"] > metrics["mem_available"] > 0
        assert metrics["uptime_ms"] > 0

    async def test_unknown(self, binary: Path, tmp_path: Path) -> None:
        async with real_client(binary, tmp_path) as client:
            with pytest.raises(GuestError):
                await client.call("dance")
            stream = await client._link.open_stream({"kind": "dance"}, what="dance")
            with pytest.raises(GuestError, match="dance"):
                await stream.opened()

    @pytest.mark.parametrize("op", ["poweroff", "reboot", "freeze"])
    async def test_outside_a_guest_the_machine_is_left_alone(self, binary: Path, tmp_path: Path, op: str) -> None:
        async with real_client(binary, tmp_path) as client:
            with pytest.raises(GuestError):
                await client.call(op)

    async def test_a_fork_below_a_root_of_its_own(self, binary: Path, tmp_path: Path) -> None:
        root = tmp_path / "root"
        for directory in ("etc", "run", "tmp"):
            (root / directory).mkdir(parents=True)
        (root / "etc" / "machine-id").write_text("0" * 32 + "\n")
        async with real_client(binary, tmp_path, "--test-root", str(root)) as client:
            await client.fork_prepare(b"token" * 4)
            with pytest.raises(GuestError):
                await client.fork_done(b"another")
            await client.fork_done(b"token" * 4)
            await client.fork_prepare(b"again" * 4)
            steps = await client.identity_reset(
                IdentityReset(
                    generation=7,
                    hostname="child",
                    machine_id="ab" * 16,
                    entropy=os.urandom(64),
                    time_ns=time.time_ns(),
                    token=b"again" * 4,
                    ssh_host_keys=False,
                )
            )
            assert all(isinstance(step, str) for step in steps.values())
        assert (root / "etc" / "machine-id").read_text().strip() == "ab" * 16
        assert (root / "run" / "posada" / "generation").read_text().strip() == "7"
