"""The agent's program: how it is built, its own tests in C, and what it does when a client misbehaves.

What it does for a client that behaves is in test_guest_real_agent.py.
"""

from __future__ import annotations

import ctypes
import io
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import posada.guest.binary
from posada.errors import HostError
from posada.guest.binary import agent_binary
from posada.proto import cbor, frames
from posada.proto.frames import FrameType, cbor_frame, frame

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "agent"
ARCH = os.uname().machine
RT_SIGACTION = {"x86_64": 13, "aarch64": 134}[ARCH]
TESTS = ("test_cbor", "test_frame", "test_tar", "fuzz")


@pytest.fixture(scope="session")
def binary() -> Path:
    return agent_binary(ARCH)


# -- the build ----------------------------------------------------------------------------------------------------------


class TestBuild:
    def test_static(self, binary: Path) -> None:
        """ELF64, and no program header asks for an interpreter or a dynamic section: any Linux can run it."""
        data = binary.read_bytes()
        assert data[:5] == b"\x7fELF\x02"
        offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
        kinds = {struct.unpack_from("<I", data, offset + i * size)[0] for i in range(count)}
        assert kinds.isdisjoint({2, 3})  # PT_DYNAMIC, PT_INTERP
        assert len(data) < 1 << 20

    def test_the_same_bytes_from_another_place(self, binary: Path, tmp_path: Path) -> None:
        shutil.copytree(AGENT, tmp_path / "elsewhere" / "agent", ignore=shutil.ignore_patterns("tests"))
        builder = tmp_path / "elsewhere" / "scripts" / "build_agent.py"
        builder.parent.mkdir()
        shutil.copy(ROOT / "scripts" / "build_agent.py", builder)
        shutil.copy(ROOT / "pyproject.toml", tmp_path / "elsewhere")
        subprocess.run(
            [sys.executable, builder, "--arch", ARCH, "--out", tmp_path], check=True, stdout=subprocess.DEVNULL
        )
        assert (tmp_path / binary.name).read_bytes() == binary.read_bytes()

    def test_it_does_not_know_where_it_was_built(self, binary: Path) -> None:
        assert str(ROOT).encode() not in binary.read_bytes()

    def test_its_version_is_posadas(self, binary: Path) -> None:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert said == f"posada-agent {project['version']}\n"

    def test_sources_that_do_not_compile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error is the compiler's; what an earlier build left is not passed off as today's."""
        (tmp_path / "agent").mkdir()
        (tmp_path / "agent" / "main.c").write_text("int main(void) { return undeclared; }")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / f"posada-agent-{ARCH}").write_text("old")
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        builder = posada.guest.binary._load_builder()
        monkeypatch.setattr(builder, "ROOT", tmp_path)
        monkeypatch.setattr(builder, "SOURCES", tmp_path / "agent")
        monkeypatch.setattr(posada.guest.binary, "_load_builder", lambda: builder)
        monkeypatch.setattr(posada.guest.binary, "_BIN", tmp_path / "bin")
        with pytest.raises(HostError, match="undeclared"):
            posada.guest.binary._built(ARCH)
        with pytest.raises(HostError, match="no guest agent for vax"):
            posada.guest.binary._built("vax")

    @pytest.mark.parametrize("arguments", [[], ["--listen"], ["--nonsense"]])
    def test_usage(self, binary: Path, arguments: list[str]) -> None:
        done = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=10, check=False)
        assert done.returncode == 2 and done.stderr.startswith("usage:")


def compiler() -> list[str]:
    """The host's, with its sanitizers; else zig's, which stops at undefined behaviour."""
    for name in ("clang", "gcc"):
        flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        probe = [name, *flags, "-x", "c", "-", "-o", "/dev/null"]
        if not shutil.which(name):
            continue
        if (
            subprocess.run(
                probe, input=b"int main(void) { return 0; }", check=False, stderr=subprocess.DEVNULL
            ).returncode
            == 0
        ):
            return [name, *flags]
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{ARCH}-linux-musl", "-O1"]
    return [*zig, "-fsanitize=undefined", "-fsanitize-trap=undefined"]


@pytest.mark.parametrize("name", TESTS)
def test_in_c(name: str, tmp_path: Path) -> None:
    sources = [f"tests/{name}.c", "cbor.c", "frame.c", "tar.c", "contain.c"]
    command = [
        *compiler(),
        "-std=gnu11",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-o",
        str(tmp_path / name),
        *sources,
    ]
    subprocess.run(command, cwd=AGENT, check=True)
    done = subprocess.run([tmp_path / name], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_test_in_c_is_run() -> None:
    assert {path.stem for path in (AGENT / "tests").glob("*.c")} == set(TESTS)


# -- clients that misbehave -----------------------------------------------------------------------------------------------


class Wire:
    """A client's end of a link, by hand."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.pending = b""

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def take(self, size: int) -> bytes:
        while len(self.pending) < size:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.pending += data
        taken, self.pending = self.pending[:size], self.pending[size:]
        return taken

    def greet(self) -> dict[str, Any]:
        nonce = os.urandom(16)
        self.send(frames.CLIENT_PREAMBLE, nonce, cbor_frame(0, FrameType.HELLO, {"version": 1, "min": 1}))
        while frames.AGENT_PREAMBLE + nonce not in self.pending:
            self.pending += self.socket.recv(65536)
        self.pending = self.pending.split(frames.AGENT_PREAMBLE + nonce, 1)[1]
        hello: dict[str, Any] = cbor.decode(self.frame()[3])
        return hello

    def frame(self) -> tuple[int, FrameType, int, bytes]:
        length, stream, kind, flags = frames.HEADER.unpack(self.take(frames.HEADER.size))
        return stream, FrameType(kind), flags, self.take(length)

    def until(self, stream: int, kind: FrameType) -> bytes:
        """The payload of the first such frame; what comes before it is dropped."""
        while True:
            got = self.frame()
            if got[:2] == (stream, kind):
                return got[3]

    def call(self, op: str, **args: Any) -> dict[str, Any]:
        self.send(cbor_frame(0, FrameType.CALL, {"id": 1, "op": op, "args": args}))
        reply: dict[str, Any] = cbor.decode(self.until(0, FrameType.REPLY))
        return reply

    def open(self, stream: int, kind: str, /, **args: Any) -> None:
        self.send(cbor_frame(stream, FrameType.OPEN, {"kind": kind, **args}))

    def closed(self, stream: int) -> dict[str, Any]:
        body: dict[str, Any] = cbor.decode(self.until(stream, FrameType.CLOSE))
        return body


