"""The three plots of the benchmark, from the records it has just written, and how accuracy is drawn against a cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

from dimmix import FAMILIES
from dimmix.registry import dense_twin

Record = dict[str, Any]
OTHERS = "dense ResNet-20, timm's"
COSTS_SIZE = (8, 5)


def draw_attention(records: Sequence[Record], path: Path) -> None:
    """Milliseconds against tokens: all tokens, and each level of a butterfly."""
    figure, axes = _axes("tokens N", "ms, batch 1, 4 heads of 32", "Attention over groups of √N tokens")
    tokens = [r["n"] for r in records]
    axes.plot(tokens, [r["full_ms"]["median"] for r in records], "o-", label="all tokens")
    for level in range(min(len(r["level_ms"]) for r in records)):
        axes.plot(tokens, [r["level_ms"][level]["median"] for r in records], "s--", label=f"butterfly, level {level}")
    _save(figure, axes, path)


def draw_linear(records: Sequence[Record], path: Path) -> None:
    """Milliseconds against features, one pair of lines for each number of rows."""
    figure, axes = _axes("features n", "ms", "Linear layers")
    for rows in sorted({r["rows"] for r in records}):
        chosen = [r for r in records if r["rows"] == rows and r["mode"] == "float32"]
        for layout, style in (("features last", "s--"), ("features first", "^:")):
            lines = [r for r in chosen if r["layout"] == layout]
            times = [r["sparse_ms"]["median"] for r in lines]
            axes.plot([r["n"] for r in lines], times, style, label=f"ButterflyLinear, {layout}, {rows} rows")
        dense = [r["dense_ms"]["median"] for r in lines]
        axes.plot([r["n"] for r in lines], dense, "o-", label=f"nn.Linear, {rows} rows")
    _save(figure, axes, path)


def draw_models(records: Sequence[Record], path: Path) -> None:
    """Accuracy against latency, of the models whose accuracy a card tells."""
    known = {r["work"]: (r["ms"]["median"], r["top1"]) for r in records if r["top1"] is not None}
    figure, axes = plt.subplots(figsize=COSTS_SIZE, layout="constrained")
    draw_costs(axes, known)
    axes.set(xlabel=f"ms for {records[0]['batch']} images of 32x32", ylabel="top-1 on CIFAR-10, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_costs(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """(cost, top-1) of architectures by name, the cost on a logarithmic scale.

    A colour a family; filled squares are sparse models, open circles dense ones, and a dotted line leads from a model
    to its dense twin, which has no label of its own.
    """
    twins = {name: twin for name in points if (twin := dense_twin(name)) in points}
    axes.set(xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    for name, twin in twins.items():
        axes.plot(*zip(points[name], points[twin], strict=True), ":", color=_family(name)[1], zorder=1)
    for name, (cost, top1) in points.items():
        family, color = _family(name)
        dense = name.endswith("_dense") or family == OTHERS
        face = "white" if dense else color
        axes.plot(cost, top1, "o" if dense else "s", color=color, markerfacecolor=face, zorder=2)
    for family, color in sorted({_family(name) for name in points}, key=lambda known: known[1]):
        face = "white" if family == OTHERS else color
        axes.plot([], [], "o" if family == OTHERS else "s", color=color, markerfacecolor=face, label=family)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes.margins(0.1, 0.08)
    _label(axes, {name: point for name, point in points.items() if name not in twins.values()})


def _family(name: str) -> tuple[str, str]:
    """The family of an architecture as a legend has it, and its colour; the ResNet-20s are dense, and apart."""
    for place, family in enumerate(FAMILIES):
        if name.startswith(family):
            return family, f"C{place}"
    return OTHERS, "dimgray"


def _label(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each name beside its point, where it covers no other point and no other name if there is such a place."""
    axes.figure.draw_without_rendering()  # places are known once the axes have their limits
    marks = [axes.transData.transform(point) for point in points.values()]
    taken: list[Bbox] = []
    for name, point in points.items():
        family, color = _family(name)
        short = name.removeprefix(f"{family}_").removeprefix("butterfly_").removesuffix("_32")
        tried = []
        for x, y, side in ((6, 0, "left"), (-6, 0, "right"), (0, 8, "center"), (0, -8, "center"), (6, 9, "left")):
            text = axes.annotate(short, point, (x, y), textcoords="offset points", fontsize=7, color=color)
            text.set(horizontalalignment=side, verticalalignment="center")
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])
            box = text.get_window_extent()
            hidden = sum(box.overlaps(other) for other in taken) + sum(box.contains(*mark) for mark in marks)
            tried.append((hidden + (box.x1 > axes.bbox.x1), len(tried), text, box))
        best = min(tried, key=lambda trial: trial[:2])
        taken.append(best[3])
        for trial in tried:
            if trial is not best:
                trial[2].remove()


def _axes(x: str, y: str, title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
