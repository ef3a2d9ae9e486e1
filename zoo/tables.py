"""Rows to a .csv or .parquet file as they come."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DimmixError
from .files import replacing

Write = Callable[[dict[str, Any]], None]

_ROW_GROUP = 4096


@contextmanager
def table_writer(path: Path, columns: dict[str, str]) -> Iterator[Write]:
    """Opens `path` for rows of `columns`, each name with its pyarrow type; an interruption leaves `NAME.partial`.

    Raises:
        DimmixError: another suffix, or a folder that cannot be written to.
    """
    writers = {".csv": _csv_writer, ".parquet": _parquet_writer}
    if path.suffix not in writers:
        raise DimmixError(f"{path}: tables are written as .csv or .parquet", exit_code=2)
    rows = 0
    with (
        replacing(path, worth_keeping=lambda: rows > 0) as temporary,
        writers[path.suffix](temporary, columns) as write,
    ):

        def count(row: dict[str, Any]) -> None:
            nonlocal rows
            write(row)
            rows += 1

        yield count


@contextmanager
def _csv_writer(path: Path, columns: dict[str, str]) -> Iterator[Write]:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        yield writer.writerow


@contextmanager
def _parquet_writer(path: Path, columns: dict[str, str]) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DimmixError("parquet needs pyarrow: pip install 'dimmix[eval]'") from None

    types = {"floats": pa.list_(pa.float32())}
    schema = pa.schema([(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in columns.items()])
    rows: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        # Names of files may hold bytes that are no UTF-8, which Parquet does not take.
        texts = {
            key: value.encode("utf-8", "backslashreplace").decode() for key, value in row.items() if type(value) is str
        }
        rows.append(row | texts)
        if len(rows) == _ROW_GROUP:
            file.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

    with pq.ParquetWriter(path, schema) as file:
        try:
            yield write
        finally:
            file.write_table(pa.Table.from_pylist(rows, schema))
