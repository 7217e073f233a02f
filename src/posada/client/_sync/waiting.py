# Generated from _async/waiting.py by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.
"""Waiting for something in a guest."""

from __future__ import annotations

from posada.client._console import wait_for_command, wait_for_file, wait_for_port, wait_for_text
from posada.client._core import Core
from posada.client._runtime import SyncRuntime


class Waiter:
    """``vm.wait_for``: wait for something in the guest.

    Each returns when its condition holds, raises Timeout after ``timeout`` seconds, and GuestGone as soon as the
    guest is dead.
    """

    def __init__(self, rt: SyncRuntime, core: Core, uuid: str) -> None:
        self._rt = rt
        self._vms = core.host.vms
        self._uuid = uuid

    def port(self, port: int, *, host: str = "127.0.0.1", timeout: float | None = 60) -> None:
        """Something in the guest accepts TCP connections on ``port`` of ``host``, seen from inside the guest."""
        self._rt.run(wait_for_port(self._vms, self._uuid, port, host, timeout))

    def file(self, path: str, *, timeout: float | None = 60) -> None:
        """The path exists in the guest."""
        self._rt.run(wait_for_file(self._vms, self._uuid, path, timeout))

    def text(self, pattern: str, *, timeout: float | None = 60) -> str:
        """The console has printed something that the regular expression finds. Returns what it found."""
        return self._rt.run(wait_for_text(self._vms, self._uuid, pattern, timeout))

    def command(self, *argv: str, timeout: float | None = 60) -> None:
        """The command, tried again and again, ends with status 0."""
        self._rt.run(wait_for_command(self._vms, self._uuid, argv, timeout))
