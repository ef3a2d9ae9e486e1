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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .eager import infers_on_cpu, is_hooked

_native: Any = None
with suppress(ImportError):  # no compiler, or another system
    _native = importlib.import_module("dimmix._native")


def _choose(wish: str) -> str:
    """The instruction set in use: "avx512", "avx2" or "" for none."""
    if _native is None or wish == "0":
        return ""
    return _native.use(wish) or _native.use("")


INSTRUCTIONS = _choose(os.environ.get("DIMMIX_NATIVE", ""))


@contextmanager
def switched_off() -> Iterator[None]:
    """Torch's operators alone within, in all threads: to compare with."""
    global INSTRUCTIONS
    chosen, INSTRUCTIONS = INSTRUCTIONS, ""
    try:
        yield
    finally:
        INSTRUCTIONS = chosen


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
    if not INSTRUCTIONS or not infers_on_cpu(x) or torch.is_autocast_enabled("cpu"):
        return False
    return type(x) in _PLAIN and x.dtype == torch.float32 and x.numel() > 0


def steps_of(parts: nn.Module) -> list[Step]:
    """What `step()` of each child gives; none at all where one of them gives None, or weights that are not plain."""
    steps = []
    for part in parts.children():
        step: Step | None = part.step() if hasattr(part, "step") else None  # type: ignore[operator]
        if step is None or not all(map(is_plain, (step.weight, step.bias, step.weight2, step.bias2))):
            return []
        steps.append(step)
    return steps


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
    weight, bias = module.weight, module.bias
    if weight is None or bias is None or not is_plain(weight) or not is_plain(bias):
        return None
    return Norm(weight, bias, module.eps)


def mix(
    x: Tensor, steps: Sequence[Step], features_last: bool, norm: Norm | None = None, plus: Tensor | None = None
) -> Tensor:
    """(in_features, rows) of any strides -> (out_features, rows), or with `features_last` (rows, out_features).

    `norm` comes before the steps, and `plus`, of the result's shape, is added to them.

    Raises:
        ValueError: `x` or the norm has another number of features than the first step, or `plus` another shape.
    """
    features, last = _features(steps), steps[-1]
    if x.shape[0] != features or (norm is not None and len(norm.weight) != features):
        raise ValueError(f"{features} features expected, the input has {x.shape[0]}")
    shape = (last.groups * last.stride * last.outer, x.shape[1])
    if plus is not None and tuple(plus.shape) != (shape[::-1] if features_last else shape):
        raise ValueError(f"what is to be added has shape {tuple(plus.shape)}, the result {shape}")
    weights, shapes = _lists(steps)
    gamma, beta, epsilon = norm or (None, None, 0.0)
    return _mix_operator(x, weights, shapes, features_last, gamma, beta, epsilon, plus)


def mix_patches(x: Tensor, side: int, stride: int, steps: Sequence[Step], norm: Norm) -> Tensor:
    """Images (B, C, H, W), to which the steps of the norm of each of their patches are added: (B, C, H, W), contiguous.

    Patches are those of `PatchFold(C, (H, W), side, stride)`, and the steps give as many features as they take.

    Raises:
        ValueError: the steps or the norm have another number of features than a patch has values.
    """
    values = x.shape[1] * side**2
    if _features(steps) != values or len(norm.weight) != values:
        raise ValueError(f"a patch has {values} values, the steps take {_features(steps)}, the norm {len(norm.weight)}")
    return _mix_patches_operator(x, side, stride, *_lists(steps), *norm)


def _features(steps: Sequence[Step]) -> int:
    return steps[0].groups * steps[0].stride * steps[0].inner


def _lists(steps: Sequence[Step]) -> tuple[list[Tensor | None], list[int]]:
    """Tensors and numbers of steps as the operators take them."""
    weights: list[Tensor | None] = []
    shapes: list[int] = []
    for groups, stride, inner, outer, weight, bias, hidden, weight2, bias2, residual, activate in steps:
        weights += (weight, bias, weight2, bias2)
        shapes += (groups, stride, inner, outer, hidden, int(residual), int(activate))
    return weights, shapes


def attend(q: Tensor, k: Tensor, v: Tensor, radix: int, stride: int, heads: int) -> Tensor:
    """q, k and v of tokens, (B * N, C) each -> attention inside groups of `radix` tokens `stride` apart, (B * N, C)."""
    return _attend_operator(q, k, v, radix, stride, heads)


