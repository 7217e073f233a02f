"""Processes by pid *and* start time, and the exit record that `posada.runtime.ending` writes."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import stat
from pathlib import Path

import msgspec

from posada.errors import Timeout
from posada.model.records import Process

#: An exit record is of bounded size; anything larger is not one.
_RECORD_MAX = 64 << 10


def stat_fields(pid: int) -> list[bytes]:
    """/proc/PID/stat from field 3 (state) on. Raises OSError when there is no such process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def find(pid: int) -> Process:
    """Raises OSError when there is no such process."""
    return Process(pid, int(stat_fields(pid)[19]))


def read_pid(path: Path) -> Process | None:
    """``pid start``, as a process writes it about itself; None when it is missing or torn."""
    try:
        pid, start = path.read_text("ascii").split()
        return Process(int(pid), int(start))
    except (OSError, ValueError):
        return None


def alive(process: Process) -> bool:
    """Is that very process there and not a zombie?"""
    try:
        fields = stat_fields(process.pid)
    except OSError:
        return False
    return int(fields[19]) == process.start and fields[0] not in b"ZX"


def open_pidfd(process: Process) -> int | None:
    """A pidfd of that very process, which the caller closes; None when it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError as error:
        # EINVAL: it is gone, and its number still names its session (kernels before 6.16), as that of a machine that forked.
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return None
        raise
    if alive(process):  # asked after opening: so the pidfd is that process's
        return fd
    os.close(fd)
    return None


def send(process: Process, number: signal.Signals) -> bool:
    """False when it is gone."""
    fd = open_pidfd(process)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


async def ended(process: Process, timeout: float | None) -> None:
    """Wait until it has ended. ``timeout`` in seconds. Raises Timeout."""
    fd = open_pidfd(process)
    if fd is None:
        return
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    loop.add_reader(fd, finish)
    try:
        await asyncio.wait_for(done, timeout)
    except TimeoutError:
        raise Timeout(f"process {process.pid} has not ended within {timeout:g} s") from None
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def has_ended(process: Process) -> bool:
    """Like `alive`, by pidfd: true already for a zombie."""
    return wait(process, 0)


def wait(process: Process, timeout: float) -> bool:
    """`ended`, for threads: False if it has not within ``timeout`` seconds."""
    fd = open_pidfd(process)
    if fd is None:
        return True
    try:
        poll = select.poll()  # select(2) takes no descriptor above 1023
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(fd)


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``exit.json``: how a machine ended."""

    reason: str
    crashed: bool
    code: int | None = None
    signal: int | None = None
    stderr: str = ""
    time: float = 0.0


def read_exit(runtime: Path) -> ExitRecord | None:
    """None when there is none (its writer was killed, or is still writing) or it is unreadable."""
    try:
        with open(runtime / "exit.json", "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return msgspec.json.decode(file.read(_RECORD_MAX), type=ExitRecord)
    except (OSError, msgspec.MsgspecError):
        return None