class Agent:
    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process, self.path = process, path
        self.wires: list[Wire] = []

    def dial(self) -> Wire:
        wire = Wire()
        self.wires.append(wire)
        wire.socket.connect(str(self.path))
        return wire

    def connect(self) -> Wire:
        wire = self.dial()
        wire.greet()
        return wire

    def cpu(self) -> float:
        """Seconds of CPU it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes it holds that are its own."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(binary: Path, directory: Path, *options: str, ignored: tuple[int, ...] = ()) -> Iterator[Agent]:
    """``ignored``: signals that its starter ignores."""
    path = directory / "socket"

    def ignore() -> None:
        for number in ignored:
            libc.syscall(ctypes.c_long(RT_SIGACTION), ctypes.c_long(number), action, None, ctypes.c_long(8))

    libc, action = ctypes.CDLL(None), struct.pack("4Q", signal.SIG_IGN, 0, 0, 0)
    process = subprocess.Popen([binary, "--listen", path, *options], preexec_fn=ignore if ignored else None)
    agent = Agent(process, path)
    try:
        wait_for(path.exists)
        yield agent
        assert process.poll() is None, "the agent has died"
    finally:
        for wire in agent.wires:
            wire.socket.close()
        process.kill()
        process.wait()


@pytest.fixture
def agent(binary: Path, tmp_path: Path) -> Iterator[Agent]:
    with running(binary, tmp_path) as one:
        yield one


def wait_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """The letter of proc(5); Z for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def alive(pid: int) -> bool:
    return state_of(pid) != "Z"