_NUMBERS = 7  # of a step, beside its four tensors
LIBRARY = torch.library.Library("dimmix", "DEF")
LIBRARY.define(
    "mix(Tensor x, Tensor?[] weights, int[] shapes, bool features_last, Tensor? gamma, Tensor? beta, float epsilon, "
    "Tensor? plus) -> Tensor"
)
LIBRARY.define(
    "mix_patches(Tensor x, int side, int stride, Tensor?[] weights, int[] shapes, Tensor gamma, Tensor beta, "
    "float epsilon) -> Tensor"
)
LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, int radix, int stride, int heads) -> Tensor")
_mix_operator, _attend_operator = torch.ops.dimmix.mix.default, torch.ops.dimmix.attend.default
_mix_patches_operator = torch.ops.dimmix.mix_patches.default


def _empty(x: Tensor, shapes: Sequence[int], features_last: bool) -> Tensor:
    groups, stride, _, outer = shapes[-_NUMBERS:][:4]
    features, rows = groups * stride * outer, x.shape[1]
    return x.new_empty((rows, features) if features_last else (features, rows))


def _mix(
    x: Tensor,
    weights: Sequence[Tensor | None],
    shapes: Sequence[int],
    features_last: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    plus: Tensor | None,
) -> Tensor:
    if 1 not in x.stride():
        x = x.contiguous()
    y = _empty(x, shapes, features_last)
    strides = (1, y.shape[1]) if features_last else (y.shape[1], 1)
    plus = None if plus is None else plus.contiguous()
    _native.mix(
        x.data_ptr(), *x.stride(), y.data_ptr(), *strides, x.shape[1], shapes, _addresses(weights),
        *_addresses((gamma, beta)), epsilon, *_addresses((plus,)),
    )  # fmt: skip
    return y


def _mix_patches(
    x: Tensor,
    side: int,
    stride: int,
    weights: Sequence[Tensor | None],
    shapes: Sequence[int],
    gamma: Tensor,
    beta: Tensor,
    epsilon: float,
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _native.mix_patches(
        x.data_ptr(), y.data_ptr(), *x.shape, side, stride, shapes, _addresses(weights), *_addresses((gamma, beta)),
        epsilon,
    )  # fmt: skip
    return y


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _attend(q: Tensor, k: Tensor, v: Tensor, radix: int, stride: int, heads: int) -> Tensor:
    if not (q.stride() == k.stride() == v.stride() and q.stride(1) == 1):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    tokens, channels = q.shape
    out = q.new_empty(tokens, channels)
    _native.attend(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), tokens, radix, stride, heads, channels // heads,
        q.stride(0),
    )  # fmt: skip
    return out


LIBRARY.impl("mix", _mix, "CPU")
LIBRARY.impl("mix_patches", _mix_patches, "CPU")
LIBRARY.impl("attend", _attend, "CPU")


@torch.library.register_fake("dimmix::mix", lib=LIBRARY)
def _fake_mix(x: Tensor, weights: Sequence[Tensor | None], shapes: Sequence[int], features_last: bool, *_) -> Tensor:
    return _empty(x, shapes, features_last)


@torch.library.register_fake("dimmix::mix_patches", lib=LIBRARY)
def _fake_mix_patches(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("dimmix::attend", lib=LIBRARY)
def _fake_attend(q: Tensor, k: Tensor, v: Tensor, radix: int, stride: int, heads: int) -> Tensor:
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.dimmix.mix)
def _mix_flops(x_shape, weights_shape, *_, out_shape=None, **kwargs) -> int:
    """Each weight of a matrix is multiplied and added once a row; of a step's four tensors the second are biases."""
    return 2 * x_shape[1] * _weights(weights_shape)


@register_flop_formula(torch.ops.dimmix.mix_patches)
def _mix_patches_flops(x_shape, side, stride, weights_shape, *_, out_shape=None, **kwargs) -> int:
    """The same for each patch."""
    images, _, height, width = x_shape
    return 2 * images * (height // side) * (width // side) * _weights(weights_shape)


def _weights(weights_shape) -> int:
    return sum(math.prod(shape) for shape in weights_shape[::2] if shape is not None)


@register_flop_formula(torch.ops.dimmix.attend)
def _attend_flops(q_shape, k_shape, v_shape, radix, stride, heads, out_shape=None, **kwargs) -> int:
    """Two products of (radix, head_dim) and (radix, radix) a group and head."""
    return 4 * q_shape[0] * q_shape[1] * radix
