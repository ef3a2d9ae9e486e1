"""Image sets in memory: decoded once to uint8, and kept on disk for the next start."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dimmix.datasets import SPLITS, LabelledImages, open_dataset
from dimmix.errors import DimmixError
from dimmix.files import replacing
from dimmix.images import ImageError
from dimmix.preprocess import Preprocess, crop_image

from .recipe import Data

MOST_NAMED = 10


@dataclass(frozen=True)
class Images:
    """`pixels` (N, H, W, 3) uint8, `labels` (N,) int64, `names` the class names in label order, `split` their split."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    split: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Images":
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    @property
    def digest(self) -> str:
        """Hexadecimal digits that change with any pixel or label."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).data)  # as they lie: a copy would double the memory
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    def relabelled(self, names: tuple[str, ...]) -> "Images":
        """The same with labels that count in `names`: a held-out folder may lack classes that were learnt.

        Raises DimmixError for a class that is not in `names`, and for two of one name.
        """
        if self.names == names:
            return self
        if len(set(names)) < len(names):
            raise DimmixError(
                "the held-out images have other classes than the training images, two of them of one name"
            )
        if unknown := [name for name in self.names if name not in names]:
            raise DimmixError(f"the held-out images are of classes that the training images lack: {', '.join(unknown)}")
        numbers = np.array([names.index(name) for name in self.names], np.int64)
        return replace(self, labels=numbers[self.labels], names=names)


def load_images(root: Path, data: Data, split: str | None, cache: Path | None = None) -> Images:
    """All images of `split` of the data set in `root/data.name`, or in `root` itself, `data.image_size` pixels square.

    Without `split`, the held-out one. Training rows that come class by class are mixed, always in the same way. With
    `cache`, a folder, the decoded arrays are kept there for the next time.

    Raises DimmixError when there is no such data set, and for images that are missing or broken, or labels outside
    the classes, naming their rows.
    """
    folder = root / data.name if (root / data.name).is_dir() else root
    dataset = open_dataset(str(folder), split=split, label_column=data.label or None)
    if split is None and dataset.split not in SPLITS:
        raise DimmixError(f"{folder}: no split is held out; there must be a test split to evaluate on")
    stored = cache / f"{data.name}-{dataset.split}-{_key(folder, data, dataset, cache)}" if cache else None
    arrays = _read_cache(stored) if stored else None
    if arrays is None:
        arrays = _decode(dataset, data)
        if stored:
            _write_cache(stored, arrays)
    names = dataset.labels or tuple(map(str, range(int(arrays[1].max()) + 1)))
    images = Images(*arrays, names, dataset.split)
    return _mixed(images) if dataset.split == "train" else images


def _mixed(images: Images) -> Images:
    """Rows that come class by class, as folders do, in a random order: the last ones are held back to validate on.

    They do where a row is of another class than the one before it less than half as often as by chance.
    """
    shares = np.bincount(images.labels) / len(images)
    changes = np.count_nonzero(np.diff(images.labels))
    if 2 * changes >= len(images) * (1 - (shares**2).sum()):
        return images
    order = np.random.default_rng(0).permutation(len(images))
    return replace(images, pixels=images.pixels[order], labels=images.labels[order])


def _decode(dataset: LabelledImages, data: Data) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    where = f"{dataset.name}, split {dataset.split}"
    preprocess = Preprocess((3, data.image_size, data.image_size), data.mean, data.std, crop_pct=1.0)
    pixels, labels, broken, reasons = [], [], [], []
    for row, sample in enumerate(dataset):
        labels.append(sample.label)
        try:
            pixels.append(crop_image(sample.image, preprocess))
        except ImageError as error:
            name = f"row {row}"
            broken.append(name if sample.source == name else f"{name} ({sample.source})")
            reasons.append(error.reason)
    if broken:
        raise DimmixError(f"{where}: {len(broken)} images are missing or broken: {_listed(broken)} ({reasons[0]})")
    if not labels:
        raise DimmixError(f"{where}: no images")
    classes = len(dataset.labels) if dataset.labels else 1 + max(labels)
    wrong = [row for row, label in enumerate(labels) if not 0 <= label < classes]
    if wrong:
        raise DimmixError(f"{where}: {len(wrong)} labels are not in 0..{classes - 1}: rows {_listed(wrong)}")
    return np.stack(pixels), np.array(labels, np.int64)


def _listed(found: Sequence[object]) -> str:
    named = ", ".join(map(str, found[:MOST_NAMED]))
    return named + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")


def _key(folder: Path, data: Data, dataset: LabelledImages, cache: Path) -> str:
    """Changes when a file of the data set, or what is read out of it, does.

    The runs, beside the cache, may lie inside the data set's folder, and are none of it.
    """
    folder, runs = folder.resolve(), cache.resolve().parent
    outside = folder not in runs.parents
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in _files(folder)
        if outside or runs not in path.parents
    ]
    facts = [sorted(files), dataset.split, data.label, data.image_size]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _files(top: Path) -> Iterator[Path]:
    """All files below a folder, also behind symbolic links, as the readers of data sets find them; or the file."""
    if top.is_file():
        yield top
        return
    seen = set()
    for folder, inner, names in os.walk(top, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (path for name in names if (path := Path(folder, name)).is_file())


def _read_cache(stored: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """What `_write_cache` left, or None when that is not there or not whole."""
    try:
        pixels, labels = (np.load(f"{stored}.{part}.npy", allow_pickle=False) for part in ("pixels", "labels"))
    except (OSError, ValueError, EOFError):
        return None
    return (pixels, labels) if len(pixels) == len(labels) else None


def _write_cache(stored: Path, arrays: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    stored.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, NDArray[Any]] = {"pixels": arrays[0], "labels": arrays[1]}
    for part, array in parts.items():
        with replacing(Path(f"{stored}.{part}.npy")) as file:
            np.save(file, array, allow_pickle=False)
