"""The same comparisons on a GPU, in bfloat16: layers, attention, models in inference and in training.

No kernel of ours runs there and nothing has a mark to reach: this says what the structure costs or gains without.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimmix.butterfly import ButterflySchedule, square_radix
from dimmix.fuse import fuse
from dimmix.layers import ButterflyAttention, ButterflyLinear, ButterflyMlp, DenseMlp
from dimmix.profile import count_macs
from dimmix.registry import dense_twin
from dimmix.training.grouped import train_groups_densely

from .layers import HEAD_DIM, HEADS
from .models import CLASSES
from .timing import compare, settle_cpu, speedup, summary

Record = dict[str, Any]
Call = Callable[[], object]
IMAGES = 16  # of one attention, so that the GPU has work for all its parts
MODES = ("eager", "compiled", "training")


def layers(sizes: Iterable[int], rows: Sequence[int], seconds: float, device: torch.device) -> Iterator[Record]:
    """ButterflyLinear and ButterflyMlp of two levels against dense layers of their size, on (rows, n)."""
    for n in sizes:
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (ButterflyLinear(n, n, square_radix(n)), nn.Linear(n, n)),
            (ButterflyMlp(n, square_radix(n), 2), DenseMlp(n, 2)),
        ]
        for sparse, dense in pairs:
            for layer in (sparse, dense):
                layer.to(device, torch.bfloat16).requires_grad_(False)
            for count in rows:
                x = torch.randn(count, n, device=device, dtype=torch.bfloat16)
                calls = {"sparse": partial(sparse, x), "dense": partial(dense, x)}
                facts = {"work": type(sparse).__name__, "against": type(dense).__name__, "n": n, "rows": count}
                yield facts | _timed(calls, seconds, device)


def attention(sizes: Iterable[int], seconds: float, device: torch.device) -> Iterator[Record]:
    """Each level of attention in groups of sqrt(N) against all N tokens: q, k, v -> result, no projections."""
    dim = HEADS * HEAD_DIM
    for tokens in sizes:
        schedule = ButterflySchedule(tokens, square_radix(tokens))
        qkv = torch.randn(3, IMAGES * tokens, dim, device=device, dtype=torch.bfloat16)
        q, k, v = qkv.view(3, IMAGES, tokens, HEADS, HEAD_DIM).transpose(2, 3).unbind(0)
        for i, level in enumerate(schedule.levels):
            layer = ButterflyAttention(dim, level, HEADS, device=device)
            calls = {
                "sparse": partial(layer.attend, *qkv),
                "dense": partial(F.scaled_dot_product_attention, q, k, v),
            }
            facts = {"work": f"ButterflyAttention, level {i}", "against": "all tokens", "n": tokens}
            yield facts | _timed(calls, seconds, device)


def models(
    names: Iterable[str], mode: str, batches: Sequence[int], seconds: float, device: torch.device
) -> Iterator[Record]:
    """Each model against its dense twin. `mode` is one of MODES; "training" is compiled, a step without optimiser."""
    for name in names:
        twin = dense_twin(name)
        runs = {"sparse": _runner(name, mode, device), "dense": _runner(twin, mode, device)}
        macs = [count_macs(timm.create_model(each, num_classes=CLASSES), (3, 32, 32)) for each in (name, twin)]
        for batch in batches:
            x = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
            facts = {"work": name, "against": twin, "backend": mode, "batch": batch}
            facts["mac_ratio"] = round(macs[1] / macs[0], 2)
            yield facts | _timed({kind: partial(run, x) for kind, run in runs.items()}, seconds, device)
        torch.compiler.reset()  # a compiled graph of every model would pile up


def _runner(name: str, mode: str, device: torch.device) -> Callable[[Tensor], object]:
    model = timm.create_model(name, num_classes=CLASSES)
    model = (model.train() if mode == "training" else fuse(model)).to(device, memory_format=torch.channels_last)
    if mode == "training":
        train_groups_densely(model, device)
    run = model if mode == "eager" else torch.compile(model)

    def infer(x: Tensor) -> object:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return run(x)

    def step(x: Tensor) -> object:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = run(x).float().square().sum()
        return loss.backward()

    return step if mode == "training" else infer


def _timed(calls: dict[str, Call], seconds: float, device: torch.device) -> Record:
    times = compare(calls, seconds, settle=torch.cuda.synchronize if device.type == "cuda" else settle_cpu)
    return {
        "sparse_ms": asdict(summary(times["sparse"])),
        "dense_ms": asdict(summary(times["dense"])),
        "faster": speedup(times["dense"], times["sparse"]),
        "reach": None,
    }
