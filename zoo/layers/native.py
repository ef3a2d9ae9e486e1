"""Mixing layers by kernels of our own, where a C++ compiler was at hand when dimmix was installed (zoo/native).

Torch runs a level as a batch of small products between copies: every step goes to memory and back. The kernels take a
tile of rows through all levels of a layer at once, in the cache. They are operators of torch (`torch.ops.dimmix`), for
inference in float32 on x86-64 with AVX2 or AVX-512; everywhere else, and for gradients, torch's own operators do it.
`DIMMIX_NATIVE=0` in the environment leaves the kernels out, and `DIMMIX_NATIVE=avx2` takes these where there are wider.
"""

import importlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .eager import all_are_hooked, infers_on_cpu, is_hooked, is_transformed, parameter

_native: Any = None
with suppress(ImportError):  # no compiler, or another system
    _native = importlib.import_module("dimmix._native")


def _choose(wish: str) -> str:
    """The instruction set in use: "avx512", "avx2" or "" for none."""
    if _native is None or wish == "0":
        return ""
    return _native.use(wish) or _native.use("")


INSTRUCTIONS = _choose(os.environ.get("DIMMIX_NATIVE", ""))


_off = 0  # how many want them off
_counting = Lock()


@contextmanager
def switched_off() -> Iterator[None]:
    """Torch's operators alone within, in all threads: to compare with."""
    global _off
    with _counting:
        _off += 1
    try:
        yield
    finally:
        with _counting:
            _off -= 1


LONGEST = 1024
"""Tokens in a group up to which our attention is the faster one."""


class Step(NamedTuple):
    """One level: a block-diagonal product, or with `hidden` an MLP in each block, (GELU between its two products).

    Blocks are `groups * stride`; block (g, o) takes features (g * inner + i) * stride + o and gives (g * outer + j) *
    stride + o. Weights are (blocks, out, in), biases (blocks, out) or None, those of a single block as they lie in an
    `nn.Linear` too. `residual` adds the block's input; `activate` ends in a GELU.
    """

    groups: int
    stride: int
    inner: int
    outer: int
    weight: Tensor
    bias: Tensor | None
    hidden: int = 0
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    residual: bool = False
    activate: bool = False


class Norm(NamedTuple):
    """A LayerNorm over the features: weight and bias, (features,), and epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float


_PLAIN = (Tensor, nn.Parameter)


@torch.jit.unused
def takes(x: Tensor) -> bool:
    """Whether the kernels may take x: inference in plain float32 on a CPU that they know."""
    if not INSTRUCTIONS or _off or not infers_on_cpu(x) or torch.is_autocast_enabled("cpu"):
        return False
    if is_transformed() or all_are_hooked():
        return False
    return type(x) in _PLAIN and x.dtype == torch.float32 and x.layout == torch.strided and x.numel() > 0


def steps_of(parts: nn.Module) -> list[Step]:
    """What `step()` of each child gives; none at all where one of them gives None, or weights that do not fit it."""
    steps = []
    for part in parts._modules.values():
        step: Step | None = part.step() if hasattr(part, "step") else None  # type: ignore[operator,union-attr]
        if step is None or not fits(step):
            return []
        steps.append(step)
    return steps


def fits(step: Step) -> bool:
    """Whether its tensors are plain and have as many numbers as it says: the kernels read them without a look."""
    groups, stride, inner, outer, weight, bias, hidden, weight2, bias2, *_ = step
    blocks, middle = groups * stride, hidden or outer
    if weight is None or not is_plain(weight) or weight.numel() != blocks * middle * inner:
        return False
    if bias is not None and not (is_plain(bias) and bias.numel() == blocks * middle):
        return False
    if not hidden:
        return weight2 is None and bias2 is None
    if weight2 is None or not is_plain(weight2) or weight2.numel() != blocks * outer * hidden:
        return False
    return bias2 is None or (is_plain(bias2) and bias2.numel() == blocks * outer)


def is_plain(weight: Tensor | None, strided: bool = False) -> bool:
    """Whether the kernels may read a weight; with `strided` its strides are the caller's to look at."""
    if weight is None:
        return True
    plain = type(weight) in _PLAIN and weight.dtype == torch.float32 and weight.is_cpu
    return plain and (strided or weight.is_contiguous())


def norm_of(module: nn.Module) -> Norm | None:
    """A LayerNorm over the last axis as the kernels read it, or None where it is another one or has to be called."""
    if type(module) is not nn.LayerNorm or is_hooked(module) or len(module.normalized_shape) != 1:
        return None
    weight, bias = parameter(module, "weight"), parameter(module, "bias")
    if weight is None or bias is None or not is_plain(weight) or not is_plain(bias) or weight.shape != bias.shape:
        return None
    return Norm(weight, bias, module.eps)


