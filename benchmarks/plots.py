"""The three plots of the benchmark, from the records it has just written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Record = dict[str, Any]


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
    """Accuracy against latency where a checkpoint tells the accuracy; otherwise MACs against latency."""
    known = [r for r in records if r["top1"] is not None]
    chosen = known if len(known) > 1 else records
    title = "top-1 on CIFAR-10, %" if chosen is known else "MACs"
    figure, axes = _axes(f"ms for {chosen[0]['batch']} images of 32x32", title, "Models")
    for r in chosen:
        y = r["top1"] if chosen is known else r["macs"]
        axes.plot(r["ms"]["median"], y, "s" if "butterfly" in r["work"] or "patch_only" in r["work"] else "o")
        axes.annotate(r["work"], (r["ms"]["median"], y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    if chosen is known:
        axes.set_yscale("linear")
    _save(figure, axes, path, legend=False)


def _axes(x: str, y: str, title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _save(figure: Any, axes: Any, path: Path, legend: bool = True) -> None:
    if legend:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
