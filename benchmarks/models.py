"""Whole models: each sparse one against its dense twin, and beside models of timm, on images of 32 pixels."""

import copy
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse

from dimmix import list_models
from dimmix.benchmark import compiled
from dimmix.checkpoints import Card
from dimmix.export import export_model
from dimmix.fuse import fuse
from dimmix.layers import native
from dimmix.onnx_runtime import OnnxRuntime
from dimmix.profile import count_macs
from dimmix.registry import dense_twin
from dimmix.runtime import model_spec

from .timing import compare, speedup, summary
from .trained import last_trained, trained_alike

Record = dict[str, Any]
CLASSES = 10
RESNET20 = "resnet20_w"
EQUAL = 0.25  # points of top-1; the standard error of a share of 92 % in 10,000 images is 0.27
LIKE_SIZE = 2  # a model of at most so many times the parameters is of like size


def twins(names: Iterable[str], backend: str, batches: Iterable[int], seconds: float) -> list[Record]:
    """Each model against its dense twin. To be reached: never slower, and at batch 64 half of the MAC saving.

    Half of the saving: with m times fewer MACs, at most (1 + 1 / m) / 2 of the twin's time. `backend` is one of
    "eager", "fused" (eager with BatchNorm folded), "compiled", "onnxruntime", or for eager runs "bfloat16", "training".
    """
    pairs = [(name, dense_twin(name)) for name in names]
    if backend == "onnxruntime":
        export_all(dict.fromkeys(name for pair in pairs for name in pair))
    return [record for name, twin in pairs for record in _pair(name, twin, backend, batches, seconds)]


def equals(backend: str, batches: Iterable[int], seconds: float) -> list[Record]:
    """conv-mix and block-mix, each against the dense ResNet of equal accuracy. To be reached: at least as fast.

    `backend` is one of those of `twins`.
    Equal is the dense ResNet-20, or where none is as good the dense twin, of fewest multiply-accumulates whose top-1
    comes within `EQUAL` of the sparse model's or above it; the most accurate one where none does.
    """
    resnets = [
        card for card in _on_cifar10(last_trained()) if card.architecture.startswith(("butterfly_resnet", RESNET20))
    ]
    top1 = {card.architecture: card.top1 for card in sorted(resnets, key=lambda card: card.macs)}
    dense = [name for name in top1 if not dense_twin(name)]
    sparse = [name for name in sorted(top1) if dense_twin(name)]
    return [
        record | {"sparse_top1": top1[name], "dense_top1": top1[equal]}
        for name in sparse
        for equal in [_equal(top1[name], {width: top1[width] for width in dense})]
        for record in _pair(name, equal, backend, batches, seconds, halves_the_saving=False)
    ]


def _equal(top1: float, dense: dict[str, float]) -> str:
    """The first of `dense` to come within EQUAL of `top1`, or the best of them."""
    return next((name for name, reached in dense.items() if reached >= top1 - EQUAL), max(dense, key=dense.__getitem__))


def _on_cifar10(trained: Iterable[Card]) -> list[Card]:
    return [card for card in trained if card.dataset == "cifar10"]


def _pair(
    name: str, dense: str, backend: str, batches: Iterable[int], seconds: float, halves_the_saving: bool = True
) -> Iterator[Record]:
    pair = {"sparse": _prepared(name, backend), "dense": _prepared(dense, backend)}
    runs = {kind: prepared.run for kind, prepared in pair.items()}
    macs = {kind: prepared.macs for kind, prepared in pair.items()}
    size = pair["sparse"].size
    saved = macs["dense"] / macs["sparse"]
    for batch in batches:
        x = torch.randn(batch, *size)
        times = compare({kind: partial(run, x) for kind, run in runs.items()}, seconds)
        least = 2 / (1 + 1 / saved) if batch >= 64 and halves_the_saving else 1.0
        yield {
            "work": name,
            "against": dense,
            "backend": backend,
            "batch": batch,
            "sparse_ms": asdict(summary(times["sparse"])),
            "dense_ms": asdict(summary(times["dense"])),
            "sparse_macs": macs["sparse"],
            "dense_macs": macs["dense"],
            "mac_ratio": round(saved, 2),
            "faster": speedup(times["dense"], times["sparse"]),
            "reach": None if backend in ("bfloat16", "training") else round(least, 2),
        }


@dataclass(frozen=True)
class Prepared:
    """A model as a backend runs it, its multiply-accumulates, and the size of its images, (C, H, W)."""

    run: Callable[[torch.Tensor], object]
    macs: int
    size: tuple[int, int, int]


@lru_cache(maxsize=32)  # a model stands in several pairs of a backend; an export or a compilation takes seconds
def _prepared(name: str, backend: str) -> Prepared:
    model = timm.create_model(name, num_classes=CLASSES).eval()
    size = model.pretrained_cfg["input_size"]
    return Prepared(macs=count_macs(model, size), run=_runner(model, backend), size=size)


def _runner(model: nn.Module, backend: str) -> Callable[[torch.Tensor], object]:
    if backend == "onnxruntime":
        return _onnx_runner(model)
    if backend == "training":
        return _training_step(model.train())
    if backend == "fused":
        model = fuse(model)
    run = compiled(model) if backend == "compiled" else model

    @torch.no_grad()
    def call(x: torch.Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16) if backend == "bfloat16" else nullcontext():
            return run(x)

    return call


