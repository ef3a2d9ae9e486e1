"""A linear map of which only a few connections exist, at random places: the weights of the SW-MLP.

Paper: Understanding MLP-Mixer as a Wide and Sparse MLP (arXiv 2306.01470).
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .eager import trains_eagerly


def random_connections(inputs: int, outputs: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A uniformly random mask (outputs, inputs) with `count` ones, in compressed rows.

    Returns:
        `columns` (count,) int32, rising within each row, and `starts` (outputs + 1,) int32, where each row begins.

    Raises:
        ValueError: there are not so many places, or none is asked for.
    """
    if not 1 <= count <= inputs * outputs:
        raise ValueError(f"{count} connections do not fit a {outputs} x {inputs} matrix")
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):  # a draw on the meta device would have no values
        places = _distinct(inputs * outputs, count, generator)
        starts = torch.searchsorted(places, torch.arange(outputs + 1) * inputs)
        return (places % inputs).int(), starts.int()


def _distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `total`, rising, in memory of the order of `count`."""
    if 2 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    places = torch.empty(0, dtype=torch.int64)
    while len(places) < count:
        more = torch.randint(total, (2 * (count - len(places)) + 16,), generator=generator)
        places = torch.cat([places, more]).unique()
    return places[torch.randperm(len(places), generator=generator)[:count]].sort().values


def _product(x: Tensor, weight: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """The sparse matrix of `weight` (connections,), in compressed rows, with x: (inputs, n) -> (outputs, n)."""
    # A bag is a row of the mask: the weighted sum of the features that it connects. Nothing of size connections * n is
    # ever made. Strided features would be read ten times slower.
    return F.embedding_bag(
        columns,
        x.contiguous(),
        starts,
        norm_type=2.0,  # the default, but TorchScript after fx wants a float
        mode="sum",
        per_sample_weights=weight,
        include_last_offset=True,
    )


class _Product(torch.autograd.Function):
    """`_product` with gradients that cost as much as it does. Those of embedding_bag are sums scattered over x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, columns, starts)
        return _product(x, weight, columns, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, columns, starts = ctx.saved_tensors
        inputs, outputs = len(x), len(starts) - 1
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # the product with the transposed matrix, its connections in the order of columns
            order = columns.argsort(stable=True)
            rows = torch.arange(outputs, dtype=columns.dtype, device="cpu").repeat_interleave(starts.diff())
            places = torch.arange(inputs + 1, dtype=columns.dtype, device="cpu")
            starts_t = torch.searchsorted(columns.index_select(0, order), places, out_int32=True)
            grad_x = _product(grad, weight.index_select(0, order), rows.index_select(0, order), starts_t)
        if ctx.needs_input_grad[1]:  # grad x^T, where there are connections
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                mask = torch.sparse_csr_tensor(starts, columns, weight, (outputs, inputs), check_invariants=False)
                grad_weight = torch.sparse.sampled_addmm(mask, grad.contiguous(), x.t(), beta=0.0).values()
        return grad_x, grad_weight, None, None


class SparseLinear(nn.Module):
    """A linear map with a frozen random mask: only its `connections` weights exist, with their places as indices.

    Args:
        in_features, out_features: of the map.
        connections: weights, placed uniformly at random.
        seed: of their places, which travel with the checkpoint.
    """

    if TYPE_CHECKING:  # only there: TorchScript cannot read these annotations
        columns: Tensor
        starts: Tensor

    def __init__(
        self, in_features: int, out_features: int, connections: int, seed: int = 0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        columns, starts = random_connections(in_features, out_features, connections, seed)
        self.register_buffer("columns", columns.to(device or torch.get_default_device()))
        self.register_buffer("starts", starts.to(device or torch.get_default_device()))
        bound = math.sqrt(out_features / connections)  # 1 / sqrt of the mean fan-in, as nn.Linear
        # Two axes, because optimisers spare vectors from weight decay.
        self.weight = nn.Parameter(torch.empty(1, connections, device=device, dtype=dtype).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Features first: (in_features, rows) -> (out_features, rows), in the weights' dtype."""
        x = x.to(self.weight.dtype).contiguous()
        if not torch.jit.is_scripting() and trains_eagerly(x) and x.dtype in (torch.float32, torch.float64):
            y = self._trained(x)
        else:
            y = _product(x, self.weight[0], self.columns, self.starts)
        return y + self.bias.unsqueeze(1)

    @torch.jit.unused
    def _trained(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight[0], self.columns, self.starts)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.weight.shape[1]} connections"


def _embedding_bag_flops(features: torch.Size, columns: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Lets torch's counter see the work of a SparseLinear: a multiply-add per connection and image."""
    return 2 * columns[0] * features[1]


for _operator in (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only):
    if _operator not in flop_registry:  # torch refuses a second formula
        register_flop_formula(_operator)(_embedding_bag_flops)
