"""Fixed permutations of one axis: gathers whose indices travel with the model, and transposes of its last axis."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .eager import runs_eagerly, trains_eagerly


def inverse_of(order: Sequence[int]) -> list[int]:
    """Where each number of a permutation of 0..n-1 stands in it."""
    return sorted(range(len(order)), key=order.__getitem__)


class _Gather(torch.autograd.Function):
    """Permutes the columns of x, (rows, n), and those of its gradient by the inverse: a gather in place of a scattered
    sum. Single numbers, bfloat16 most of all, are gathered faster than they are selected."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.gather(1, order.expand_as(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Gather.apply(grad, inverse, order), None, None


class Permute(nn.Module):
    """Gathers `x` along `dim` in a fixed order: position j of the result is position `order[j]` of the input.

    Args:
        order: a permutation of 0..n-1.
        dim: the axis of length n.
        persistent: keep the order in checkpoints: for orders that were drawn, not for those a schedule implies.

    Raises:
        ValueError: `order` is not a permutation.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, order: list[int], dim: int, persistent: bool = False, device=None) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"not a permutation of 0..{len(order) - 1}: {order}")
        self.dim = dim
        self.implied = None if persistent else tuple(order)
        inverse = inverse_of(order)
        self.register_buffer("order", torch.tensor(order, device=device), persistent=persistent)
        self.register_buffer("inverse", torch.tensor(inverse, device=device), persistent=persistent)

    @torch.jit.unused
    def init_non_persistent_buffers(self) -> None:
        """Fills the order in again: timm asks for it where a model was made without memory (`to_empty`)."""
        if self.implied is not None:
            order = torch.tensor(self.implied, device=self.order.device)
            self.order.copy_(order)
            self.inverse.copy_(order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, ...) -> (..., n, ...)."""
        if not torch.jit.is_scripting() and self.dim == 1 and trains_eagerly(x) and x.dim() == 2:
            return self._trained(x)
        return x.index_select(self.dim, self.order)

    @torch.jit.unused
    def _trained(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.order, self.inverse)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `forward`: `undo(forward(x)) == x`."""
        return x.index_select(self.dim, self.inverse)


def transpose_last(x: Tensor, rows: int, columns: int) -> Tensor:
    """Reads the last axis, rows * columns long, as a matrix and transposes it: contiguous, and of the shape of `x`.

    The same as `x.unflatten(-1, [rows, columns]).transpose(-2, -1).flatten(-2)`, which runs outside of eager inference.
    Torch's channel shuffle does it three times as fast on a CPU, if it finds the axis in place of the channels.
    """
    if torch.jit.is_scripting() or not runs_eagerly(x):
        return x.unflatten(-1, [rows, columns]).transpose(-2, -1).flatten(-2)
    pixels = x.reshape(1, 1, -1, rows * columns).permute(0, 3, 1, 2)
    return torch.channel_shuffle(pixels, rows).permute(0, 2, 3, 1).reshape(x.shape)


def random_order(n: int, seed: int) -> list[int]:
    """A random permutation of 0..n-1 that depends on `seed` alone, not on torch's global generator."""
    with torch.device("cpu"):  # a draw on the meta device would have no values
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
