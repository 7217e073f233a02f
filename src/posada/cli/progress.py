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
            self._progress.update(self._task, description=output.clean(self._message), bar=drawn(self._fraction))

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[bar]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            refresh_per_second=5,  # a guest may be booting on the same processors
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, bar="")
        self._show()
        self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._progress is not None:
            self._progress.stop()


def drawn(fraction: float | None) -> str:
    """``████████░░░░░░░░░░░░  40%``; nothing where it is not known."""
    if fraction is None:
        return ""
    done = round(20 * min(max(fraction, 0.0), 1.0))
    return f"{'█' * done}{'░' * (20 - done)} {fraction:4.0%}"
