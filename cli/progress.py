"""A progress bar on stderr for what takes longer than two seconds on a real terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import rich.progress

T = TypeVar("T")

DELAY = 2.0
"""Seconds before the bar appears."""


class ProgressBar:
    """Counts what is drawn through `track`: count, rate and time left."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self.label = label
        self.enabled = not quiet and sys.stderr.isatty()
        self._bar: rich.progress.Progress | None = None
        self.total: int | None = None

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """The items, counted; the bar goes when they end. `total`, when known, may be set at any time."""
        start = time.monotonic()
        try:
            for count, item in enumerate(items, start=1):
                yield item
                if self.enabled and time.monotonic() - start > DELAY:
                    self._show(count)
        finally:
            if self._bar is not None:
                self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar off the terminal while something else is printed there."""
        if self._bar is None:
            yield
            return
        self._bar.stop()
        yield
        self._bar.start()

    def _show(self, count: int) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=count, total=self.total)


def _new_bar() -> "rich.progress.Progress":
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:.0f}/s")

    columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), Rate())
    left = progress.TimeRemainingColumn(elapsed_when_finished=True)
    return progress.Progress(*columns, left, console=Console(stderr=True), transient=True)
