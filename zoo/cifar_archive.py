"""The CIFAR python archives, which are pickles, read without running any."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DimmixError, first_line


def read_archive(path: Path, split: str) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
    """Pixels (N, 32, 32, 3) uint8, labels and the classes' names of "train" or "test" of CIFAR-10 or -100.

    `path` is the .tar.gz or the folder in it; of CIFAR-100 the labels are the fine ones.

    Raises:
        DimmixError: it is damaged, or another archive.
    """
    try:
        files = _files(path)
        if "meta" in files:
            names = _unpickle(files["meta"])["fine_label_names"]
            batches = {"train": ["train"], "test": ["test"]}
        else:
            names = _unpickle(files["batches.meta"])["label_names"]
            batches = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
        parts = [_unpickle(files[name]) for name in batches[split]]
        pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [int(label) for part in parts for label in part.get("fine_labels") or part["labels"]]
        names = tuple(map(str, names))
        if pixels.dtype != np.uint8 or len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images of {pixels.dtype}, {len(labels)} labels")
    except Exception as error:  # what a damaged archive or pickle raises has no end
        raise DimmixError(f"{path}: not a whole CIFAR python archive ({first_line(error)})") from error
    return pixels, labels, names


class _ArraysOnly(pickle.Unpickler):
    """Builds nothing but NumPy arrays: any other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.empty(0).__reduce__()[0]
        allowed = {"_reconstruct": reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a CIFAR archive")


def _files(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile()]
        files = {Path(member.name).name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
        while archive.fileobj.read(2**20):
            pass  # to the end, where gzip keeps its checksum
        return files


def _unpickle(content: bytes) -> dict[str, Any]:
    values = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in values.items()}
