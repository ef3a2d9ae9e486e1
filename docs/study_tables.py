"""The tables of docs/wide_sparse.md, from what `dimmix study --out docs/studies` wrote there."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmark_tables import markdown_table

Record = dict[str, Any]
FOLDER = Path(__file__).parent / "studies"


def _records(kind: str, dataset: str = "cifar10") -> list[Record]:
    lines = (FOLDER / dataset / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines for record in json.loads(line)["records"]]


def _groups(records: Iterable[Record], *keys: str) -> list[list[Record]]:
    """The records that share the values of `keys`, in the order in which they first come."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return list(groups.values())


def _of(key: str, pattern: str = "{}") -> Callable[[list[Record]], str]:
    return lambda group: pattern.format(group[0][key])


def _mean(key: str, pattern: str = "{:.1f}", **having: str) -> Callable[[list[Record]], str]:
    """The mean over the seeds of those in a group that have these values."""

    def text(group: list[Record]) -> str:
        values = [record[key] for record in group if all(record[name] == value for name, value in having.items())]
        return pattern.format(mean(values)) if values else ""

    return text


def _width() -> str:
    records = [record | {"dataset": name} for name in ("cifar10", "cifar100") for record in _records("width", name)]
    columns: dict[str, Callable[[list[Record]], str]] = {
        "C": _of("channels"),
        "S": _of("tokens"),
        "C / S": lambda group: f"{group[0]['channels'] / group[0]['tokens']:.2f}",
        "width m": _of("width", "{:,}"),
    }
    for dataset, title in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100")):
        for model in ("MLP-Mixer", "RP-Mixer"):
            columns[f"{title}: {model}"] = _mean("error", model=model, dataset=dataset)
    return markdown_table(_groups(records, "channels"), columns)


def _depth() -> str:
    columns = {"depth": _of("depth")}
    for model in ("MLP-Mixer", "SW-MLP"):
        columns |= {
            f"{model}, error %": _mean("error", model=model),
            f"{model}, s": _mean("seconds", "{:.0f}", model=model),
        }
    return markdown_table(_groups(_records("depth"), "depth"), columns)


def _similarity() -> str:
    records = _records("similarity")
    columns = {"an MLP-Mixer against": _of("against")}
    for layer in sorted({record["layer"] for record in records}):
        columns[f"layer {layer}"] = lambda group, layer=layer: (
            f"{mean(r['cka'] for r in group if r['layer'] == layer):.2f}"
        )
    columns["error %"] = lambda group: _mean("other_error")(group) if group[0]["other_error"] is not None else ""
    return markdown_table(_groups(records, "against"), columns)


def _spectrum() -> str:
    columns = {"width m": _of("width", "{:,}"), "connections": _of("connections", "{:,}")}
    for model in ("MLP-Mixer", "SW-MLP"):
        columns |= {
            f"{model} at the start": _mean("norm_at_start", "{:.2f}", model=model),
            f"{model}, trained": _mean("norm_after", "{:.2f}", model=model),
        }
    return markdown_table(_groups(_records("spectrum"), "width"), columns)


TABLES: dict[str, Callable[[], str]] = {
    "width": _width,
    "depth": _depth,
    "similarity": _similarity,
    "spectrum": _spectrum,
}
