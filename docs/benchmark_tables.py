"""The tables of docs/performance.md, from what `python -m benchmarks` wrote to docs/benchmarks."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

Record = dict[str, Any]
FOLDER = Path(__file__).parent / "benchmarks"
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- /table -->", re.DOTALL)


def fill(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """`text` with what stands between each pair of marks made anew."""
    return MARKED.sub(lambda match: f"<!-- table: {match[1]} -->\n{tables[match[1]]()}\n<!-- /table -->", text)


def latency() -> dict[str, float]:
    """Milliseconds for a batch by architecture, all measured in turn in one run."""
    return {record["work"]: record["ms"]["median"] for record in _records("front")}


def _read(subject: str, folder: Path = FOLDER) -> dict[str, Any]:
    return json.loads((folder / f"{subject}.json").read_text(encoding="utf-8"))


def _records(*subjects: str, folder: Path = FOLDER) -> list[Record]:
    return [record for subject in subjects for record in _read(subject, folder)["records"]]


def _machine() -> str:
    machine = _read("linear")["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    processor = f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads"
    kernels = f"kernels {machine['kernels'] or 'off'}"
    return f"{processor}; {kernels}; {versions}; {machine['date']}"


def _summary() -> str:
    """The ratios of each kind of work: the least, the median and the most, and how many reach their mark."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in _records("linear", "mlp"):
        groups.setdefault((f"{record['work']}, {record['mode']}", "dense layer"), []).append(record)
    groups["attention, both levels", "all tokens"] = _records("attention")
    for subject, against in (("twins", "dense twin"), ("equals", "dense ResNet of equal accuracy")):
        for record in _records(subject):
            images = "one image" if record["batch"] == 1 else f"{record['batch']} images"
            groups.setdefault((f"models, {record['backend']}, {images}", against), []).append(record)
    return markdown_table(
        list(groups.items()), {"work": lambda group: group[0][0], "beside": lambda group: group[0][1]} | _SPREAD
    )


def _layers(modes: Sequence[str]) -> str:
    records = [record for record in _records("linear", "mlp") if record["mode"] in modes]
    columns = {"layer": _get("work"), "n": _get("n"), "rows": _get("rows"), "layout": _get("layout")}
    columns |= {"mode": _get("mode")} if len(modes) > 1 else {}
    ours = {"than our dense": lambda record: f"{record['faster_than_ours']:.3g}"} if modes == ["float32"] else {}
    return markdown_table(records, columns | _PAIR | ours)


def _attention() -> str:
    columns = {
        "N": _get("n"),
        "group": _get("radix"),
        "all tokens": _time("full_ms"),
        "level 0": lambda record: _milliseconds(record["level_ms"][0]),
        "level 1": lambda record: _milliseconds(record["level_ms"][1]),
        "faster": _faster,
        "to reach": _reach,
        "aim": _get("aim"),
        "dearest / cheapest": _get("dearest_to_cheapest"),
    }
    return markdown_table(_records("attention"), columns)


def _processors() -> str:
    """The ratios that have a mark, in float32, on the processor of this run and on those that have a folder."""
    folders = [FOLDER, *sorted(path for path in FOLDER.iterdir() if path.is_dir())]
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    for folder in folders:  # what stands first is this run, on a processor that has a folder too
        columns.setdefault(_read("linear", folder)["machine"]["processor"], _marked(folder))
    ours = next(iter(columns.values()))
    records = [{"work": work, "reach": reach} for work, (reach, _) in ours.items()]

    def measured(marked: dict[str, tuple[float, float]], record: Record) -> str:
        _, faster = marked.get(record["work"], (0.0, 0.0))
        return (f"{faster:.3g}" + " **short**" * (faster < record["reach"])) if faster else ""

    shown: dict[str, Callable[[Record], object]] = {"work": _get("work"), "to reach": lambda r: f"{r['reach']:.3g}"}
    shown |= {name: partial(measured, marked) for name, marked in columns.items()}
    return markdown_table(records, shown)


def _marked(folder: Path) -> dict[str, tuple[float, float]]:
    """Mark and ratio of each layer, attention and model (BatchNorm folded) in float32, by a name for what was timed."""
    found = {}
    for record in _records("linear", "mlp", folder=folder):
        if record["mode"] == "float32":
            found["{work}, n = {n}, {rows} rows, {layout}".format(**record)] = record
    for record in _records("attention", folder=folder):
        found[f"attention, {record['n']:,} tokens"] = record
    for record in _records("twins", folder=folder):
        if record["backend"] == "fused" and record["reach"]:
            found["{work}, {batch}".format(**record)] = record
    for record in _records("equals", folder=folder):
        if record["backend"] == "fused":
            found["{work} beside {against}, {batch}".format(**record)] = record
    return {work: (record["reach"], record["faster"]) for work, record in found.items()}


def _memory() -> str:
    columns = {"N": _get("n"), "copies of q, k and v": _get("copies_of_qkv"), "to stay below": _get("below")}
    return markdown_table(_records("memory"), columns)


def _twins() -> str:
    """How many times as fast as its twin each model is, a row a model and a column a way to run it."""
    rows: dict[str, dict[tuple[str, int], Record]] = {}
    for record in _records("twins"):
        rows.setdefault(record["work"], {})[record["backend"], record["batch"]] = record
    ways = list(dict.fromkeys(way for row in rows.values() for way in row))
    most = max(batch for _, batch in ways)

    def ratio(way: tuple[str, int], row: tuple[str, dict[tuple[str, int], Record]]) -> str:
        record = row[1].get(way)
        short = record and record["reach"] and record["faster"] < record["reach"]
        return (_faster(record) + " **short**" * bool(short)) if record else ""

    columns: dict[str, Callable[[Any], object]] = {
        "model": lambda row: row[0],
        "MACs": lambda row: f"1/{row[1]['fused', most]['mac_ratio']:.3g}",
        f"to reach at {most}": lambda row: _reach(row[1]["fused", most]).partition(" ")[0],
    }
    columns |= {f"{backend}, {batch}": partial(ratio, (backend, batch)) for backend, batch in ways}
    return markdown_table(list(rows.items()), columns)


