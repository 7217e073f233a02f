"""A progress bar for what takes longer than a second, on a terminal only."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from posada.cli import output

if TYPE_CHECKING:
    import asyncio

    from rich.progress import Progress, TaskID

#: Nothing is shown before so many seconds have passed.
DELAY = 1.0


class Bar:
    """``with Bar() as bar: await something(progress=bar)``, in an event loop. The bar is gone when the block ends."""

    def __init__(self, message: str = "") -> None:
        self._message = message
        self._fraction: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        if output.on_terminal() and output.chosen != "json":
            import asyncio

            self._timer = asyncio.get_running_loop().call_later(DELAY, self._open)
        return self

    def __call__(self, fraction: float | None, message: str) -> None:
        self._fraction, self._message = fraction, message
        self._show()

    def _show(self) -> None:
        if self._progress is not None and self._task is not None:
            total = None if self._fraction is None else 100.0
            completed = 100.0 * (self._fraction or 0.0)
            text = output.clean(self._message)
            self._progress.update(self._task, description=text, total=total, completed=completed)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._show()
        self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._progress is not None:
            self._progress.stop()
