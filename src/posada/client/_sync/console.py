# Generated from _async/console.py by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.
"""The serial console."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from posada.client._console import ConsoleStream
from posada.client._runtime import SyncRuntime


class Console:
    """A connection to a machine's serial console: recent output first, then what comes. Iterate over it for bytes."""

    def __init__(self, rt: SyncRuntime, stream: ConsoleStream) -> None:
        self._rt = rt
        self._stream = stream

    def read(self) -> bytes:
        """Some output; empty when the machine has ended."""
        return self._rt.run(self._stream.read())

    def write(self, data: str | bytes) -> None:
        """Type something."""
        self._rt.run(self._stream.write(data.encode() if isinstance(data, str) else data))

    def close(self) -> None:
        """Close the connection; the machine goes on."""
        self._rt.run(self._stream.close())

    def __iter__(self) -> Iterator[bytes]:
        for data in self._rt.iterate(self._stream):
            yield data

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