def _equals() -> str:
    columns = {
        "model": _get("work"),
        "top-1": lambda record: f"{record['sparse_top1']:.2f}",
        "dense": _get("against"),
        "its top-1": lambda record: f"{record['dense_top1']:.2f}",
        "backend": _get("backend"),
        "batch": _get("batch"),
    }
    return markdown_table(_records("equals"), columns | _PAIR)


def _front() -> str:
    columns = {
        "model": _get("work"),
        "ms": _time("ms"),
        "parameters": lambda record: f"{record['params']:,}",
        "MMACs": lambda record: f"{record['macs'] / 1e6:.1f}",
        "top-1, CIFAR-10": lambda record: "" if record["top1"] is None else f"{record['top1']:.2f}",
        "beaten by": lambda record: ", ".join(record.get("beaten_by", ())),
        "by a larger one": lambda record: ", ".join(record.get("beaten_by_larger", ())),
        "by a dense ResNet-20": lambda record: ", ".join(record.get("beaten_by_dense", ())),
    }
    return markdown_table(sorted(_records("front"), key=lambda record: record["ms"]["median"]), columns)


def _operators() -> str:
    columns: dict[str, Callable[[Record], object]] = {"model": _get("work"), "ms": _get("pass_ms")}
    for place, title in enumerate(("first", "second", "third", "fourth", "fifth")):
        columns[title] = lambda record, place=place: _share(record, place)
    return markdown_table(_records("operators"), columns)


def _share(record: Record, place: int) -> str:
    return "".join(f"{kind} {percent:.0f}" for kind, percent in list(record["shares"].items())[place : place + 1])


def _kernels() -> str:
    columns = {"model": _get("work"), "batch": _get("batch"), "ms": _time("kernels_ms")}
    return markdown_table(_records("kernels"), columns | {"ms, torch": _time("torch_ms"), "faster": _faster})


def _command_line() -> str:
    measured = json.loads((FOLDER / "cli.json").read_text(encoding="utf-8"))
    rows = {
        "`dimmix --help`, s": ("help_seconds", "0.25"),
        "`dimmix predict` of one image, in starts of `import torch, timm`": ("predict_over_import", "1.3"),
        "`dimmix predict` of one image with an ONNX file, s": ("predict_onnx_seconds", "0.8"),
        "images/s of `predict` on 5,000 small JPEG files": ("predict_images_per_second", ""),
        "images/s of the model alone": ("model_alone_images_per_second", ""),
        "images/s of decoding alone": ("decoding_alone_images_per_second", ""),
        "`predict` over the slower of the two": ("predict_over_bound", "at least 0.8"),
    }
    records = [
        {"what": what, "measured": _rounded(measured[key]), "to reach": mark} for what, (key, mark) in rows.items()
    ]
    return markdown_table(records, {name: _get(name) for name in ("what", "measured", "to reach")})


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown_table(records: Sequence[Any], columns: dict[str, Callable[[Any], object]]) -> str:
    """A row a record, the first column to the left."""
    rows = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    rows += [[str(value(record)) for value in columns.values()] for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _get(key: str) -> Callable[[Record], object]:
    return lambda record: record[key]


def _ratios(group: tuple[Any, list[Record]]) -> list[float]:
    return [record["faster"] for record in group[1]]


def _reaching(records: Sequence[Record]) -> str:
    marked = [record for record in records if record["reach"] is not None]
    reached = sum(record["faster"] >= record["reach"] for record in marked)
    return f"{reached} of {len(marked)}" if marked else "no mark"


def _time(key: str) -> Callable[[Record], object]:
    return lambda record: _milliseconds(record[key])


def _milliseconds(timing: dict[str, float]) -> str:
    return f"{timing['median']:.4g} ({timing['low']:.4g}-{timing['high']:.4g})"


def _faster(record: Record) -> str:
    return f"{record['faster']:.3g}"


def _reach(record: Record) -> str:
    if record["reach"] is None:
        return ""
    return f"{record['reach']:.3g}" + " **short**" * (record["faster"] < record["reach"])


_PAIR: dict[str, Callable[[Record], object]] = {
    "ms": _time("sparse_ms"),
    "ms, dense": _time("dense_ms"),
    "MACs": lambda record: f"1/{record['mac_ratio']:.3g}",
    "faster": _faster,
    "to reach": _reach,
}

_SPREAD: dict[str, Callable[[Any], object]] = {
    "least": lambda group: f"{min(_ratios(group)):.3g}",
    "median": lambda group: f"{median(_ratios(group)):.3g}",
    "most": lambda group: f"{max(_ratios(group)):.3g}",
    "reach their mark": lambda group: _reaching(group[1]),
}

TABLES: dict[str, Callable[[], str]] = {
    "kernels": _kernels,
    "machine": _machine,
    "summary": _summary,
    "layers": lambda: _layers(["float32"]),
    "modes": lambda: _layers(["bfloat16", "training"]),
    "attention": _attention,
    "processors": _processors,
    "memory": _memory,
    "twins": _twins,
    "equals": _equals,
    "front": _front,
    "operators": _operators,
    "cli": _command_line,
}
