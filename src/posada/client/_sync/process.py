# Generated from _async/process.py by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.
"""A command that runs in a guest."""

from __future__ import annotations

import signal as signals
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from posada.client._exec import StreamedCommand
from posada.client._runtime import SyncRuntime

if TYPE_CHECKING:
    from posada.model.exec import ExecResult, Output


class Process:
    """What ``vm.exec(…, stream=True)`` returns: iterate over it for its output as it comes.

    Each event has ``.stream`` (``"stdout"`` or ``"stderr"``), ``.data`` and ``.text``. Leaving ``with`` before
    the command has ended hangs it up (SIGHUP, then SIGKILL).
    """

    def __init__(self, rt: SyncRuntime, command: StreamedCommand) -> None:
        self._rt = rt
        self._command = command

    @property
    def pid(self) -> int:
        """Its process id in the guest."""
        return self._command.process.pid

    def write(self, data: str | bytes) -> None:
        """Feed its standard input (needs ``stdin=True``). Waits while the command does not read."""
        self._rt.run(self._command.process.write(data.encode() if isinstance(data, str) else data))

    def close_stdin(self) -> None:
        """End its standard input."""
        self._rt.run(self._command.process.close_stdin())

    def signal(self, number: int | signals.Signals) -> None:
        """Send a signal to its process group."""
        self._rt.run(self._command.process.signal(int(number)))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.signal(signals.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.signal(signals.SIGKILL)

    def resize(self, rows: int, cols: int) -> None:
        """Tell its terminal (``pty``) a new size."""
        self._rt.run(self._command.process.resize(rows, cols))

    def wait(self) -> ExecResult:
        """Wait for its end. The result holds the output that was not iterated over.

        Raises CommandError (``check``), Timeout (``timeout``; the command is killed), GuestGone.
        """
        return self._rt.run(self._command.wait())

    def close(self) -> None:
        """Let go of it; if it still runs it is hung up."""
        self._rt.run(self._command.close())

    def __iter__(self) -> Iterator[Output]:
        for event in self._rt.iterate(self._command):
            yield event

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
