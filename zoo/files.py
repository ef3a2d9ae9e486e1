"""Files that carry their name only when they are whole."""

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DimmixError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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
        for file in Path(name).rglob("*"):
            os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_umask())
        os.chmod(name, 0o777 & ~_umask())
        os.replace(name, path)
    finally:
        shutil.rmtree(name, ignore_errors=True)


@contextmanager
def replacing(path: Path, worth_keeping: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` at the end, or removed when an exception leaves.

    What `worth_keeping` then says yes of becomes `NAME.partial` instead (or `NAME.partial2` and so on, where there is
    one), and the exception gets a note of it. A file that is replaced keeps its permissions.

    Raises:
        DimmixError: the folder is not there or cannot be written to, or `path` is a folder, a
            device or a pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DimmixError(f"{path}: not a regular file, and will not be replaced by one", exit_code=2)
    path = Path(os.path.realpath(path))  # a link stays a link
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except OSError as error:
        raise DimmixError(f"{path}: cannot be written ({error.strerror})", exit_code=2) from error
    os.close(handle)
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)
        yield Path(name)
        os.chmod(name, mode)  # again, for who replaced the file that they were to write
        os.replace(name, path)
    except BaseException as error:
        if worth_keeping():
            partial = _free(path.with_name(f"{path.name}.partial"))
            os.replace(name, partial)
            error.add_note(f"kept what was finished in {partial}")
        raise
    finally:
        if os.path.exists(name):
            os.unlink(name)


@contextmanager
def alone_in(folder: Path, *, first: bool = True) -> Iterator[None]:
    """Makes the folder, if it is not there, and keeps it for this process, where the system has locks.

    With `first` false, for the other processes of a run, nothing is locked.

    Raises:
        DimmixError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or not first:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DimmixError(
                f"{folder}: another run is at work in it; wait for it, or choose another --name"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def refuse_same(outputs: dict[str, Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Raise DimmixError where an output, by its option, is one of the inputs or another output."""
    known = {os.path.realpath(path) for path in inputs if path is not None}
    for option, output in outputs.items():
        if output is None:
            continue
        path = os.path.realpath(output)
        if path in known:
            raise DimmixError(
                f"{option} {output}: is read, or written by another option; name another file", exit_code=2
            )
        known.add(path)


def refuse_existing(path: Path) -> Path:
    """`path`, a name that nobody asked for. Raises DimmixError where there is something of that name."""
    if path.exists():
        raise DimmixError(f"{path}: there is one already; name it with --output to replace it", exit_code=2)
    return path


def _free(path: Path) -> Path:
    """`path`, or with the first number from 2 on that makes a name which is not taken."""
    numbered = (path.with_name(f"{path.name}{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content at once through `replacing`, into a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
