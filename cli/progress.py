"""A progress bar on stderr for what takes longer than two seconds on a real terminal."""

import sys
import threading
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
    """Counts what is drawn through `track`: count, rate and time left. `total` may be set later, when it is known."""

    def __init__(self, label: str, total: int | None = None, *, quiet: bool = False) -> None:
        self.label, self.total = label, total
        self.enabled = not quiet and sys.stderr.isatty()
        self._count, self._ended = 0, False
        self._bar: rich.progress.Progress | None = None
        self._drawing = threading.Lock()

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """The items, counted under a bar that goes when they end."""
        with self.shown():
            yield from self.count(items)

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each counted when the next one is asked for."""
        for item in items:
            yield item
            self._count += 1
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._count, total=self.total)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar meanwhile, once it lasts."""
        if not self.enabled:
            yield
            return
        timer = threading.Timer(DELAY, self._show, [time.monotonic()])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._drawing:
                self._ended = True
                if self._bar is not None:
                    self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar off the terminal while something else is printed there."""
        with self._drawing:
            bar = None if self._ended else self._bar
            if bar is not None:
                bar.stop()
            yield
            if bar is not None:
                bar.start()

    def _show(self, start: float) -> None:
        bar = _new_bar(start)
        with self._drawing:
            if not self._ended:
                bar.add_task(self.label, total=self.total, completed=self._count)
                bar.start()
                self._bar = bar


def _new_bar(start: float) -> "rich.progress.Progress":
    from datetime import timedelta

    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class RateAndTimeLeft(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            rate = task.completed / (time.monotonic() - start)
            left = timedelta(seconds=round((task.remaining or 0) / rate)) if rate and task.total else "-:--:--"
            return Text(f"{rate:,.0f}/s {left}" if rate >= 10 else f"{rate:.1f}/s {left}")

    columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), RateAndTimeLeft())
    return progress.Progress(*columns, console=Console(stderr=True), transient=True)