class TestProtocol:
    def test_a_preamble_in_mid_stream_drops_everything(self, agent: Agent) -> None:
        wire = agent.connect()
        wire.open(1, "exec", argv=["sleep", "600"])
        pid = cbor.decode(wire.until(1, FrameType.OPENED))["pid"]
        wire.greet()
        wire.open(1, "exec", argv=["true"])  # the number is free again
        assert wire.closed(1) == {}
        wait_for(lambda: not alive(pid))

    def test_zeros_and_a_preamble_end_a_torn_frame(self, agent: Agent) -> None:
        for torn in (0, 3, 10, 5000):
            wire = agent.connect()
            wire.send((frames.HEADER.pack(65536, 1, FrameType.DATA, 0) + bytes(range(256)) * 20)[:torn], frames.RESYNC)
            wire.greet()
            assert wire.call("ping")["ok"] == {}

    @pytest.mark.parametrize(
        "evil",
        [
            cbor_frame(0, FrameType.HELLO, {"version": 1, "min": 1}),
            frame(0, FrameType.CALL, b"\xa1\x01\x02"),
            frame(1, FrameType.OPEN, b"\xff"),
            cbor_frame(1, FrameType.OPEN, {"kind": "exec", "argv": ["cat"]}) * 2,
            cbor_frame(1, FrameType.OPEN, {"kind": "exec", "argv": ["cat"]}) + frame(1, FrameType.CREDIT, b"\1\0\0\0"),
            cbor_frame(1, FrameType.OPEN, {"kind": "exec", "argv": ["sleep", "9"]})
            + frame(1, FrameType.DATA, bytes(65536)) * 9,
            cbor_frame(1, FrameType.OPEN, {"kind": "exec", "argv": ["cat"]})
            + frame(1, FrameType.EOF)
            + frame(1, FrameType.DATA, b"x"),
        ],
    )
    def test_errors_are_told_and_reset_the_link(self, agent: Agent, evil: bytes) -> None:
        wire = agent.connect()
        wire.send(evil)
        assert "error" in wire.closed(0)
        wire.greet()
        assert wire.call("ping")["ok"] == {}
        wait_for(lambda: wire.call("execs")["ok"]["execs"] == [])

    def test_too_old_or_too_new(self, agent: Agent) -> None:
        wire = agent.dial()
        wire.send(frames.CLIENT_PREAMBLE, bytes(16), cbor_frame(0, FrameType.HELLO, {"version": 9, "min": 2}))
        wire.take(32)
        assert "version 1" in wire.closed(0)["error"]

    def test_frames_of_streams_that_are_gone_are_ignored(self, agent: Agent) -> None:
        wire = agent.connect()
        wire.send(frame(7, FrameType.DATA, b"late"), frame(7, FrameType.CREDIT, bytes(4)), frame(7, FrameType.EOF))
        wire.send(cbor_frame(7, FrameType.CLOSE, {}), cbor_frame(7, FrameType.SIGNAL, {"signal": 9}))
        assert wire.call("ping")["ok"] == {}

    def test_at_most_64_streams(self, agent: Agent) -> None:
        wire = agent.connect()
        for stream in range(1, 66):
            wire.open(stream, "exec", argv=["cat"])
        assert "64" in wire.closed(65)["error"]
        wire.send(frame(64, FrameType.EOF))
        assert wire.closed(64) == {}
        wire.open(65, "exec", argv=["true"])
        assert wire.closed(65) == {}

    def test_a_ping_comes_back(self, agent: Agent) -> None:
        wire = agent.connect()
        wire.send(frame(0, FrameType.PING, b"x" * 64))
        assert wire.until(0, FrameType.PONG) == b"x" * 64