def _training_step(model: nn.Module) -> Callable[[torch.Tensor], object]:
    def step(x: torch.Tensor) -> object:
        model.zero_grad()
        return model(x).square().sum().backward()

    return step


def _onnx_runner(model: nn.Module) -> Callable[[torch.Tensor], object]:
    name = model.pretrained_cfg["architecture"]
    if name not in _exports:
        export_all([name])
    runtime = OnnxRuntime(_exports[name], "cpu")
    return lambda x: runtime.logits(x.numpy())


_exports: dict[str, Path] = {}
_folder = tempfile.TemporaryDirectory()


def export_all(names: Iterable[str]) -> None:
    """ONNX files of models, BatchNorm folded: each takes seconds of one core, so as many at once as there are cores."""
    wanted = {name: Path(_folder.name) / f"{name}.onnx" for name in names if name not in _exports}
    workers = min(len(wanted), os.cpu_count() or 1)
    if workers > 1:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, initializer=_take_any_core) as pool:
            list(pool.map(_export, wanted, wanted.values()))
    else:
        for name, path in wanted.items():
            _export(name, path)
    _exports.update(wanted)


def _take_any_core() -> None:
    """A process inherits the one core that `OMP_PROC_BIND` has given to the thread that starts it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    torch.set_num_threads(1)


def _export(name: str, path: Path) -> None:
    model = timm.create_model(name, num_classes=CLASSES).eval()
    images = np.random.default_rng(0).standard_normal((7, *model.pretrained_cfg["input_size"]), np.float32)
    export_model(fuse(model), model_spec(model, name, {}), "onnx", path, images, atol=1e-2)


def kernels(names: Iterable[str], batches: Iterable[int], seconds: float) -> list[Record]:
    """Each model, BatchNorm folded, by our own kernels and by torch's operators alone."""
    return [_with_and_without(name, batch, seconds) for name in names for batch in batches]


def _with_and_without(name: str, batch: int, seconds: float) -> Record:
    prepared = _prepared(name, "fused")
    run = partial(prepared.run, torch.randn(batch, *prepared.size))

    def without() -> object:
        with native.switched_off():
            return run()

    times = compare({"kernels": run, "torch": without}, seconds)
    timings = {f"{kind}_ms": asdict(summary(times[kind])) for kind in times}
    return {"work": name, "batch": batch} | timings | {"faster": speedup(times["torch"], times["kernels"])}


def front(names: Iterable[str], batch: int, seconds: float) -> list[Record]:
    """Milliseconds for a batch of each model, all in turn, with the accuracy that is known from a card.

    All are compared as the recipes for CPU cores left them, the only ones by which timm's models were trained.

    `beaten_by` names timm's models of like size that are as fast and as accurate as one of ours, which lies below their
    front then; `beaten_by_larger` those of more than `LIKE_SIZE` times its parameters, and `beaten_by_dense` our own
    dense ResNet-20s. All run with BatchNorm folded, and convolutions in channels_last.
    """
    accuracy = {card.architecture: card.top1 for card in _on_cifar10(trained_alike())}
    ours = set(list_models())
    models = {name: timm.create_model(name, num_classes=CLASSES).eval() for name in names}
    folded = {name: fuse(model) if name in ours else fold_timm(model) for name, model in models.items()}
    x = torch.randn(batch, 3, 32, 32)
    times = compare({name: partial(_runner(model, "eager"), x) for name, model in folded.items()}, seconds)
    records = [
        {
            "work": name,
            "batch": batch,
            "ms": asdict(summary(times[name])),
            "params": sum(p.numel() for p in model.parameters()),
            "macs": count_macs(model, (3, 32, 32)),
            "top1": accuracy.get(name),
        }
        for name, model in models.items()
    ]
    known = [record for record in records if record["top1"] is not None]
    theirs = [record for record in known if record["work"] not in ours]
    dense = [record for record in known if record["work"].startswith(RESNET20)]
    for record in known:
        if record not in theirs and record not in dense:
            ahead = [their for their in theirs if _beats(their, record)]
            record["beaten_by"] = [their["work"] for their in ahead if _like_size(their, record)]
            record["beaten_by_larger"] = [their["work"] for their in ahead if not _like_size(their, record)]
            record["beaten_by_dense"] = [baseline["work"] for baseline in dense if _beats(baseline, record)]
    return records


def fold_timm(model: nn.Module) -> nn.Module:
    """A copy of a model of timm as fast as `dimmix.fuse` makes ours: BatchNorm in the convolutions, channels_last."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, BatchNormAct2d):  # which torch's folding does not know
                plain = nn.BatchNorm2d(norm.num_features, norm.eps, dtype=norm.running_mean.dtype).eval()
                plain.load_state_dict(norm.state_dict())
                setattr(parent, name, nn.Sequential(plain, norm.drop, norm.act))
    return torch_fuse(model).to(memory_format=torch.channels_last)


def _beats(theirs: Record, ours: Record) -> bool:
    return theirs["top1"] >= ours["top1"] and theirs["ms"]["median"] <= ours["ms"]["median"]


def _like_size(theirs: Record, ours: Record) -> bool:
    return theirs["params"] <= LIKE_SIZE * ours["params"]
