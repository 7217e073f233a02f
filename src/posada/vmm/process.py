"""The monitor as a Unix process: nobody's child, deaf to terminals, its complaints kept for the exit record.

What others import only when it is needed is imported here: in the jail there are no files to import from.
"""

from __future__ import annotations

import gc
import io
import json  # noqa: F401
import os
import signal
import sys
import traceback  # noqa: F401
from collections.abc import Callable

from posada.vmm.control import described
from posada.vmm.life import Life


def detach() -> None:
    """Be no terminal's, and in nobody's way."""
    os.setsid()
    os.chdir("/")
    os.umask(0o077)


def announce(starter: int) -> None:
    """Tell the process that starts us who we are, so that it can put us into cgroups while we begin."""
    try:
        os.write(starter, b"pid %d\n" % os.getpid())
    except OSError:
        pass  # it is gone, as the loop will find out


def settle(life: Life, end: Callable[[], object]) -> None:
    """SIGTERM calls ``end``; children are reaped by the kernel; what is written to stderr is noted."""
    signal.signal(signal.SIGTERM, lambda *_: end())
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.stderr = Notes(life)


def warm() -> None:
    """Put what is alive now out of the collector's reach: a fork shares it, and must not touch it to find that out."""
    gc.collect()
    gc.freeze()


def refuse(starter: int, error: Exception) -> None:
    """Tell the process that starts us that there will be no machine: ``error KIND TEXT``."""
    if starter < 0:
        return
    kind, text = described(error)
    try:
        os.write(starter, f"error {kind} {text}\n".encode(errors="replace"))
    except OSError:
        pass  # it is gone itself


class Notes(io.TextIOBase):
    """A stderr that goes into the machine's notes, of which the last are kept."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def write(self, text: str) -> int:
        if text.strip():
            self._life.note(text.rstrip("\n"))
        return len(text)
