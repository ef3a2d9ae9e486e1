"""Runs the benchmark: `python -m benchmarks [--quick | --gpu | --all] [--check] [--out FOLDER]`.

Writes one JSON file a subject and the plots. `--quick` runs the layers alone, briefly, and writes nothing unless told
where; `--gpu` runs what there is for a GPU and nothing else; `--check` exits with 1 if a ratio falls short.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dimmix.allocator import keep_freed_memory
from dimmix.checkpoints import cards
from dimmix.files import write_atomically
from dimmix.layers import native
from dimmix.registry import dense_twin

from . import gpu, layers, models, operators, plots
from .check import shortfalls
from .machine import describe
from .trained import unbundled

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"

SPARSE = (
    "butterfly_resnet20_convmix_w32",
    "butterfly_resnet20_blockmix_w32",
    "butterfly_resnet_fast_32",
    "butterfly_resnet_fast_blockmix_32",
    "vit_butterfly_tiny_patch4_32",
    "butterfly_mixer_nano_32",
    "patch_only_mixer_tiny_32",
)
"""Measured besides the models that have weights."""

COMPILED = ("butterfly_resnet_fast_32", "vit_butterfly_tiny_patch4_32", "butterfly_mixer_fast_32")
"""Compiled unless all are asked for: it takes a quarter of a minute a model, and its twin as long."""

SAMPLED = ("bfloat16", "training")
"""Backends that time `Plan.sample` alone, for the same reason."""

TIMM = ("resnet10t", "resnet18", "mobilenetv3_small_100", "mobilenetv2_050", "ghostnet_050", "lcnet_100", "tinynet_e")


@dataclass(frozen=True)
class Plan:
    """What to run, with the seconds that each pair of timings may take."""

    seconds: float
    linear: Sequence[int] = (1024, 4096)
    mlp: Sequence[int] = (256, 1024)
    rows: Sequence[int] = (512, 2048)
    attention: Sequence[int] = (1024, 4096, 16384)
    modes: Sequence[str] = ("float32",)
    backends: Sequence[str] = ()
    models: Sequence[str] = ()
    sample: Sequence[str] = ()
    compiled: Sequence[str] = ()
    others: Sequence[str] = ()
    batches: Sequence[int] = (1, 64)
    equals: Sequence[str] = ()
    operators: bool = False
    memory: Sequence[int] = field(default=(1024, 4096, 16384))


QUICK = Plan(seconds=1)
ON_GPU = Plan(seconds=0.3, rows=(2048, 32768), models=(*COMPILED, "patch_only_mixer_fast_32"), batches=(64, 1024))


def full_plan(every: bool = False) -> Plan:
    """Everything: the sparse models with weights beside their twins, and once whatever else was trained.

    With `every`, each model compiled, in bfloat16 and in training too.
    """
    bundled = {card.architecture for card in cards().values() if dense_twin(card.architecture)}
    trained = {card.architecture for card in [*cards().values(), *unbundled()]}
    models = tuple(dict.fromkeys((*SPARSE, *sorted(bundled))))
    return Plan(
        seconds=0.5,
        linear=(256, 1024, 4096),
        modes=("float32", "bfloat16", "training"),
        backends=("eager", "fused", "onnxruntime", "bfloat16", "training"),
        models=models,
        sample=models if every else SPARSE,
        compiled=tuple(sorted(bundled)) if every else COMPILED,
        others=(*sorted(trained - {*models, *TIMM}), *TIMM),
        equals=("fused", "onnxruntime"),
        operators=True,
    )


def run(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Records by subject, each subject announced with the time it took."""
    keep_freed_memory()  # as the command line does
    jobs: list[tuple[str, Any]] = []
    for mode in plan.modes:
        jobs.append(("linear", lambda mode=mode: layers.linear(plan.linear, plan.rows, plan.seconds, mode)))
        jobs.append(("mlp", lambda mode=mode: layers.mlp(plan.mlp, plan.rows, plan.seconds, mode)))
    jobs.append(("attention", lambda: layers.attention(plan.attention, plan.seconds)))
    jobs.append(("memory", lambda: layers.memory(plan.memory)))
    for backend in plan.backends:
        names, batches = (plan.sample, plan.batches[-1:]) if backend in SAMPLED else (plan.models, plan.batches)
        jobs.append(("twins", lambda m=names, b=backend, n=batches: models.twins(m, b, n, plan.seconds)))
        if backend in plan.equals:  # at once, while what it needs is prepared
            jobs.append(("equals", lambda b=backend: models.equals(b, plan.batches, plan.seconds)))
        if backend == "fused" and native.INSTRUCTIONS:
            jobs.append(("kernels", lambda: models.kernels(plan.models, plan.batches, plan.seconds / 2)))
    if plan.compiled:
        jobs.append(("twins", lambda: models.twins(plan.compiled, "compiled", plan.batches, plan.seconds)))
    if plan.operators:
        profiled = dict.fromkeys(name for model in plan.models for name in (model, dense_twin(model)))
        jobs.append(("operators", lambda: operators.operators(profiled, plan.batches[-1])))
    if plan.others:
        jobs.append(("front", lambda: models.front((*plan.models, *plan.others), plan.batches[-1], 5 * plan.seconds)))
    results: dict[str, list[dict[str, Any]]] = {}
    for subject, job in jobs:
        start = time.monotonic()
        results.setdefault(subject, []).extend(job())
        print(f"{subject}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return results


def run_on_gpu(plan: Plan, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Records of the subject "gpu"."""
    records = [*gpu.layers(plan.linear, plan.rows, plan.seconds, device)]
    records += gpu.attention(plan.attention, plan.seconds, device)
    for mode in gpu.MODES:  # a graph is compiled for each number of images, which takes longer than all timings
        batches = plan.batches if mode == "eager" else plan.batches[-1:]
        records += gpu.models(plan.models, mode, batches, plan.seconds, device)
    return {"gpu": records}


def write(results: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """One JSON file a subject, with the machine, and the plots."""
    machine = describe()
    for subject, records in results.items():
        text = json.dumps({"machine": machine, "records": records}, indent=1) + "\n"
        write_atomically(folder / f"{subject}.json", text.encode())
    if "linear" in results:
        plots.draw_attention(results["attention"], folder / "attention.png")
        plots.draw_linear(results["linear"], folder / "linear.png")
    if "front" in results:
        plots.draw_models(results["front"], folder / "models.png")


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """The exit code: 1 where `--check` finds a ratio that falls short."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Sparse layers and models beside dense.")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--quick", action="store_true", help="the ratios of the layers alone, in less than a minute")
    alone.add_argument("--gpu", action="store_true", help="layers and models on a GPU alone, in bfloat16")
    parser.add_argument("--check", action="store_true", help="exit with 1 and name the ratios that fall short")
    alone.add_argument("--all", action="store_true", help="every model compiled, in bfloat16 and in training too")
    parser.add_argument("--out", type=Path, help=f"folder to write to (default: {FOLDER}; with --quick: none)")
    options = parser.parse_args(arguments)
    folder = options.out or (None if options.quick else FOLDER)
    if folder:  # before anything is measured
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {folder}: {error.strerror}")
    torch.manual_seed(0)
    if options.gpu:
        if not torch.cuda.is_available():
            parser.error("--gpu: torch sees no GPU here")
        results = run_on_gpu(plan or ON_GPU, torch.device("cuda"))
    else:
        results = run(plan or (QUICK if options.quick else full_plan(options.all)))
    if folder:
        write(results, folder)
    for records in results.values():
        for record in records:
            print(_line(record))
    missed = shortfalls(record for records in results.values() for record in records)
    for line in missed if options.check else ():
        print(f"falls short: {line}")
    return 1 if options.check and missed else 0


def _line(record: dict[str, Any]) -> str:
    """A record on one line, a timing as its median."""
    return "  ".join(_cell(value) if key == "work" else f"{key}={_cell(value)}" for key, value in record.items())


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_cell, value))
    if not isinstance(value, dict):
        return str(value)
    return str(value["median"]) if "median" in value else "/".join(f"{key} {part}" for key, part in value.items())


if __name__ == "__main__":
    sys.exit(main())
