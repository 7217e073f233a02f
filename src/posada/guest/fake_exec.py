"""Commands of the fake agent: real processes of this host."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
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
    """A process, the pumps of its output, and the stream that is attached to it, if any. It owns its descriptors.

    (Not asyncio's subprocesses: they tell of the end only once all pipes are at theirs.)
    """

    def __init__(
        self, process: subprocess.Popen[bytes], argv0: str, keep: bool, input: int | None, outputs: dict[int, int]
    ) -> None:
        self.process = process
        self.argv0 = argv0
        self.keep = keep
        self.number = 0
        self.stream: Stream | None = None
        self._input = input
        self._outputs = outputs
        self._attached = asyncio.Event()
        self._started = time.monotonic()
        self._pumps = [asyncio.ensure_future(self._pump(flags, fd)) for flags, fd in outputs.items()]
        self.ended = asyncio.ensure_future(self._reap())
        """Done when the process has ended."""

    @property
    def running(self) -> bool:
        return not self.ended.done()

    def freeze(self, stop: bool) -> None:
        self.kill(signal.SIGSTOP if stop else signal.SIGCONT)

    async def destroy(self) -> None:
        """Kill it, whatever state it is in, and let go of everything."""
        self.kill(signal.SIGKILL)
        await self.ended
        for pump in self._pumps:
            pump.cancel()
        await asyncio.wait(self._pumps)
        self.close_input()
        for fd in self._outputs.values():
            os.close(fd)
        self._outputs = {}

    async def serve(self, guest: FakeGuest, link: FakeLink, stream: Stream) -> None:
        """Attach a stream, feed the process from it until either ends, and tell how it ended."""
        self.stream = stream
        link.controls[stream.number] = self._control
        self._attached.set()
        feeder = asyncio.ensure_future(self._feed(stream))
        gone = asyncio.ensure_future(_until_closed(stream))
        finished = asyncio.ensure_future(self._finish())
        try:
            await asyncio.wait([gone, finished], return_when=asyncio.FIRST_COMPLETED)
            if finished.done() and not stream.closed:
                for flags in self._outputs:
                    stream.send_eof(flags)
                code = self.process.returncode
                ms = int(1000 * (time.monotonic() - self._started))
                link.exited(stream, code=code if code >= 0 else None, signal=-code, ms=ms)
                guest.forget(self)
        finally:
            for task in (feeder, gone, finished):
                task.cancel()
            self._detach(stream)
            if stream.closed and not self.keep and guest.token is None:
                guest.hang_up(self)

    async def hang_up(self) -> None:
        self.kill(signal.SIGHUP)
        await asyncio.wait([self.ended], timeout=_HANGUP_PATIENCE)
        await self.destroy()

    async def _reap(self) -> None:
        pidfd = os.pidfd_open(self.process.pid)
        try:
            await _ready(pidfd, asyncio.get_running_loop().add_reader, asyncio.get_running_loop().remove_reader)
        finally:
            os.close(pidfd)
        self.process.wait()

    async def _finish(self) -> None:
        """The process has ended, and so have its pipes, unless a grandchild keeps them."""
        await asyncio.shield(self.ended)
        await asyncio.wait(self._pumps, timeout=_GRANDCHILD_PATIENCE)

    async def _pump(self, flags: int, fd: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await _ready(fd, loop.add_reader, loop.remove_reader)
            try:
                data = os.read(fd, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:  # EIO: nobody has the terminal open any more.
                return
            if not data:
                return
            await self._deliver(flags, data)

    async def _deliver(self, flags: int, data: bytes) -> None:
        """To the stream that is attached; without one, wait for one."""
        while True:
            await self._attached.wait()
            if (stream := self.stream) is not None:
                try:
                    return await stream.send(data, flags)
                except GuestError:
                    self._detach(stream)

    async def _feed(self, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        while (piece := await stream.receive()) is not None:
            rest = memoryview(piece[1])
            while rest and self._input is not None:
                await _ready(self._input, loop.add_writer, loop.remove_writer)
                try:
                    rest = rest[os.write(self._input, rest) :]
                except BlockingIOError:
                    continue
                except OSError:  # It reads no more: the rest goes nowhere.
                    self.close_input()
        if stream.complete and 0 in self._outputs and self._outputs[0] != self._input:
            self.close_input()

    def close_input(self) -> None:
        if self._input is not None and self._input not in self._outputs.values():
            os.close(self._input)
        self._input = None

    def _detach(self, stream: Stream) -> None:
        if self.stream is stream:
            self.stream = None
            self._attached.clear()

    def _control(self, event: events.Event) -> None:
        if isinstance(event, events.Signal):
            self.kill(event.signal, group=event.group)
        elif isinstance(event, events.Resize) and self._input is not None:
            with contextlib.suppress(OSError):  # ENOTTY
                _set_size(self._input, event.rows, event.cols)

    def kill(self, number: int, *, group: bool = True) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.process.pid, number)


async def execute(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    user = str(body.get("user", "root")).partition(":")[0]
    base = {"PATH": _PATH, "HOME": str(guest.root), "USER": user, "LOGNAME": user, "SHELL": "/bin/sh"}
    env = {**({} if body.get("clear_env") else base), **body.get("env", {})}
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        if "pty" in body:
            master, slave = pty.openpty()
            _set_size(master, body["pty"]["rows"], body["pty"]["cols"])
            env["TERM"] = body["pty"].get("term", "xterm")
            ends = (slave, slave, slave)
            theirs.callback(os.close, slave)
            feed, outputs = master, {0: master}
        else:
            (stdin, feed), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
            ends, outputs = (stdin, stdout, stderr), {0: out, 1: err}
            for fd in ends:
                theirs.callback(os.close, fd)
        for fd in {feed, *outputs.values()}:
            os.set_blocking(fd, False)
            ours.callback(os.close, fd)
        process = subprocess.Popen(  # noqa: ASYNC220  (a millisecond; asyncio's own would be no help, see FakeExec)
            body["argv"], stdin=ends[0], stdout=ends[1], stderr=ends[2], env=env, cwd=guest.path(body.get("cwd", "/")),
            start_new_session=True, preexec_fn=_own_terminal if "pty" in body else None,
        )  # fmt: skip
        ours.pop_all()
    job = FakeExec(process, body["argv"][0], bool(body.get("keep")), feed, outputs)
    if not body.get("stdin") and "pty" not in body:
        job.close_input()
    job.number = guest.register(job)
    link.opened(stream, {"pid": process.pid, "exec": job.number})
    await job.serve(guest, link, stream)


async def attach(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    job = guest.execs.get(body["exec"])
    if job is None or job.stream is not None:
        raise GuestError(f"no exec {body['exec']} to attach to", errno_name="ESRCH")
    link.opened(stream, {"pid": job.process.pid, "exec": job.number})
    await job.serve(guest, link, stream)


async def _ready(fd: int, watch: Callable[..., Any], unwatch: Callable[[int], Any]) -> None:
    event = asyncio.Event()
    watch(fd, event.set)
    try:
        await event.wait()
    finally:
        unwatch(fd)


async def _until_closed(stream: Stream) -> None:
    with contextlib.suppress(GuestError):
        await stream.finished()


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _set_size(fd: int, rows: int, cols: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
