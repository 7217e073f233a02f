"""Commands of the fake agent: real processes of this host."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import struct
import termios
import time
from typing import TYPE_CHECKING, Any

from posada.errors import GuestError
from posada.guest.stream import Stream
from posada.proto import events

if TYPE_CHECKING:
    from posada.guest.fake_agent import FakeGuest
    from posada.guest.fake_link import FakeLink

_HANGUP_PATIENCE = 2.0
_GRANDCHILD_PATIENCE = 0.2
_CHUNK = 65536
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class FakeExec:
    """A process, the pumps of its output, and the stream that is attached to it, if any."""

    def __init__(self, process: asyncio.subprocess.Process, argv0: str, keep: bool, master: int | None) -> None:
        self.process = process
        self.argv0 = argv0
        self.keep = keep
        self.stream: Stream | None = None
        self.link: FakeLink | None = None
        self.number = 0
        self.master = master
        self._attached = asyncio.Event()
        self._started = time.monotonic()
        self._group_ended = False
        readers: list[tuple[int, asyncio.StreamReader]] = []
        for flags, reader in ((0, process.stdout), (1, process.stderr)):
            if reader is not None:
                readers.append((flags, reader))
        self.pumps = [asyncio.ensure_future(self._pump(flags, reader)) for flags, reader in readers]
        if master is not None:
            self.pumps.append(asyncio.ensure_future(self._pump_terminal(master)))

    def attach(self, link: FakeLink, stream: Stream) -> None:
        self.link, self.stream = link, stream
        link.controls[stream.number] = self._control
        self._attached.set()

    def freeze(self, stop: bool) -> None:
        self._kill(signal.SIGSTOP if stop else signal.SIGCONT)

    async def destroy(self) -> None:
        self._kill(signal.SIGKILL)
        for pump in self.pumps:
            pump.cancel()
        await self.process.wait()
        self._close_terminal()

    async def serve(self, guest: FakeGuest) -> None:
        """Feed it from its stream until it has ended, and tell how it did. Leaves with the stream unless kept."""
        stream, link = self.stream, self.link
        if stream is None or link is None:
            raise RuntimeError("nobody is attached")
        feeder = asyncio.ensure_future(self._feed(stream))
        gone = asyncio.ensure_future(_until_closed(stream))
        ended = asyncio.ensure_future(self._end())
        try:
            await asyncio.wait([gone, ended], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                for flags in (0, 1) if self.master is None else (0,):
                    stream.send_eof(flags)
                code = self.process.returncode or 0
                ms = int(1000 * (time.monotonic() - self._started))
                link.exited(stream, code=code if code >= 0 else None, signal=-code, ms=ms)
                guest.execs.pop(self.number, None)
                self._close_terminal()
        finally:
            for task in (feeder, gone, ended):
                task.cancel()
            if not ended.done() and self.stream is stream:
                self._detach()
                if not self.keep and guest.token is None:
                    asyncio.ensure_future(self._hang_up(guest))  # noqa: RUF006  (held by guest.execs)

    def _detach(self) -> None:
        self.stream = self.link = None
        self._attached.clear()

    async def _hang_up(self, guest: FakeGuest) -> None:
        self._kill(signal.SIGHUP)
        try:
            await asyncio.wait_for(asyncio.shield(self.process.wait()), _HANGUP_PATIENCE)
        except TimeoutError:
            pass
        await self.destroy()
        guest.execs.pop(self.number, None)

    async def _end(self) -> None:
        """The process has ended, and so have its pipes, unless a grandchild keeps them."""
        await self.process.wait()
        await asyncio.wait(self.pumps, timeout=_GRANDCHILD_PATIENCE)

    async def _feed(self, stream: Stream) -> None:
        while (piece := await stream.receive()) is not None:
            if self.master is not None:
                await asyncio.to_thread(os.write, self.master, piece[1])
            elif self.process.stdin is not None:
                with contextlib.suppress(ConnectionError):
                    self.process.stdin.write(piece[1])
                    await self.process.stdin.drain()
        if not stream.closed and self.process.stdin is not None:
            self.process.stdin.close()

    async def _pump(self, flags: int, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            await self._deliver(flags, data)

    async def _pump_terminal(self, master: int) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(master, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                try:
                    data = os.read(master, _CHUNK)
                except BlockingIOError:
                    continue
                await self._deliver(0, data)
        except OSError:  # EIO: the last process has closed the terminal.
            pass
        finally:
            loop.remove_reader(master)

    async def _deliver(self, flags: int, data: bytes) -> None:
        """To the stream that is attached; without one, wait for one."""
        while True:
            await self._attached.wait()
            try:
                if self.stream is not None:
                    await self.stream.send(data, flags)
                return
            except GuestError:
                self._detach()

    def _control(self, event: events.Event) -> None:
        if isinstance(event, events.Signal):
            self._kill(event.signal, group=event.group)
        elif isinstance(event, events.Resize) and self.master is not None:
            _set_size(self.master, event.rows, event.cols)

    def _kill(self, number: int, *, group: bool = True) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.process.pid, number)

    def _close_terminal(self) -> None:
        if self.master is not None:
            os.close(self.master)
            self.master = None


async def execute(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    user = str(body.get("user", "root")).partition(":")[0]
    base = {"PATH": _PATH, "HOME": str(guest.root), "USER": user, "LOGNAME": user, "SHELL": "/bin/sh"}
    env = {**({} if body.get("clear_env") else base), **body.get("env", {})}
    options: dict[str, Any] = {
        "cwd": guest.path(body.get("cwd", "/")),
        "env": env,
        "start_new_session": True,
        "stdin": asyncio.subprocess.PIPE if body.get("stdin") else asyncio.subprocess.DEVNULL,
        "stdout": asyncio.subprocess.PIPE,
        "stderr": asyncio.subprocess.PIPE,
    }
    master: int | None = None
    if "pty" in body:
        master, slave = pty.openpty()
        os.set_blocking(master, False)
        _set_size(master, body["pty"]["rows"], body["pty"]["cols"])
        env["TERM"] = body["pty"].get("term", "xterm")
        options.update(stdin=slave, stdout=slave, stderr=slave, preexec_fn=_own_terminal)
    try:
        process = await asyncio.create_subprocess_exec(*body["argv"], **options)
    except BaseException:
        if master is not None:
            os.close(master)
        raise
    finally:
        if master is not None:
            os.close(slave)
    job = FakeExec(process, body["argv"][0], bool(body.get("keep")), master)
    job.number = guest.register(job)
    link.opened(stream, {"pid": process.pid, "exec": job.number})
    job.attach(link, stream)
    await job.serve(guest)


async def attach(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    job = guest.execs.get(body["exec"])
    if job is None or job.stream is not None:
        raise GuestError(f"no exec {body['exec']} to attach to", errno_name="ESRCH")
    link.opened(stream, {"pid": job.process.pid, "exec": job.number})
    job.attach(link, stream)
    await job.serve(guest)


async def _until_closed(stream: Stream) -> None:
    with contextlib.suppress(GuestError):
        await stream.finished()


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _set_size(fd: int, rows: int, cols: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
