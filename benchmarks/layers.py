"""The mixing layers against the dense layers that they stand in for."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from dimmix.butterfly import ButterflySchedule, square_radix
from dimmix.layers import ButterflyAttention, ButterflyLinear, ButterflyMlp, DenseMlp, FeatureMixer, Linear
from dimmix.profile import peak_bytes

from .timing import compare, speedup, summary

Record = dict[str, Any]
HEADS, HEAD_DIM = 4, 32


def linear(sizes: Iterable[int], rows: Sequence[int], seconds: float, mode: str = "float32") -> list[Record]:
    """ButterflyLinear of two levels against `nn.Linear`; half of the MAC ratio is to be reached."""
    return [
        record
        for n in sizes
        for count in rows
        for record in _compared(
            ButterflyLinear(n, n, square_radix(n)), nn.Linear(n, n), Linear(n, n), n, count, seconds, mode
        )
    ]


def mlp(sizes: Iterable[int], rows: Sequence[int], seconds: float, mode: str = "float32") -> list[Record]:
    """ButterflyMlp of ratio 2 against the dense MLP of ratio 2; half of the MAC ratio is to be reached."""
    return [
        record
        for n in sizes
        for count in rows
        for record in _compared(
            ButterflyMlp(n, square_radix(n), 2), Mlp(n, 2 * n), DenseMlp(n, 2), n, count, seconds, mode
        )
    ]


def _compared(
    sparse: FeatureMixer, dense: nn.Module, ours: nn.Module, n: int, rows: int, seconds: float, mode: str
) -> Iterator[Record]:
    """The sparse layer in both layouts against the dense one on (rows, n), which is how that is fastest.

    "features last" takes and gives (rows, n), as the dense layer does; "features first" takes and gives (n, rows), as
    the models have it from level to level and from layer to layer. `ours` is the dense layer as our dense twins have
    it, by oneDNN in float32 inference: timed beside the others, so that nobody takes a slow product for a sparse gain.
    """
    saved = _weights(dense) / _weights(sparse)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    sparse, dense, ours = sparse.to(dtype), dense.to(dtype), ours.to(dtype)
    x = torch.randn(rows, n, dtype=dtype)
    layouts = {
        "features last": _call(sparse, sparse, x, mode),
        "features first": _call(sparse.mix, sparse, x.t().contiguous(), mode),
    }
    baselines = {"dense": _call(dense, dense, x, mode), "ours": _call(ours, ours, x, mode)}
    times = compare(baselines | layouts, seconds)
    for layout in layouts:
        yield {
            "work": type(sparse).__name__,
            "n": n,
            "rows": rows,
            "layout": layout,
            "mode": mode,
            "sparse_ms": asdict(summary(times[layout])),
            "dense_ms": asdict(summary(times["dense"])),
            "our_dense_ms": asdict(summary(times["ours"])),
            "mac_ratio": round(saved, 2),
            "faster": speedup(times["dense"], times[layout]),
            "faster_than_ours": speedup(times["ours"], times[layout]),
            "reach": round(saved / 2, 2) if mode == "float32" else None,
        }


def _weights(layer: nn.Module) -> int:
    """Matrix entries, each multiplied once a row: biases are vectors, or as many rows as there are blocks."""
    return sum(p.numel() for name, p in layer.named_parameters() if name.endswith("weight"))


def _call(
    function: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, x: torch.Tensor, mode: str
) -> Callable[[], object]:
    weights = tuple(layer.parameters())

    @torch.no_grad()
    def infer() -> object:
        return function(x)

    def train() -> object:
        return torch.autograd.grad(function(x).sum(), weights)

    return train if mode == "training" else infer


def attention(sizes: Iterable[int], seconds: float) -> list[Record]:
    """Attention inside groups of sqrt(N), every level, against all N tokens: q, k, v -> result, no projections.

    0.4 of N / radix is to be reached at N = 1024 and 0.6 above, and no level may take 1.3 times the cheapest.
    """
    return [_levels(tokens, seconds) for tokens in sizes]


@torch.no_grad()
def _levels(tokens: int, seconds: float) -> Record:
    dim = HEADS * HEAD_DIM
    schedule = ButterflySchedule(tokens, square_radix(tokens))
    qkv = torch.randn(3, tokens, dim)
    q, k, v = qkv.view(3, 1, tokens, HEADS, HEAD_DIM).transpose(2, 3).unbind(0)
    calls: dict[str, Callable[[], object]] = {"full": lambda: F.scaled_dot_product_attention(q, k, v)}
    for i, level in enumerate(schedule.levels):
        layer = ButterflyAttention(dim, level, HEADS)
        calls[f"level {i}"] = lambda layer=layer: layer.attend(*qkv)
    times = compare(calls, seconds)
    levels = [times[name] for name in calls if name != "full"]
    medians = [summary(level) for level in levels]
    cheapest = min(timing.median for timing in medians)
    ratio = tokens / schedule.radix
    return {
        "work": "ButterflyAttention",
        "n": tokens,
        "radix": schedule.radix,
        "full_ms": asdict(summary(times["full"])),
        "level_ms": [asdict(timing) for timing in medians],
        "faster": min(speedup(times["full"], level) for level in levels),
        "reach": (0.4 if tokens <= 1024 else 0.6) * ratio,
        "aim": 0.8 * ratio,
        "dearest_to_cheapest": round(max(timing.median for timing in medians) / cheapest, 3),
    }


def memory(sizes: Iterable[int]) -> list[Record]:
    """Peak memory of a ButterflyAttention layer above its input and output, in copies of q, k and v; each in a process.

    Below 1.5 copies is to be reached.
    """
    records = []
    for tokens in sizes:
        code = f"from benchmarks.layers import print_peak; print_peak({tokens})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        copy = 3 * tokens * HEADS * HEAD_DIM * 4
        records.append(
            {
                "work": "ButterflyAttention memory",
                "n": tokens,
                "peak_bytes": int(done.stdout),
                "copies_of_qkv": round(int(done.stdout) / copy, 3),
                "below": 1.5,
            }
        )
    return records


@torch.no_grad()
def print_peak(tokens: int) -> None:
    """Prints the bytes that torch held at once during one call, less those of the output."""
    dim = HEADS * HEAD_DIM
    level = ButterflySchedule(tokens, square_radix(tokens)).levels[-1]
    layer, x = ButterflyAttention(dim, level, HEADS).eval(), torch.randn(1, tokens, dim)
    layer(x)
    print(peak_bytes(lambda: layer(x)) - x.nbytes)
