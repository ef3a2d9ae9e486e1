"""Files that carry their name only when they are whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DimmixError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`replacing` for a whole folder, which must not hold anything yet.

    Raises:
        DimmixError: it is there already, or its parent cannot be written to.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DimmixError(f"{path}: there is something already; name a new folder", exit_code=2)
    try:
        name = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DimmixError(f"{path}: cannot be written ({error.strerror})", exit_code=2) from error
    try:
        yield Path(name)
        os.chmod(name, 0o755)
        os.replace(name, path)
    finally:
        shutil.rmtree(name, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` at the end, or removed when an exception leaves.

    Raises:
        DimmixError: the folder is not there or cannot be written to.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except OSError as error:
        raise DimmixError(f"{path}: cannot be written ({error.strerror})", exit_code=2) from error
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        if os.path.exists(name):
            os.unlink(name)
