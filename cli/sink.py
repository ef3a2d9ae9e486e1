"""The one place that writes results: records in, a table, JSON, JSON lines or CSV out, to stdout or a file."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from dimmix.errors import DimmixError

from .options import Format

if TYPE_CHECKING:
    from rich.console import Console

Record = dict[str, Any]

_TEXT = 24
"""Columns that a text in a table keeps, but for the first of a row."""

_UNLIMITED = 10_000
"""Columns of a table that goes to a file or a pipe, or that is wider than the terminal."""


def note(message: str, quiet: bool = False) -> None:
    """One line on stderr: a warning, or what has been written where."""
    if not quiet:
        print(f"dimmix: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """The text on one line, without control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.splitlines()))


class Sink:
    """Writes records as they come, in bounded memory.

    Args:
        format: `auto` is a table on a terminal, JSON lines in a pipe, and what its suffix says for a file.
        output: a file that appears under its name only when all of it is written; what an interrupted run finished
            is kept beside it as `NAME.partial`.
        flatten: turns a record into the rows of a table or of CSV; JSON always gets the record itself.
        single: there is one record; JSON is that object rather than a list, a table has a line for each of its fields.
        title: stands above a table.
        paused: holds a progress bar off the terminal while a table is printed.
    """

    def __init__(
        self,
        format: Format = Format.auto,
        output: Path | None = None,
        *,
        flatten: Callable[[Record], Iterable[Record]] = lambda record: [record],
        single: bool = False,
        title: str | None = None,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.output, self.flatten, self.single, self.title, self.paused = output, flatten, single, title, paused
        self.format = _resolve(format, output)
        self.written = 0
        self._file: TextIO = sys.stdout
        self._stack = ExitStack()
        self._widths: dict[str, int] = {}
        self._rows: list[Record] = []
        self._first_pending = 0.0

    def __enter__(self) -> Self:
        if self.output is not None:
            from dimmix.files import replacing

            path = self._stack.enter_context(replacing(self.output, worth_keeping=lambda: self.written > 0))
            file = open(path, "w", encoding="utf-8", errors="surrogateescape", newline="")
            self._file = self._stack.enter_context(file)
        elif hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or (self.written and not isinstance(error, BrokenPipeError)):
                self._finish()
        except BaseException as late:  # what could not be finished does not get the final name
            self._stack.__exit__(type(late), late, late.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)

    def write(self, record: Record) -> None:
        """Write one record, at once except in a table, whose rows come a few at a time."""
        if self.format is Format.table:
            self._rows += [{"": k, "value": v} for k, v in record.items()] if self.single else self.flatten(record)
            self._first_pending = self._first_pending or time.monotonic()
            if not self.single and (len(self._rows) >= 500 or time.monotonic() - self._first_pending > 0.5):
                self._print_rows()
        elif self.format is Format.csv:
            import csv

            for row in self.flatten(record):
                columns = list(self._widths) or list(row)
                writer = csv.DictWriter(self._file, columns, extrasaction="ignore", lineterminator="\n")
                if not self._widths:
                    self._widths = dict.fromkeys(row, 0)
                    writer.writeheader()
                writer.writerow({key: _plain(value) for key, value in row.items()})
        elif self.format is Format.json and self.single:
            print(json.dumps(record, indent=2), file=self._file)
        elif self.format is Format.json:
            self._file.write(("[\n " if not self.written else ",\n ") + json.dumps(record))
        else:
            print(json.dumps(record), file=self._file)
        self.written += 1
        if self.output is None and self.format is not Format.table:
            self._file.flush()

    def new_table(self, title: str) -> None:
        """What is written from here on stands in a table of its own, a row a record."""
        self._print_rows()
        self.title, self.single, self._widths = title, False, {}

    def _finish(self) -> None:
        if self.format is Format.json and not self.single:
            self._file.write("\n]\n" if self.written else "[]\n")
        if self.format is Format.table:
            self._print_rows()
        self._file.flush()

    def _print_rows(self) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        self._first_pending = 0.0
        if not self._rows:
            return
        rows = [{key: _cell(value) for key, value in row.items()} for row in self._rows]
        first = not self._widths
        for key in dict.fromkeys(key for row in rows for key in row) if first else ():
            self._widths[key] = max(len(key), *(len(row.get(key, "")) for row in rows))
        terminal = self._file.isatty()
        console = Console(file=self._file, width=None if terminal else _UNLIMITED, highlight=False)
        table = Table(box=SIMPLE_HEAD, show_header=first, show_edge=False, pad_edge=False)
        table.title = Text(printable(self.title)) if first and self.title else None
        numbers = {key for row in self._rows for key, value in row.items() if isinstance(value, int | float)}
        for key, least in self._least_widths(numbers, console).items():
            side: Literal["left", "right"] = "right" if key in numbers and not self.single else "left"
            table.add_column(key, min_width=least, justify=side, overflow="fold")
        for row in rows:
            table.add_row(*(Text(row.get(key, "")) for key in self._widths))
        self._rows.clear()
        with self.paused():
            console.print(table)
            self._file.flush()

    def _least_widths(self, numbers: set[str], console: "Console") -> dict[str, int | None]:
        """Columns with the width that each keeps where the terminal is narrow: no name or number is cut into pieces."""
        least: dict[str, int | None] = dict(self._widths)
        if sum(self._widths.values()) + 3 * len(least) < console.width:
            return least
        first, *others = self._widths
        if self.single:
            return least | dict.fromkeys(others) | ({first: None} if self._widths[first] > console.width // 2 else {})
        kept = {key: width if key in (first, *numbers) else min(width, _TEXT) for key, width in self._widths.items()}
        if sum(kept.values()) + 3 * len(kept) >= console.width:
            console.width = _UNLIMITED  # the terminal breaks the lines
            return least
        return least | kept


def _resolve(format: Format, output: Path | None) -> Format:
    if format is not Format.auto:
        return format
    if output is not None:
        suffix = output.suffix.removeprefix(".").lower()
        if output.is_dir():
            return Format.jsonl  # whoever opens it will say so
        if suffix not in ("json", "jsonl", "csv"):
            raise DimmixError(f"--output {output}: ends in none of .json, .jsonl, .csv; choose a --format", exit_code=2)
        return Format(suffix)
    return Format.table if sys.stdout.isatty() else Format.jsonl


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if 0 < abs(value) < 1 else f"{value:,.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(str(_plain(value)))


def _plain(value: Any) -> Any:
    parts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(part, dict | list | tuple) for part in parts):
        return json.dumps(value)
    return " ".join(map(str, parts)) if parts is value else value
