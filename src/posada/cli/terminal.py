"""This side's terminal: raw mode that is always undone, its size, and stdin as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
import termios
import tty
from collections.abc import AsyncIterator, Callable, Iterator

CHUNK = 1 << 16


def stdin_is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def both_are_terminals() -> bool:
    return stdin_is_terminal() and sys.stdout.isatty()


def size() -> tuple[int, int]:
    """(rows, columns) of the terminal; 24 × 80 where there is none."""
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            if columns and rows:
                return rows, columns
    return 24, 80


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Every key goes through as it is typed, Ctrl-C too. Undone at the end, whatever happens."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # keeps what was typed ahead
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def on_resize(function: Callable[[], None]) -> Iterator[None]:
    """Call it whenever the terminal's size changes."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, function)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


async def read_stdin() -> AsyncIterator[bytes]:
    """Stdin in pieces, until its end. Waiting for it blocks nothing and can be cancelled."""
    loop = asyncio.get_running_loop()
    kind = os.fstat(0).st_mode
    if stat.S_ISREG(kind) or stat.S_ISBLK(kind) or _is_null():
        while data := os.read(0, CHUNK):  # always ready; epoll refuses them
            yield data
            await asyncio.sleep(0)
        return
    while True:
        # Armed anew for each read: a second report of the same bytes would make the read below block.
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(0, _tell, ready)
        try:
            await ready
        finally:
            loop.remove_reader(0)
        try:
            data = os.read(0, CHUNK)
        except BlockingIOError:
            continue
        except OSError:  # the terminal has gone
            return
        if not data:
            return
        yield data


def _tell(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _is_null() -> bool:
    with contextlib.suppress(OSError):
        null = os.stat(os.devnull)
        return os.fstat(0).st_rdev == null.st_rdev and stat.S_ISCHR(os.fstat(0).st_mode)
    return False


def write(fd: int, data: bytes) -> None:
    """All of it. Raises BrokenPipeError when the reader has gone."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody gave us a non-blocking stdout: wait until there is room
            import select

            select.select([], [fd], [])
