"""Accuracy, calibration and confusion of a classifier over a data set, in one pass and bounded memory.

The sums are kept in NumPy, so that an exported file is evaluated where torch is not installed; the tests hold them
against torchmetrics.
"""

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .classifier import Classifier, softmax
from .datasets import LabelledImages, Sample, match_labels
from .errors import DimmixError
from .images import ImageError
from .stream import run_batches

BINS = 15
"""Equal bins of confidence for the calibration error."""

Track = Callable[[Iterable[Sample]], Iterable[Sample]]
"""Hands samples on and counts them, as a progress bar does."""

_MISTAKES = 24


class Answer(NamedTuple):
    """What the model said of one sample: `label` and `prediction` are the model's indices."""

    sample: Sample
    label: int
    prediction: int
    score: float


@dataclass
class Evaluation:
    """Sums over the images seen; the properties are the metrics, accuracies in percent, NLL in nats, ECE a fraction.

    `confusion` is (classes, classes), true by predicted; the three `bin_*` arrays are over bins of confidence, the
    last one for a confidence of exactly 1; `mistakes` are the most confident ones.
    """

    model: str
    data: str
    split: str
    labels: list[str]
    confusion: np.ndarray = field(init=False)
    bin_images: np.ndarray = field(default_factory=lambda: np.zeros(BINS + 1))
    bin_confidence: np.ndarray = field(default_factory=lambda: np.zeros(BINS + 1))
    bin_correct: np.ndarray = field(default_factory=lambda: np.zeros(BINS + 1))
    errors: list[ImageError] = field(default_factory=list)
    seconds: float = 0.0
    _top5: int = 0
    _nll: float = 0.0
    _mistakes: list[tuple[float, int, Answer]] = field(default_factory=list)
    _missed: int = 0

    def __post_init__(self) -> None:
        self.confusion = np.zeros((len(self.labels), len(self.labels)), np.int64)

    def update(self, logits: np.ndarray, labels: np.ndarray, samples: list[Sample]) -> list[Answer]:
        """Adds a batch: logits (B, classes), the model's label indices (B,); returns what the model said."""
        probabilities = softmax(logits, self.model)
        best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :5]
        predictions = probabilities.argmax(-1)
        scores = probabilities.max(-1)
        correct = predictions == labels
        true = probabilities[np.arange(len(labels)), labels]
        np.add.at(self.confusion, (labels, predictions), 1)
        self._top5 += int((best == np.asarray(labels)[:, None]).sum())
        self._nll -= float(np.log(np.maximum(true, np.finfo(np.float64).tiny)).sum())
        bins = np.digitize(scores.astype(np.float32), np.linspace(0, 1, BINS + 1, dtype=np.float32)) - 1
        np.add.at(self.bin_images, bins, 1)
        np.add.at(self.bin_confidence, bins, scores)
        np.add.at(self.bin_correct, bins, correct)
        answers = [
            Answer(sample, int(label), int(prediction), float(score))
            for sample, label, prediction, score in zip(samples, labels, predictions, scores, strict=True)
        ]
        for answer in answers:
            if answer.label != answer.prediction:
                self._keep_mistake(answer)
        return answers

    def _keep_mistake(self, answer: Answer) -> None:
        self._missed += 1
        entry = (answer.score, -self._missed, answer)  # of equal ones the first seen stays
        if len(self._mistakes) < _MISTAKES:
            heapq.heappush(self._mistakes, entry)
        elif entry[0] > self._mistakes[0][0]:
            heapq.heapreplace(self._mistakes, entry)

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        return 100 * float(np.trace(self.confusion)) / self.images

    @property
    def top5(self) -> float:
        return 100 * self._top5 / self.images

    @property
    def nll(self) -> float:
        return self._nll / self.images

    @property
    def ece(self) -> float:
        return float(np.abs(self.bin_confidence - self.bin_correct).sum()) / self.images

    @property
    def mistakes(self) -> list[Answer]:
        """The most confident mistakes, the most confident first."""
        return [answer for _, _, answer in sorted(self._mistakes, key=lambda entry: -entry[0])]

    @property
    def per_class_accuracy(self) -> tuple[float | None, ...]:
        """Percent for each class, in the order of `labels`; None for one of which there were no images."""
        seen, hits = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return tuple(100 * hit / images if images else None for hit, images in zip(hits, seen, strict=True))

    @property
    def class_accuracies(self) -> list[tuple[str, float]]:
        """(class, percent) for each class of which there were images; ImageNet has two classes called crane."""
        rows = zip(self.labels, self.per_class_accuracy, strict=True)
        return [(label, accuracy) for label, accuracy in rows if accuracy is not None]

    def record(self) -> dict[str, Any]:
        """What `dimmix eval --format json` prints."""
        return {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "images": self.images,
            "top1": round(self.top1, 4),
            "top5": round(self.top5, 4),
            "nll": round(self.nll, 6),
            "ece": round(self.ece, 6),
            "images_per_second": round(self.images / self.seconds, 1),
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    classifier: Classifier,
    dataset: LabelledImages,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    track: Track = lambda samples: samples,
) -> Evaluation:
    """Runs the classifier over the data; `on_answer` gets each answer as it comes, `track` counts the samples.

    Images that cannot be read are left out and kept in `errors`.

    Raises:
        DimmixError: labels that do not match the model's, or not one image that can be read.
    """
    mapping = match_labels(dataset, classifier.name, classifier.labels)
    evaluation = Evaluation(classifier.name, dataset.name, dataset.split, classifier.labels)
    start = time.perf_counter()

    def load(sample: Sample) -> np.ndarray:
        try:
            return classifier.prepare(sample.image)
        except ImageError as error:
            raise ImageError(sample.source, error.reason) from error

    def run(prepared: list[np.ndarray]) -> np.ndarray:
        return classifier.runtime.logits(classifier.to_batch(prepared))

    for batch in run_batches(track(dataset), load, run, classifier.runtime, batch_size, workers):
        evaluation.errors += [row for _, row in batch if isinstance(row, ImageError)]
        good = [(sample, row) for sample, row in batch if not isinstance(row, ImageError)]
        if not good:
            continue
        samples = [sample for sample, _ in good]
        labels = np.array([_model_index(sample, mapping, dataset, len(classifier.labels)) for sample in samples])
        for answer in evaluation.update(np.stack([row for _, row in good]), labels, samples):
            on_answer(answer)
    evaluation.seconds = time.perf_counter() - start
    if not evaluation.images:
        reason = f": {evaluation.errors[0]}" if evaluation.errors else ""
        raise DimmixError(f"{dataset.name}: no image to evaluate on{reason}")
    return evaluation


def _model_index(sample: Sample, mapping: list[int] | None, dataset: LabelledImages, classes: int) -> int:
    known = classes if mapping is None else len(mapping)
    if not 0 <= sample.label < known:
        what = "has no label" if sample.label < 0 else f"is of class {sample.label}, the model has {known} classes"
        if dataset.label_column and sample.label >= 0:
            what += f"; labels are of the column {dataset.label_column}, and --label-column names another"
        raise DimmixError(f"{dataset.name}: {sample.source} {what}")
    return sample.label if mapping is None else mapping[sample.label]
