"""Fixed permutations of one axis, as a gather whose indices travel with the model."""

import torch
from torch import Tensor, nn


class Permute(nn.Module):
    """Gathers `x` along `dim` in a fixed order: position j of the result is position `order[j]` of the input.

    Args:
        order: a permutation of 0..n-1.
        dim: the axis of length n.
        persistent: keep the order in checkpoints: for orders that were drawn, not for those a schedule implies.

    Raises:
        ValueError: `order` is not a permutation.
    """

    def __init__(self, order: list[int], dim: int, persistent: bool = False, device=None) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"not a permutation of 0..{len(order) - 1}: {order}")
        self.dim = dim
        inverse = sorted(range(len(order)), key=order.__getitem__)
        self.register_buffer("order", torch.tensor(order, device=device), persistent=persistent)
        self.register_buffer("inverse", torch.tensor(inverse, device=device), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, ...) -> (..., n, ...)."""
        return x.index_select(self.dim, self.order)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `forward`: `undo(forward(x)) == x`."""
        return x.index_select(self.dim, self.inverse)


def random_order(n: int, seed: int) -> list[int]:
    """A random permutation of 0..n-1 that depends on `seed` alone, not on torch's global generator."""
    with torch.device("cpu"):  # a draw on the meta device would have no values
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