def mix(x: Tensor, steps: Sequence[Step], features_last: bool) -> Tensor:
    """(in_features, rows) of any strides -> (out_features, rows), or with `features_last` (rows, out_features).

    Raises:
        ValueError: `x` has another number of features than the first step.
    """
    features = steps[0].groups * steps[0].stride * steps[0].inner
    if x.shape[0] != features:
        raise ValueError(f"{features} features expected, the input has {x.shape[0]}")
    return _mix_operator(x, *lists_of(steps), features_last)


def lists_of(steps: Sequence[Step]) -> tuple[list[Tensor | None], list[int]]:
    """Tensors and numbers of steps as the operators take them."""
    weights: list[Tensor | None] = []
    shapes: list[int] = []
    for groups, stride, inner, outer, weight, bias, hidden, weight2, bias2, residual, activate in steps:
        weights += (weight, bias, weight2, bias2)
        shapes += (groups, stride, inner, outer, hidden, int(residual), int(activate))
    return weights, shapes


def attend(q: Tensor, k: Tensor, v: Tensor, radix: int, stride: int, heads: int) -> Tensor:
    """q, k and v of tokens, (B * N, C) each -> attention inside groups of `radix` tokens `stride` apart, (B * N, C).

    Raises:
        ValueError: they differ in shape, or are no whole groups or heads.
    """
    if not q.shape == k.shape == v.shape or q.shape[0] % (radix * stride) or q.shape[1] % heads:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"{shapes}: not tokens in groups of {radix}, {stride} apart, with {heads} heads")
    return _attend_operator(q, k, v, radix, stride, heads)


_NUMBERS = 7  # of a step, beside its four tensors
LIBRARY = torch.library.Library("dimmix", "DEF")
LIBRARY.define("mix(Tensor x, Tensor?[] weights, int[] shapes, bool features_last) -> Tensor")
LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, int radix, int stride, int heads) -> Tensor")
_mix_operator, _attend_operator = torch.ops.dimmix.mix.default, torch.ops.dimmix.attend.default


def _empty(x: Tensor, shapes: Sequence[int], features_last: bool) -> Tensor:
    groups, stride, _, outer = shapes[-_NUMBERS : 4 - _NUMBERS]
    features, rows = groups * stride * outer, x.shape[1]
    return x.new_empty((rows, features) if features_last else (features, rows))


def _mix(x: Tensor, weights: Sequence[Tensor | None], shapes: Sequence[int], features_last: bool) -> Tensor:
    refuse_tangent(x)
    if 1 not in x.stride():
        x = x.contiguous()
    y = _empty(x, shapes, features_last)
    torch.get_num_threads()  # a new thread of Python has the number that was set from the first time it asks
    strides = (1, y.shape[1]) if features_last else (y.shape[1], 1)
    _native.mix(x.data_ptr(), *x.stride(), y.data_ptr(), *strides, x.shape[1], shapes, addresses(weights))
    return y


def refuse_tangent(x: Tensor) -> None:
    """Raises RuntimeError for a dual tensor, which only what was compiled for plain ones brings here."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError("compiled for tensors without tangents; compile anew, or set DIMMIX_NATIVE=0")


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where tensors lie in memory, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _attend(q: Tensor, k: Tensor, v: Tensor, radix: int, stride: int, heads: int) -> Tensor:
    refuse_tangent(q)
    if not (q.stride() == k.stride() == v.stride() and q.stride(1) == 1):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    tokens, channels = q.shape
    out = q.new_empty(tokens, channels)
    torch.get_num_threads()  # as in `_mix`
    _native.attend(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), tokens, radix, stride, heads, channels // heads,
        q.stride(0),
    )  # fmt: skip
    return out


LIBRARY.impl("mix", _mix, "CPU")
LIBRARY.impl("attend", _attend, "CPU")


@torch.library.register_fake("dimmix::mix", lib=LIBRARY)
def _fake_mix(x: Tensor, weights: Sequence[Tensor | None], shapes: Sequence[int], features_last: bool) -> Tensor:
    return _empty(x, shapes, features_last)


@torch.library.register_fake("dimmix::attend", lib=LIBRARY)
def _fake_attend(q: Tensor, k: Tensor, v: Tensor, radix: int, stride: int, heads: int) -> Tensor:
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.dimmix.mix)
def _mix_flops(x_shape, weights_shape, *_, out_shape=None, **kwargs) -> int:
    """Each weight of a matrix is multiplied and added once a row; of a step's four tensors the second are biases."""
    return 2 * x_shape[1] * count_weights(weights_shape)


def count_weights(weights_shape: Sequence[Sequence[int] | None]) -> int:
    """Numbers in the matrices of steps."""
    return sum(math.prod(shape) for shape in weights_shape[::2] if shape is not None)


@register_flop_formula(torch.ops.dimmix.attend)
def _attend_flops(q_shape, k_shape, v_shape, radix, stride, heads, out_shape=None, **kwargs) -> int:
    """Two products of (radix, head_dim) and (radix, radix) a group and head."""
    return 4 * q_shape[0] * q_shape[1] * radix