class TestBounds:
    def test_a_client_that_never_reads_costs_little(self, agent: Agent) -> None:
        """Answers pile up to a bound; then the agent stops listening to it, and works for others."""
        wire = agent.connect()
        ask = cbor_frame(0, FrameType.CALL, {"id": 1, "op": "list", "args": {"path": "/proc"}})
        wire.socket.setblocking(False)
        sent = 0
        while sent < 64 << 20:
            try:
                sent += wire.socket.send(ask * 100)
            except BlockingIOError:
                break
        assert sent < 8 << 20
        other = agent.connect()
        assert other.call("ping")["ok"] == {}
        assert agent.memory() < 16 << 20
        wire.socket.settimeout(10)
        assert wire.frame()[1] is FrameType.REPLY

    def test_streams_stop_at_their_window(self, agent: Agent) -> None:
        wire = agent.connect()
        wire.open(1, "exec", argv=["cat", "/dev/zero"])
        received = 0
        while received < frames.WINDOW:
            stream, kind, _, payload = wire.frame()
            assert stream == 1
            received += len(payload) if kind is FrameType.DATA else 0
        assert received == frames.WINDOW
        assert wire.call("ping")["ok"] == {}  # nothing of the stream has come before it
        before = agent.cpu()
        time.sleep(0.3)
        assert agent.cpu() - before < 0.1  # it waits, and does not spin
        wire.send(frame(1, FrameType.CREDIT, struct.pack("<I", 1000)))
        assert len(wire.until(1, FrameType.DATA)) == 1000

    def test_idle_means_idle(self, agent: Agent) -> None:
        wires = [agent.connect() for _ in range(3)]
        wires[0].open(1, "exec", argv=["sleep", "600"])
        wires[0].until(1, FrameType.OPENED)
        wires[1].open(1, "exec", argv=["cat"], pty={"rows": 1, "cols": 1})
        wires[1].until(1, FrameType.OPENED)
        before = agent.cpu()
        time.sleep(0.5)
        assert agent.cpu() - before < 0.05

    def test_descriptors_are_given_back(self, agent: Agent, tmp_path: Path) -> None:
        wire = agent.connect()
        fds = Path(f"/proc/{agent.process.pid}/fd")
        (tmp_path / "file").write_bytes(b"x" * 100_000)

        def use_everything() -> int:
            uses: list[tuple[str, dict[str, Any]]] = [
                ("exec", {"argv": ["true"]}), ("exec", {"argv": ["no-such-command"]}),
                ("exec", {"argv": ["true"], "pty": {"rows": 1, "cols": 1}}),
                ("exec", {"argv": ["true"], "user": "nobody-at-all"}), ("read", {"path": str(tmp_path / "file")}),
                ("read", {"path": "/nothing"}), ("tar-out", {"path": str(tmp_path / "file")}),
                ("connect", {"port": 1}), ("connect", {"unix": "/nothing"}), ("watch", {"path": "/nothing"}),
                ("write", {"path": "/nothing/there"}), ("attach", {"exec": 999}),
            ]  # fmt: skip
            for kind, args in uses:
                wire.open(1, kind, **args)
                wire.closed(1)
            for kind in ("write", "tar-in", "watch"):
                wire.open(1, kind, path=str(tmp_path / ("file" if kind == "write" else "")))
                wire.until(1, FrameType.OPENED)
                wire.send(cbor_frame(1, FrameType.CLOSE, {}))
                wire.closed(1)
            return len(list(fds.iterdir()))

        first = use_everything()
        for _ in range(5):
            assert use_everything() == first


class TestExec:
    def test_a_kept_exec_loses_nothing(self, agent: Agent) -> None:
        """Its link goes while a window is on its way; the next one gets all of it, then the rest, then the end."""
        wire = agent.connect()
        wire.open(1, "exec", argv=["seq", "1", "200000"], keep=True)
        number = cbor.decode(wire.until(1, FrameType.OPENED))["exec"]
        wire.until(1, FrameType.DATA)
        wire.socket.close()
        wire = agent.connect()
        data = b""
        wire.open(9, "attach", exec=number)
        while True:
            stream, kind, flags, payload = wire.frame()
            assert stream == 9
            if kind is FrameType.DATA:
                data += payload
                wire.send(frame(9, FrameType.CREDIT, struct.pack("<I", len(payload)), flags))
            elif kind is FrameType.EXIT:
                break
        assert cbor.decode(payload)["code"] == 0
        assert wire.closed(9) == {}
        assert data == b"".join(b"%d\n" % i for i in range(1, 200001))

    def test_input_that_was_not_asked_for_is_swallowed(self, agent: Agent) -> None:
        wire = agent.connect()
        wire.open(1, "exec", argv=["sleep", "0.2"], stdin=False)
        wire.send(frame(1, FrameType.DATA, b"x" * 65536) * 3, frame(1, FrameType.EOF))
        assert wire.closed(1) == {}

    def test_a_grandchild_may_write_on(self, agent: Agent, tmp_path: Path) -> None:
        """The exec is over for the client 200 ms after its process; who still holds its pipe does not die of SIGPIPE."""
        wire = agent.connect()
        go = tmp_path / "go"
        os.mkfifo(go)
        wire.open(
            1, "exec", argv=["sh", "-c", f"(read x < {go}; echo late && echo alive > {tmp_path}/fate) & echo early"]
        )
        assert wire.closed(1) == {}
        go.write_text("x\n")
        wait_for((tmp_path / "fate").exists)

    def test_close_ends_the_group(self, agent: Agent) -> None:
        wire = agent.connect()
        wire.open(1, "exec", argv=["sh", "-c", "trap '' HUP; sleep 600 & echo $!; wait"])
        pid = int(wire.until(1, FrameType.DATA))
        wire.send(cbor_frame(1, FrameType.CLOSE, {}))
        assert wire.closed(1) == {}
        wait_for(lambda: not alive(pid))

    def test_what_the_starter_ignored_is_not_ignored(self, binary: Path, tmp_path: Path) -> None:
        """Not even the signals that libc keeps for itself (32 to 34)."""
        ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, 32, 33, 34, 64)
        with running(binary, tmp_path, ignored=ignored) as agent:
            of_agent = Path(f"/proc/{agent.process.pid}/status").read_text()
            wire = agent.connect()
            wire.open(1, "exec", argv=["grep", "SigIgn", "/proc/self/status"], stdin=False)
            assert wire.until(1, FrameType.DATA).split() == [b"SigIgn:", b"0" * 16]
            assert f"SigIgn:\t{'0' * 16}" in of_agent

    def test_nothing_leaks_into_the_program(self, agent: Agent) -> None:
        wire = agent.connect()
        other = agent.connect()
        other.open(1, "exec", argv=["cat"])
        other.until(1, FrameType.OPENED)
        wire.open(
            1, "exec", argv=["sh", "-c", "ls /proc/self/fd; grep -E 'Sig(Blk|Ign)' /proc/self/status"], stdin=False
        )
        out = wire.until(1, FrameType.DATA).decode()
        while out.count("\n") < 6:
            out += wire.until(1, FrameType.DATA).decode()
        assert out.split() == ["0", "1", "2", "3", "SigBlk:", "0" * 16, "SigIgn:", "0" * 16]


