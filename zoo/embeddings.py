"""Embeddings to a file as they come: .npy for the numbers alone, .parquet with the images' names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import DimmixError
from .files import replacing
from .tables import table_writer

Write = Callable[[str, np.ndarray], None]


@contextmanager
def embedding_writer(path: Path) -> Iterator[Write]:
    """Opens `path` for pairs of an image's source and its float32 (num_features,) embedding.

    A .npy file holds the embeddings, (B, num_features); a .parquet file the columns `source` and `embedding`. An
    interruption leaves what was finished in `NAME.partial`.

    Raises:
        DimmixError: another suffix, or a folder that cannot be written to.
    """
    if path.suffix == ".parquet":
        with table_writer(path, {"source": "string", "embedding": "floats"}) as write_row:
            yield lambda source, embedding: write_row({"source": source, "embedding": embedding})
    elif path.suffix == ".npy":
        with _npy_writer(path) as write:
            yield write
    else:
        raise DimmixError(f"{path}: embeddings go to a .npy or a .parquet file", exit_code=2)


@contextmanager
def _npy_writer(path: Path) -> Iterator[Write]:
    shape = (0, 0)

    def write(source: str, embedding: np.ndarray) -> None:
        nonlocal shape
        if not shape[0]:
            _write_header(file, (0, len(embedding)))
        file.write(embedding.astype("<f4").tobytes())
        shape = (shape[0] + 1, len(embedding))

    with replacing(path, worth_keeping=lambda: shape[0] > 0) as temporary, temporary.open("wb") as file:
        try:
            yield write
        finally:
            file.seek(0)  # NumPy leaves room in the header for the number of rows to grow
            _write_header(file, shape)


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
