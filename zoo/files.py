"""Files that carry their name only when they are whole."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
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
def replacing(path: Path, worth_keeping: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` at the end, or removed when an exception leaves.

    What `worth_keeping` then says yes of becomes `NAME.partial` instead, and the exception gets a note of it.

    Raises:
        DimmixError: the folder is not there or cannot be written to, or `path` is a folder, a
            device or a pipe.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DimmixError(f"{path}: not a regular file, and will not be replaced by one", exit_code=2)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except OSError as error:
        raise DimmixError(f"{path}: cannot be written ({error.strerror})", exit_code=2) from error
    os.close(handle)
    try:
        os.chmod(name, 0o644)
        yield Path(name)
        os.replace(name, path)
    except BaseException as error:
        if worth_keeping():
            partial = path.with_name(f"{path.name}.partial")
            os.replace(name, partial)
            error.add_note(f"kept what was finished in {partial}")
        raise
    finally:
        if os.path.exists(name):
            os.unlink(name)


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content at once through `replacing`, into a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