class TestTar:
    @pytest.mark.parametrize("name", ["../out", "/tmp/posada-out", "in/../../out", "link/out"])
    def test_an_archive_cannot_leave_its_directory(self, agent: Agent, tmp_path: Path, name: str) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "link").symlink_to(tmp_path)
        wire = agent.connect()
        wire.open(1, "tar-in", path=str(tmp_path / "in"))
        wire.send(frame(1, FrameType.DATA, archive({name: b"evil"})), frame(1, FrameType.EOF))
        assert wire.closed(1)["errno"] in ("EPERM", "ELOOP")
        assert not (tmp_path / "out").exists() and not Path("/tmp/posada-out").exists()

    def test_nor_by_links_of_its_own(self, agent: Agent, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        for kind, target in (
            (tarfile.SYMTYPE, str(tmp_path)),
            (tarfile.LNKTYPE, "../secret"),
            (tarfile.LNKTYPE, "/etc/passwd"),
        ):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                link = tarfile.TarInfo("link")
                link.type, link.linkname = kind, target
                tar.addfile(link)
                tar.addfile(sized("link/new", 4), io.BytesIO(b"evil"))
            wire = agent.connect()
            wire.open(1, "tar-in", path=str(tmp_path / "in"))
            wire.send(frame(1, FrameType.DATA, buffer.getvalue()), frame(1, FrameType.EOF))
            assert wire.closed(1)["errno"] in ("EPERM", "ELOOP")
            assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "secret", "socket"]

    def test_a_damaged_archive_is_refused(self, agent: Agent, tmp_path: Path) -> None:
        whole = archive({"a": b"x" * 1000})
        for damaged in (b"x" * 512, whole[:700], whole[:100], b"\0" * 20 + whole):
            wire = agent.connect()
            wire.open(1, "tar-in", path=str(tmp_path / "in"))
            wire.send(frame(1, FrameType.DATA, damaged), frame(1, FrameType.EOF))
            assert wire.closed(1)["errno"] == "EBADMSG"

    @pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    def test_long_names_both_ways(self, agent: Agent, tmp_path: Path, style: int) -> None:
        deep = "/".join(["d" * 50] * 4) + "/" + "f" * 90  # 294 bytes: a prefix and a name can hold no more than 255 …
        if style == tarfile.USTAR_FORMAT:
            deep = "d" * 100 + "/" + "f" * 90  # … and this can be split
        wire = agent.connect()
        wire.open(1, "tar-in", path=str(tmp_path / "in"))
        wire.send(frame(1, FrameType.DATA, archive({f"top/{deep}": b"contents"}, style)), frame(1, FrameType.EOF))
        assert wire.closed(1) == {}
        assert (tmp_path / "in" / "top" / deep).read_bytes() == b"contents"
        wire.open(2, "tar-out", path=str(tmp_path / "in" / "top"))
        data, kind = b"", FrameType.OPENED
        while kind is not FrameType.EOF:
            _, kind, _, payload = wire.frame()
            data += payload if kind is FrameType.DATA else b""
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            member = tar.extractfile(f"top/{deep}")
            assert member is not None and member.read() == b"contents"


