"""Where the time of a model goes: the share of each kind of operator, fused, float32, on a CPU."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile

from dimmix.fuse import fuse

from .models import CLASSES

Record = dict[str, Any]
PASSES = 3
KINDS = {
    "addmm": "product",
    "mm": "product",
    "bmm": "batched product",
    "baddbmm": "batched product",
    "baddbmm_": "batched product",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "dimmix::mix": "mixing kernel",
    "dimmix::attend": "attention kernel",
    "dimmix::branches": "kernel of all blocks",
    "dimmix::stage": "convolution kernel",
    "native_channel_shuffle": "channel shuffle",
    "native_layer_norm": "LayerNorm",
    "gelu": "GELU",
    "relu_": "ReLU",
    "clamp_min": "ReLU",
    "clamp_min_": "ReLU",
    "add": "sum",
    "add_": "sum",
    "copy_": "copy",
    "cat": "copy",
}
"""Names of operators, torch's and ours, in a table; others keep their own."""


def operators(names: Iterable[str], batch: int) -> list[Record]:
    """For each model the time of a pass over `batch` images, and what share of it, in percent, each kind takes."""
    return [_shares(name, batch) for name in names]


@torch.no_grad()
def _shares(name: str, batch: int) -> Record:
    model = fuse(timm.create_model(name, num_classes=CLASSES).eval())
    x = torch.randn(batch, 3, 32, 32)
    model(x)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(PASSES):
            model(x)
    microseconds: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        microseconds[_kind(event.key.removeprefix("aten::"), event.input_shapes)] += event.self_cpu_time_total
    total = sum(microseconds.values())
    shares = {kind: round(100 * spent / total, 1) for kind, spent in microseconds.most_common()}
    return {"work": name, "batch": batch, "pass_ms": round(total / PASSES / 1000, 2), "shares": shares}


def _kind(operator: str, shapes: list[list[int]]) -> str:
    """Convolutions of one pixel are apart: the linear maps of features are such."""
    if operator == "mkldnn_convolution":
        return "1x1 convolution" if shapes[1][2:] == [1, 1] else "convolution"
    return KINDS.get(operator, operator)
