"""Residual branches in a row by our own kernels: the tokens of a few images in the cache from the first to the last.

A block of a ViT or a mixer on one image is mostly the start of its operators, and on many images every one of them goes
to memory and back. The kernel (zoo/native/branches.h) takes all blocks at once. What `native` says of the other kernels
goes for this one too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import native
from .eager import is_hooked
from .native import Norm, Step

CHANNELS, TOKENS, ATTENTION, PATCHES, ACROSS = range(5)
LARGEST = 2**20
"""Numbers of an image up to which the kernel takes it: it keeps memory for five times as many."""


class Branch(NamedTuple):
    """x + steps(norm(x)) of images of tokens, (B, N, C), or patches, (B, C, H, W); without steps, norm(x).

    Steps mix CHANNELS, TOKENS (of a norm over the channels), the values of PATCHES, or, ACROSS the patches, those at
    the same place (of a norm over a patch's values); those of ATTENTION are the map (C -> 3 * C) to queries, keys and
    values and the one behind. `numbers` are radix, stride and heads of an attention, and of patches their side and
    stride and how many an image has.
    """

    kind: int
    norm: Norm | None
    steps: Sequence[Step]
    numbers: tuple[int, int, int] = (0, 0, 0)


def residual(norm: nn.Module | None, mixer: nn.Module, **others: Any) -> Branch | None:
    """x + mixer(norm(x)), `others` in place of what `mixer.branch` says; None where one of them has to be called."""
    first = None if norm is None else native.norm_of(norm)
    if not hasattr(mixer, "branch") or is_hooked(mixer) or (first is None) != (norm is None):
        return None
    branch: Branch | None = mixer.branch(first)  # type: ignore[operator]
    return branch._replace(**others) if branch is not None and others else branch


def norm_alone(module: nn.Module) -> Branch | None:
    """A LayerNorm over the channels and no more, or None where it has to be called."""
    norm = native.norm_of(module)
    return None if norm is None else Branch(CHANNELS, norm, ())


def in_a_row(*branches: Branch | None) -> list[Branch]:
    """All of them, or none at all where one is missing."""
    return [branch for branch in branches if branch is not None] if None not in branches else []


class Blocks(nn.Sequential):
    """Blocks of residual branches in a row, which our own kernels run as one where they can.

    Blocks have `branches()`, a list that is empty where a part of them has to be called, or where they are of a class
    that may do something else. With `tokens_first` they work on (N, B, C).
    """

    tokens_first = False

    def forward(self, x: Tensor) -> Tensor:
        """What the blocks take -> the same shape."""
        if not torch.jit.is_scripting():
            y = by_kernel(x, self.branches, self.tokens_first)
            if y is not None:
                return y
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def branches(self) -> list[Branch]:
        """Those of all blocks, none where a part of one has to be called."""
        branches: list[Branch] = []
        for block in self._modules.values():
            of_block = block.branches() if hasattr(block, "branches") and not is_hooked(block) else []  # type: ignore
            if not of_block:
                return []
            branches += of_block
        return branches


@torch.jit.unused
def by_kernel(x: Tensor, list_branches: Callable[[], list[Branch]], tokens_first: bool = False) -> Tensor | None:
    """The listed branches of x by our kernel, or None where it does not apply or there are none."""
    images = x.shape[1 if tokens_first else 0]
    if not native.takes(x) or x.numel() > LARGEST * images:
        return None
    branches = list_branches()
    if not branches:
        return None
    return run(x.transpose(0, 1), branches).transpose(0, 1) if tokens_first else run(x, branches)


def run(x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Tokens (B, N, C), or images (B, C, H, W) for branches of patches -> the same shape, contiguous.

    Raises:
        ValueError: a branch is of other features than x, or of patches where x is of tokens.
    """
    kinds: list[int] = []
    weights: list[Tensor | None] = []
    shapes: list[int] = []
    norms: list[Tensor | None] = []
    epsilons: list[float] = []
    for kind, norm, steps, numbers in branches:
        gamma, beta, epsilon = norm or (None, None, 0.0)
        of_patches = kind in (PATCHES, ACROSS)
        if x.ndim != (4 if of_patches else 3):
            raise ValueError(f"a branch of {'patches' if of_patches else 'tokens'} on an input of {x.ndim} axes")
        features = x.shape[1] * numbers[0] ** 2 if of_patches else x.shape[-1]
        if gamma is not None and len(gamma) != features:
            raise ValueError(f"{len(gamma)} features expected, the input has {features}")
        of_steps, numbers_of_steps = native.lists_of(steps)
        weights += of_steps
        shapes += numbers_of_steps
        kinds += (kind, len(steps), *numbers)
        norms += (gamma, beta)
        epsilons.append(epsilon)
    return _operator(x, kinds, weights, shapes, norms, epsilons)


_NUMBERS = 5  # of a branch, in `kinds`
native.LIBRARY.define(
    "branches(Tensor x, int[] kinds, Tensor?[] weights, int[] shapes, Tensor?[] norms, float[] epsilons) -> Tensor"
)
_operator = torch.ops.dimmix.branches.default


def _branches(
    x: Tensor,
    kinds: list[int],
    weights: Sequence[Tensor | None],
    shapes: list[int],
    norms: Sequence[Tensor | None],
    epsilons: list[float],
) -> Tensor:
    native.refuse_tangent(x)
    x = x.contiguous()
    y = torch.empty_like(x)
    images, tokens, channels, height = _sizes(x.shape)
    native._native.branches(
        x.data_ptr(), y.data_ptr(), images, tokens, channels, height, torch.get_num_threads(), kinds, shapes,
        native.addresses(weights), native.addresses(norms), epsilons,
    )  # fmt: skip
    return y


def _sizes(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Images, tokens or pixels, channels and rows of pixels, 1 for tokens."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2], 1
    return shape[0], shape[2] * shape[3], shape[1], shape[2]


native.LIBRARY.impl("branches", _branches, "CPU")


@torch.library.register_fake("dimmix::branches", lib=native.LIBRARY)
def _fake_branches(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.dimmix.branches)
def _flops(x_shape, kinds, weights_shape, shapes, *_, out_shape=None, **kwargs) -> int:
    """Each weight is multiplied and added once a token, channel or patch; attention has two products of its own."""
    images, tokens, channels = _sizes(x_shape)[:3]
    flops = first = 0
    for branch in range(0, len(kinds), _NUMBERS):
        kind, steps, radix, patches = (kinds[branch + i] for i in (0, 1, 2, 4))
        last = first + 4 * steps
        rows = {TOKENS: channels, PATCHES: patches, ACROSS: channels * radix**2}.get(kind, tokens)
        attended = 2 * tokens * channels * radix if kind == ATTENTION else 0
        flops += 2 * images * (rows * native.count_weights(weights_shape[first:last]) + attended)
        first = last
    return flops