def sized(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def archive(files: dict[str, bytes], style: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as tar:
        for name, data in files.items():
            tar.addfile(sized(name, len(data)), io.BytesIO(data))
    return buffer.getvalue()


# -- a fork, below a test root --------------------------------------------------------------------------------------------


def identity(**changes: Any) -> dict[str, Any]:
    return {
        "generation": 3, "hostname": "kid", "machine_id": "cd" * 16, "macs": [], "entropy": bytes(64),
        "time_ns": time.time_ns(), "ssh_host_keys": False, **changes,
    }  # fmt: skip


class TestFork:
    @pytest.fixture
    def guest(self, binary: Path, tmp_path: Path) -> Iterator[Agent]:
        (tmp_path / "root" / "etc").mkdir(parents=True)
        (tmp_path / "root" / "etc" / "machine-id").write_text("old\n")
        with running(binary, tmp_path, "--test-root", str(tmp_path / "root")) as one:
            yield one

    def test_processes_stand_still_and_outlive_their_link(self, guest: Agent) -> None:
        source, fork = guest.connect(), guest.connect()
        source.open(1, "exec", argv=["sh", "-c", "while :; do echo tick; sleep 0.01; done"])
        source.until(1, FrameType.DATA)
        number = source.call("execs")["ok"]["execs"][0]["exec"]
        assert source.call("fork.prepare", token=b"t")["ok"] == {}
        assert source.call("fork.prepare", token=b"t")["errno"] == "EBUSY"
        source.open(2, "exec", argv=["true"])
        assert source.closed(2)["errno"] == "EBUSY"
        source.socket.close()
        fork.greet()  # as a fork's first client does it: on a link the source had, too
        assert fork.call("identity.reset", **identity(token=b"other"))["errno"] == "EINVAL"
        steps = fork.call("identity.reset", **identity(token=b"t"))["ok"]["steps"]
        assert set(steps) == {
            "links", "entropy", "clock", "hostname", "machine_id", "macs", "connections", "ssh_host_keys", "generation",
            "processes",
        }  # fmt: skip
        assert all(outcome.startswith("ok") for outcome in steps.values())
        fork.open(1, "attach", exec=number)
        assert b"tick" in fork.until(1, FrameType.DATA)
        wire = guest.connect()
        assert wire.greet()["generation"] == 3

    def test_in_the_source_what_lost_its_link_is_hung_up_afterwards(self, guest: Agent) -> None:
        source, other = guest.connect(), guest.connect()
        other.open(1, "exec", argv=["sleep", "600"])
        pid = cbor.decode(other.until(1, FrameType.OPENED))["pid"]
        source.call("fork.prepare", token=b"t")
        other.socket.close()
        source.call("ping")
        assert alive(pid)
        assert source.call("fork.done", token=b"t")["ok"] == {}
        wait_for(lambda: not alive(pid))

    def test_what_identity_reset_refuses(self, guest: Agent, tmp_path: Path) -> None:
        wire = guest.connect()
        for wrong in (
            {"hostname": "a/b"}, {"hostname": ""}, {"hostname": "x" * 65}, {"machine_id": "XY" * 16}, {"entropy": b"few"},
            {"macs": ["nonsense"]}, {"macs": ["52:54:00:00:00:01"] * 9}, {"generation": "1"}, {"time_ns": 0},
        ):  # fmt: skip
            assert wire.call("identity.reset", **identity(**wrong))["errno"] == "EINVAL", wrong
        assert (tmp_path / "root" / "etc" / "machine-id").read_text() == "old\n"

    def test_a_failed_step_thaws_nothing(self, guest: Agent, tmp_path: Path) -> None:
        wire = guest.connect()
        wire.open(1, "exec", argv=["sleep", "600"], keep=True)
        pid = cbor.decode(wire.until(1, FrameType.OPENED))["pid"]
        (tmp_path / "root" / "run").write_text("not a directory")  # so the generation cannot be written
        assert "generation" in wire.call("identity.reset", **identity())["error"]
        wait_for(lambda: state_of(pid) == "T")  # SIGSTOP takes a moment; SIGCONT has not come
        os.kill(pid, signal.SIGKILL)

    def test_ssh_host_keys_are_remade(self, guest: Agent, tmp_path: Path) -> None:
        keys = tmp_path / "root" / "etc" / "ssh"
        keys.mkdir()
        for name in ("ssh_host_rsa_key", "ssh_host_rsa_key.pub", "ssh_host_ed25519_key", "sshd_config"):
            (keys / name).write_text("old")
        outcome = guest.connect().call("identity.reset", **identity(ssh_host_keys=True))["ok"]["steps"]["ssh_host_keys"]
        assert (keys / "sshd_config").read_text() == "old"
        left = {path.name for path in keys.iterdir() if path.read_text() == "old"}
        assert left == {"sshd_config"}
        if "no ssh-keygen" not in outcome:
            assert b"OPENSSH PRIVATE KEY" in (keys / "ssh_host_ed25519_key").read_bytes()


# -- garbage --------------------------------------------------------------------------------------------------------------


def garbage(chance: random.Random, directory: Path) -> bytes:
    """What a broken or hostile client may send. Only such requests that do no harm when they are understood."""
    here = str(directory)
    good = [
        cbor_frame(0, FrameType.CALL, {"id": chance.randrange(9), "op": op, "args": args})
        for op, args in (
            ("ping", {}), ("stat", {"path": here}), ("list", {"path": here}), ("execs", {}), ("metrics", {}),
            ("fork.done", {"token": b"x"}),
        )
    ] + [
        cbor_frame(chance.randrange(1, 5), FrameType.OPEN, body)
        for body in (
            {"kind": "exec", "argv": [f"{here}/no"], "env": {"A": "b"}}, {"kind": "exec", "argv": ["/bin/cat"]},
            {"kind": "exec", "argv": ["/bin/cat"], "stdin": False},
            {"kind": "exec", "argv": ["/bin/cat"], "pty": {"rows": 1, "cols": 2}}, {"kind": "read", "path": "/proc/self/maps"},
            {"kind": "tar-out", "path": here}, {"kind": "watch", "path": here}, {"kind": "connect", "port": 1},
            {"kind": "tar-in", "path": f"{here}/unpacked"},
        )
    ] + [
        frame(chance.randrange(1, 5), FrameType.DATA, archive({"a": b"b"})),
        frame(chance.randrange(1, 5), FrameType.CREDIT, struct.pack("<I", chance.choice([1, 5, 1000, 1 << 31]))),
        frame(chance.randrange(1, 5), FrameType.EOF), cbor_frame(chance.randrange(1, 5), FrameType.CLOSE, {}),
        cbor_frame(chance.randrange(1, 5), FrameType.SIGNAL, {"signal": chance.choice([0, 1, 15, 99, 1 << 40])}),
        cbor_frame(chance.randrange(1, 5), FrameType.RESIZE, {"rows": 1 << 20, "cols": -1}),
        frame(0, FrameType.PING, b"x"),
    ]  # fmt: skip
    data = bytearray(b"".join(chance.choices(good, k=chance.randrange(1, 12))))
    for _ in range(chance.choice([0, 0, 1, 3])):
        data[chance.randrange(len(data))] = chance.choice(
            [0, 1, 0x1B, 0x7F, 0x80, 0xA1, 0xBF, 0xFF, chance.randrange(256)]
        )
    if chance.random() < 0.1:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_it_survives_garbage(binary: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with running(binary, tmp_path) as agent:
        for _ in range(60):
            wire = agent.connect()
            wire.socket.settimeout(0.002)
            for _ in range(chance.randrange(1, 6)):
                wire.send(garbage(chance, tmp_path))
                try:
                    wire.socket.recv(1 << 16)
                except TimeoutError:
                    pass
            wire.socket.close()
        assert agent.connect().call("ping")["ok"] == {}
        assert agent.memory() < 16 << 20
