"""Fault points: places at which the tests kill this process. Inert unless POSADA_FAULT names one.

``POSADA_FAULT=fork.switched`` kills it (SIGKILL) when it gets there; ``POSADA_FAULT=fork.switched!`` raises OSError;
``POSADA_FAULT=fork.switched~`` cancels the task, as Ctrl-C does.
"""

from __future__ import annotations

import asyncio
import os
import signal

_armed = os.environ.get("POSADA_FAULT", "")


def arm(name: str) -> None:
    """As if POSADA_FAULT had been set."""
    global _armed
    _armed = name


def point(name: str) -> None:
    """Kill this process, or raise, if the tests ask for it here."""
    if not _armed:
        return
    if name == _armed:
        os.kill(os.getpid(), signal.SIGKILL)
    if name + "!" == _armed:
        raise OSError(f"fault injected at {name}")
    task = asyncio.current_task()
    if name + "~" == _armed and task is not None:
        task.cancel()
