"""`Classifier`: weights, transform and labels in, predictions out. The command line and Python users call the same."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .checkpoints import cards
from .errors import DimmixError
from .images import ImageError, describe
from .preprocess import crop_image
from .runtime import Runtime, architecture_of, load_runtime
from .stream import run_batches


@dataclass(frozen=True)
class Prediction:
    """One class of the answer; `score` is its probability."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Result:
    """The answer for one image of a stream: its classes, best first, or why there is none."""

    source: str
    predictions: list[Prediction]
    error: str | None = None


def default_model() -> str:
    """The bundled checkpoint with the best CIFAR-100 top-1, or without one the best on CIFAR-10.

    Raises:
        DimmixError: none is bundled.
    """
    found = cards().values()
    if not found:
        raise DimmixError("no checkpoint comes with this installation: name a model")
    return max(found, key=lambda card: (card.dataset == "cifar100", card.top1)).name


class Classifier:
    """A pretrained image classifier.

    Args:
        name: `architecture[.tag]`, `hf-hub:org/name`, `local-dir:PATH` or an exported `.onnx` or `.pt2` file; without
            one, the architecture that the card of `checkpoint` names, or else the best bundled checkpoint.
        device: `auto`, `cpu`, `cuda` or `mps`.
        checkpoint: a `.safetensors` file with weights for the architecture `name`.
        amp: run in bfloat16 where torch's autocast allows it.

    Images are paths, encoded bytes, files open for reading bytes, PIL images, uint8 arrays (H, W[, C]) or uint8 tensors
    (C, H, W); float arrays and tensors of the model's input shape (C, H, W) are taken as what `transform` returned.

    Raises:
        DimmixError: no such model, or weights that do not fit.
    """

    def __init__(
        self,
        name: str | None = None,
        device: str = "auto",
        checkpoint: str | Path | None = None,
        *,
        amp: bool = False,
    ) -> None:
        if name == "":
            raise DimmixError("the model's name is empty; leave it out for the default one", exit_code=2)
        self.name = name or (architecture_of(checkpoint) if checkpoint else default_model())
        self.runtime = load_runtime(self.name, device=device, checkpoint=checkpoint, amp=amp)
        self.labels = list(self.runtime.spec.labels)

    @classmethod
    def of(cls, runtime: Runtime) -> "Classifier":
        """A classifier around what runs already."""
        classifier = cls.__new__(cls)
        classifier.name, classifier.runtime = runtime.spec.name, runtime
        classifier.labels = list(runtime.spec.labels)
        return classifier

    @cached_property
    def transform(self) -> Callable[[Image.Image], Any]:
        """PIL image to normalised (C, H, W): timm's own transform, or for an ONNX file its equal in NumPy."""
        model = getattr(self.runtime, "model", None)
        if not hasattr(model, "pretrained_cfg"):
            return self.runtime.spec.preprocess
        import timm.data

        return timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    def predict(self, images: Any, topk: int = 5) -> Any:
        """The `topk` likeliest classes, best first: a list of `Prediction` for one image, a list of those for several.

        Several are a list or another iterable, or an array or tensor with a batch axis.

        Raises:
            ImageError: an image that cannot be read. `stream` goes on past it.
            ValueError: `topk` is below 1.
        """
        if single := self._is_single(images):
            images = [images]
        answers = []
        for result in self.stream(images, topk):
            if result.error is not None:
                raise ImageError(result.source, result.error)
            answers.append(result.predictions)
        return answers[0] if single else answers

    def embed(self, images: Any) -> np.ndarray:
        """Pooled features before the classifier: (num_features,) for one image, (B, num_features) for several.

        Of no images an array of no rows and no columns.

        Raises:
            ImageError: one of them cannot be read.
        """
        if single := self._is_single(images):
            images = [images]
        rows = []
        for _, row in self.stream_embeddings(images):
            if isinstance(row, ImageError):
                raise row
            rows.append(row)
        if not rows:
            return np.empty((0, 0), np.float32)
        return rows[0] if single else np.stack(rows)

    def stream(
        self, images: Iterable[Any], topk: int = 5, *, batch_size: int = 64, workers: int | None = None
    ) -> Iterator[Result]:
        """A `Result` for each image in turn, as batches fill, in bounded memory; `images` may hold errors.

        Raises:
            ValueError: `topk` is below 1.
        """
        if topk < 1:
            raise ValueError(f"topk={topk}: at least 1")
        for image, best in self._stream(partial(self._best, topk), images, batch_size, workers):
            if isinstance(best, ImageError):
                yield Result(describe(image), [], best.reason)
            else:
                yield Result(describe(image), best)

    def stream_embeddings(
        self, images: Iterable[Any], *, batch_size: int = 64, workers: int | None = None
    ) -> Iterator[tuple[str, np.ndarray | ImageError]]:
        """The source and embedding (num_features,) of each image in turn, or its error."""
        for image, row in self._stream(self.runtime.embed, images, batch_size, workers):
            yield describe(image), row

    def _best(self, topk: int, batch: np.ndarray) -> list[list[Prediction]]:
        if not self.labels:
            raise DimmixError(f"{self.name} has no classifier, and gives embeddings alone", exit_code=2)
        scores = softmax(self.runtime.logits(batch), self.name)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
        best = zip(order.tolist(), np.take_along_axis(scores, order, 1).tolist(), strict=True)
        return [[Prediction(self.labels[i], i, score) for i, score in zip(*row, strict=True)] for row in best]

    def prepare(self, image: Any) -> np.ndarray:
        """One image, read and cropped: uint8 (H, W, C), or float32 (C, H, W) if it came transformed."""
        preprocess = self.runtime.spec.preprocess
        if _is_floating(image):
            array = np.asarray(image.detach().float().cpu() if hasattr(image, "cpu") else image, np.float32)
            if array.shape != preprocess.input_size:
                reason = f"float values of shape {array.shape}: after `transform` they are {preprocess.input_size}"
                raise ImageError(describe(image), reason)
            if not np.isfinite(array).all():
                raise ImageError(describe(image), "values that are not finite")
            return array
        return crop_image(image, preprocess)

    def to_batch(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """What `prepare` returned for several images, as one float32 (B, C, H, W) array."""
        preprocess = self.runtime.spec.preprocess
        if all(item.dtype == np.uint8 for item in prepared):
            return preprocess.normalize(np.stack(prepared))
        return np.stack([preprocess.normalize(item) if item.dtype == np.uint8 else item for item in prepared])

    def _stream(
        self,
        function: Callable[[np.ndarray], Iterable[Any]],
        images: Iterable[Any],
        batch_size: int,
        workers: int | None,
    ) -> Iterator[tuple[Any, Any]]:
        def run(prepared: list[np.ndarray]) -> Iterable[Any]:
            return function(self.to_batch(prepared))

        for batch in run_batches(images, self.prepare, run, self.runtime, batch_size, workers):
            yield from batch

    def _is_single(self, images: Any) -> bool:
        if isinstance(images, str | os.PathLike | bytes | bytearray | Image.Image):
            return True
        return hasattr(images, "read") or (hasattr(images, "ndim") and images.ndim < 4)


def softmax(logits: np.ndarray, model: str) -> np.ndarray:
    """Probabilities along the last axis, in float64, of what `model` gave.

    Raises:
        DimmixError: logits that are not finite.
    """
    if not np.isfinite(logits).all():
        raise DimmixError(f"{model} gives numbers that are not finite: its weights or its std are broken")
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _is_floating(image: Any) -> bool:
    dtype = getattr(image, "dtype", None)
    return dtype is not None and "float" in str(dtype)
