"""What a teacher says of the batches of a run, computed once for each view of the data and kept on disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dimmix.files import replacing

from .data import Images
from .processes import Processes
from .recipe import Recipe


class Lessons:
    """Teacher's logits of each batch. With a `folder`, a view's logits are written there after its last batch.

    Args:
        teach: images (B, 3, H, W) -> logits (B, classes).
        steps: batches of a view, which are asked for in order.
        folder: None to compute every time.
    """

    def __init__(self, teach: Callable[[Tensor], Tensor], steps: int, folder: Path | None) -> None:
        self.teach, self.steps, self.folder = teach, steps, folder
        self._path: Path | None = None
        self._kept: np.ndarray | None = None
        self._new: list[np.ndarray] = []

    def logits(self, view: str, at: int, x: Tensor) -> Tensor:
        """Logits of x, which is batch `at` of `view`."""
        if self.folder is None:
            return self.teach(x)
        path = self.folder / f"{view}.npy"
        if path != self._path:
            self._path, self._kept, self._new = path, _read(path, self.steps), []
        if self._kept is not None:
            return torch.from_numpy(self._kept[at]).to(x.device).float()
        logits = self.teach(x).half()  # as it is read again
        if at == len(self._new):
            self._new.append(logits.cpu().numpy())
        if len(self._new) == self.steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.save(file, np.stack(self._new), allow_pickle=False)
            self._path = None  # read it when the view comes again
        return logits.float()


def _read(path: Path, steps: int) -> np.ndarray | None:
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if len(kept) == steps else None


def lessons_folder(cache: Path, recipe: Recipe, weights: str, training: Images, processes: Processes) -> Path:
    """A folder in `cache` that runs share if their teacher sees the same batches, whatever they train.

    `weights` is the digest of the teacher's.
    """
    assert recipe.teacher
    pixels = hashlib.sha256(np.ascontiguousarray(training.pixels).data).hexdigest()
    facts = {
        "teacher": [recipe.teacher.name, recipe.teacher.args, weights, recipe.train.precision],
        "batches": [pixels, asdict(recipe.data), asdict(recipe.augment), recipe.train.seed, recipe.train.batch_size],
        "process": [processes.rank, processes.count, processes.device.type],  # a device has draws of its own
    }
    return cache / f"teacher-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
