"""One self-contained HTML page about an evaluation: calibration, confusion, classes, the most confident mistakes."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .errors import DimmixError
from .evaluation import Answer, Evaluation
from .files import replacing
from .images import open_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left }}
img {{ max-width: 100% }} .mistakes {{ display: grid; grid-template-columns: repeat(auto-fill, 9rem); gap: 1rem }}
figure {{ margin: 0; font-size: 13px }} figure img {{ width: 8rem; image-rendering: pixelated }}
</style></head><body>
<h1>{title}</h1>
<table>{metrics}</table>
<h2>Calibration</h2><img alt="reliability curve" src="{reliability}">
<h2>Classes</h2><img alt="accuracy of each class" src="{classes}">
<h2>Confusion</h2><img alt="confusion matrix" src="{confusion}">
<h2>The most confident mistakes</h2><div class="mistakes">{mistakes}</div>
</body></html>
"""


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Writes `report.html` into the folder, which is made where there is none; returns its path.

    Raises:
        DimmixError: matplotlib is not installed, or the folder cannot be written to.
    """
    rows = (f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in evaluation.record().items())
    page = _PAGE.format(
        title=html.escape(f"{evaluation.model} on {Path(evaluation.data).name}, {evaluation.split}"),
        metrics="".join(rows),
        reliability=_figure(evaluation, _draw_reliability, (5, 4)),
        classes=_figure(evaluation, _draw_classes, (8, 1 + 0.22 * len(evaluation.class_accuracies))),
        confusion=_figure(evaluation, _draw_confusion, (8, 7)),
        mistakes="".join(_mistake(evaluation, answer) for answer in evaluation.mistakes) or "<p>There are none.</p>",
    )
    make_folder(folder)
    with replacing(folder / "report.html") as path:
        path.write_text(page, encoding="utf-8")
    return folder / "report.html"


def make_folder(folder: Path) -> None:
    """The report's folder, if it is not there. Raises DimmixError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DimmixError(f"--report {folder}: {error.strerror}", exit_code=2) from error


def new_figure(size: tuple[float, float], what: str, extra: str) -> "Figure":
    """An empty figure of so many inches. Raises DimmixError without matplotlib, naming the `extra` that brings it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DimmixError(f"{what} needs matplotlib: pip install 'dimmix[{extra}]'") from None
    return Figure(size, dpi=120, layout="constrained")


def _figure(evaluation: Evaluation, draw: Callable[[Evaluation, Any], None], size: tuple[float, float]) -> str:
    figure = new_figure(size, "the report", "eval")
    draw(evaluation, figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return _data_url(file.getvalue())


def _draw_reliability(evaluation: Evaluation, axes: "Axes") -> None:
    seen = evaluation.bin_images > 0
    images = evaluation.bin_images[seen]
    confidence = evaluation.bin_confidence[seen] / images
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="perfectly calibrated")
    axes.plot(confidence, evaluation.bin_correct[seen] / images, marker="o", label=f"ECE {evaluation.ece:.4f}")
    axes.bar(confidence, images / images.sum(), width=0.02, color="0.85", label="share of images")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend()


def _draw_classes(evaluation: Evaluation, axes: "Axes") -> None:
    names, accuracies = zip(*sorted(evaluation.class_accuracies, key=lambda item: item[1]), strict=True)
    axes.barh(range(len(names)), accuracies, tick_label=names)
    axes.set(xlabel="accuracy (%)", xlim=(0, 100), ylim=(-0.6, len(names) - 0.4))


def _draw_confusion(evaluation: Evaluation, axes: "Axes") -> None:
    counts = evaluation.confusion
    image = axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(evaluation.labels) <= 30:
        axes.set_xticks(range(len(evaluation.labels)), evaluation.labels, rotation=90)
        axes.set_yticks(range(len(evaluation.labels)), evaluation.labels)
    axes.figure.colorbar(image, ax=axes, label="share of the true class")


def _mistake(evaluation: Evaluation, answer: Answer) -> str:
    image = open_image(answer.sample.image)
    image.thumbnail((256, 256), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    caption = (
        f"{evaluation.labels[answer.prediction]} {answer.score:.0%}, is {evaluation.labels[answer.label]} "
        f"({Path(answer.sample.source).name})"
    )
    return f'<figure><img src="{_data_url(file.getvalue())}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
