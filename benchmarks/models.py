"""Whole models: each sparse one against its dense twin, and beside models of timm, on images of 32 pixels."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from dimmix.checkpoints import cards
from dimmix.export import export_model
from dimmix.fuse import fuse
from dimmix.profile import count_macs
from dimmix.runtime import OnnxRuntime, model_spec

from .timing import compare, speedup, summary

Record = dict[str, Any]
CLASSES = 10


def twins(names: Iterable[str], backend: str, batches: Iterable[int], seconds: float) -> list[Record]:
    """Each model against its dense twin. To be reached: never slower, and at batch 64 half of the MAC saving.

    Half of the saving: with m times fewer MACs, at most (1 + 1 / m) / 2 of the twin's time. `backend` is one of
    "eager", "fused" (eager with BatchNorm folded), "compiled", "onnxruntime", or for eager runs "bfloat16", "training".
    """
    return [record for name in names for record in _pair(name, f"{name}_dense", {}, backend, batches, seconds)]


def equals(batches: Iterable[int], seconds: float) -> list[Record]:
    """conv-mix and block-mix, the paper's of width 32 and ours, against the dense ResNet-20 of width 16.

    The paper puts its conv-mix 1.5 points of CIFAR-10 accuracy above that ResNet. To be reached: at least as fast.
    """
    names = (
        "butterfly_resnet20_convmix_w32",
        "butterfly_resnet20_blockmix_w32",
        "butterfly_resnet_fast_32",
        "butterfly_resnet_fast_blockmix_32",
    )
    return [
        record
        for name in names
        for backend in ("fused", "onnxruntime")
        for record in _pair(name, "butterfly_resnet20_convmix_w32_dense", {"width": 16}, backend, batches, seconds)
    ]


def _pair(
    name: str, dense: str, changes: dict[str, Any], backend: str, batches: Iterable[int], seconds: float
) -> Iterator[Record]:
    pair = {
        "sparse": timm.create_model(name, num_classes=CLASSES).eval(),
        "dense": timm.create_model(dense, num_classes=CLASSES, **changes).eval(),
    }
    size = pair["sparse"].pretrained_cfg["input_size"]
    macs = {kind: count_macs(model, size) for kind, model in pair.items()}
    saved = macs["dense"] / macs["sparse"]
    runs = {kind: _runner(model, backend) for kind, model in pair.items()}
    for batch in batches:
        x = torch.randn(batch, *size)
        times = compare({kind: partial(run, x) for kind, run in runs.items()}, seconds)
        least = 2 / (1 + 1 / saved) if batch >= 64 and not changes else 1.0
        yield {
            "work": name,
            "against": dense + "".join(f" {key}={value}" for key, value in changes.items()),
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


def _runner(model: nn.Module, backend: str) -> Callable[[torch.Tensor], object]:
    if backend == "onnxruntime":
        return _onnx_runner(model)
    if backend == "training":
        return _training_step(model.train())
    if backend == "fused":
        model = fuse(model)
    run = torch.compile(model) if backend == "compiled" else model

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
    images = np.random.default_rng(0).standard_normal((7, *model.pretrained_cfg["input_size"]), np.float32)
    spec = model_spec(model, model.pretrained_cfg["architecture"], {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_model(fuse(model), spec, "onnx", path, images, atol=1e-2)
        runtime = OnnxRuntime(path, "cpu")
    return lambda x: runtime.logits(x.numpy())


def front(names: Iterable[str], batch: int, seconds: float) -> list[Record]:
    """Milliseconds for a batch of each model, all in turn, with what accuracy is known from its card."""
    accuracy = {card.architecture: card.top1 for card in cards().values() if card.dataset == "cifar10"}
    models = {name: timm.create_model(name, num_classes=CLASSES).eval() for name in names}
    x = torch.randn(batch, 3, 32, 32)
    times = compare({name: partial(_runner(model, "fused"), x) for name, model in models.items()}, seconds)
    return [
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
