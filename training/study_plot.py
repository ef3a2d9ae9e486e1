"""The figures of the studies, from their records."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dimmix.files import replacing
from dimmix.report import new_figure

Record = dict[str, Any]
MARKERS = {"MLP-Mixer": "o", "RP-Mixer": "s", "SW-MLP": "^"}


def plot_study(kind: str, records: list[Record], path: Path) -> None:
    """Draw the figure of a study other than "cost" to `path`, means over the seeds.

    Raises:
        DimmixError: matplotlib is not installed.
    """
    figure = new_figure((5.6, 3.8), "drawing a study", "train")
    axes = figure.subplots()
    {"width": _width, "depth": _depth, "similarity": _similarity, "spectrum": _spectrum}[kind](axes, records)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file)


def _width(axes: Any, records: list[Record]) -> None:
    for model, line in _lines(records, "model", lambda r: r["channels"] / r["tokens"], "error"):
        axes.plot(*line, marker=MARKERS[model], label=model)
    axes.set(
        xscale="log", xlabel="C / S", ylabel="error, %", title=f"{records[0]['connections']:,} connections a Linear"
    )


def _depth(axes: Any, records: list[Record]) -> None:
    for model, line in _lines(records, "model", lambda r: r["depth"], "error"):
        axes.plot(*line, marker=MARKERS[model], label=model)
    axes.set(xlabel="depth", ylabel="error, %", title=f"{records[0]['connections']:,} connections a Linear")


def _similarity(axes: Any, records: list[Record]) -> None:
    for against, line in _lines(records, "against", lambda r: r["layer"], "cka"):
        axes.plot(*line, marker=MARKERS.get(against, "."), label=against)
    axes.set(xlabel="layer", ylabel="CKA with an MLP-Mixer", ylim=(0, 1.02))


def _spectrum(axes: Any, records: list[Record]) -> None:
    for key, style, when in (("norm_after", "-", "trained"), ("norm_at_start", ":", "at the start")):
        for model, line in _lines(records, "model", lambda r: r["width"], key):
            axes.plot(*line, style, marker=MARKERS[model], label=f"{model}, {when}")
    axes.set(xscale="log", xlabel="width m = S C", ylabel="largest singular value, mean over Linears")


def _lines(
    records: list[Record], group: str, x: Callable[[Record], float], y: str
) -> Iterable[tuple[str, tuple[list[float], list[float]]]]:
    """For every value of `group` the sorted x and the mean of y over the records that share it."""
    for name in dict.fromkeys(record[group] for record in records):
        values: dict[float, list[float]] = {}
        for record in records:
            if record[group] == name:
                values.setdefault(x(record), []).append(record[y])
        xs = sorted(values)
        yield name, (xs, [sum(values[at]) / len(values[at]) for at in xs])
