"""A mixing layer seen as a wide and sparse MLP, and its linear case, the Monarch matrix.

Understanding MLP-Mixer as a Wide and Sparse MLP (arXiv 2306.01470), sections 3 and 5. vec(X) stacks the columns of the
tokens X, (S, C): vec(W X V) = (V^T kron W) vec(X). So

    token mixing     W X    is  I_C kron W              (1 / C of its entries are not zero)
    channel mixing   X V    is  V^T kron I_S = Jc^T (I_S kron V^T) Jc                   (1 / S)
    RP-Mixer         phi(J2 (I kron W) J1 vec X), with random permutations J1, J2

where Jc, the commutation, sends vec(X) to vec(X^T). Every one of these is a block-diagonal matrix of equal blocks
between two permutations, which is how it is kept here: nothing of size m x m is made unless it is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .butterfly import square_radix
from .layers import ButterflyFactor, ButterflyLinear, SparseLinear
from .wide_mixer import AxisMlp, FlatMlp, MixingLayer, Shuffle

DENSE_LIMIT = 2**24


def vec(x: Tensor) -> Tensor:
    """(..., S, C) -> (..., S * C), column after column."""
    return x.transpose(-1, -2).flatten(-2)


def unvec(x: Tensor, tokens: int) -> Tensor:
    """(..., S * C) -> (..., S, C), the inverse of `vec`."""
    return x.unflatten(-1, (-1, tokens)).transpose(-1, -2)


def commutation(tokens: int, channels: int) -> Tensor:
    """Jc as a gather: `vec(x)[..., commutation(S, C)] == vec(x.mT)` for x (..., S, C)."""
    return torch.arange(tokens * channels).view(channels, tokens).t().flatten()


class WideOperator:
    """A sparse matrix that is only ever multiplied with, after the gather `before` and before the gather `after`.

    `shape` is (outputs, inputs), `nonzeros` its connections.
    """

    def __init__(self, shape: tuple[int, int], nonzeros: int, before: Tensor | None, after: Tensor | None) -> None:
        self.shape, self.nonzeros, self.before, self.after = shape, nonzeros, before, after

    @property
    def density(self) -> float:
        """The share of the entries that are not zero."""
        return self.nonzeros / (self.shape[0] * self.shape[1])

    def matvec(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        x = x if self.before is None else x[..., self.before]
        x = self._multiply(x)
        return x if self.after is None else x[..., self.after]

    def dense(self) -> Tensor:
        """The matrix itself, (outputs, inputs).

        Raises:
            ValueError: it would have more than `DENSE_LIMIT` entries.
        """
        outputs, inputs = self.shape
        if outputs * inputs > DENSE_LIMIT:
            raise ValueError(f"a dense {outputs} x {inputs} matrix is over {DENSE_LIMIT} entries; use matvec")
        return self.matvec(torch.eye(inputs, dtype=self._weight().dtype, device=self._weight().device)).mT

    def spectral_norm(self) -> float:
        """The largest singular value."""
        raise NotImplementedError

    def _multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _weight(self) -> Tensor:
        raise NotImplementedError


class KroneckerOperator(WideOperator):
    """I kron W between two permutations: `copies` times the block `weight`, (out, in), along the diagonal."""

    def __init__(self, weight: Tensor, copies: int, before: Tensor | None = None, after: Tensor | None = None) -> None:
        rows, columns = weight.shape
        super().__init__((copies * rows, copies * columns), copies * weight.numel(), before, after)
        self.weight, self.copies = weight, copies

    def spectral_norm(self) -> float:
        """The largest singular value: that of the block."""
        return torch.linalg.matrix_norm(self.weight.float(), 2).item()

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x.unflatten(-1, (self.copies, -1)), self.weight).flatten(-2)

    def _weight(self) -> Tensor:
        return self.weight


class MaskedOperator(WideOperator):
    """The weight of a SparseLinear."""

    def __init__(self, linear: SparseLinear, before: Tensor | None = None, after: Tensor | None = None) -> None:
        shape = (linear.out_features, linear.in_features)
        super().__init__(shape, linear.weight.numel(), before, after)
        self.linear = linear

    def spectral_norm(self) -> float:
        """The largest singular value, by subspace iteration to about 1 %."""
        rows = torch.repeat_interleave(self.linear.starts.diff().long())
        places = torch.stack([rows, self.linear.columns.long()])
        matrix = torch.sparse_coo_tensor(places, self._weight()[0].float(), self.shape, check_invariants=False)
        return torch.svd_lowrank(matrix, q=min(8, *self.shape), niter=20)[1][0].item()

    def _multiply(self, x: Tensor) -> Tensor:
        y = self.linear(x.reshape(-1, x.shape[-1]).t()).t() - self.linear.bias
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _weight(self) -> Tensor:
        return self.linear.weight.detach()


@dataclass(frozen=True)
class WideLayer:
    """One layer of a wide MLP: `operator`, the `bias` (outputs,) that `source` has at `places`, and GELU or nothing."""

    operator: WideOperator
    source: nn.Linear | SparseLinear
    places: Tensor
    activation: bool

    @property
    def bias(self) -> Tensor:
        """(outputs,), as the source has it now."""
        return self.source.bias[self.places]

    def __call__(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        x = self.operator.matvec(x) + self.bias
        return F.gelu(x) if self.activation else x


@dataclass(frozen=True)
class WideMlp:
    """A mixing layer, without its norm and skip, as an MLP on vec(X)."""

    layers: tuple[WideLayer, ...]

    @property
    def connections(self) -> int:
        """Non-zero weights of all its layers."""
        return sum(layer.operator.nonzeros for layer in self.layers)

    def __call__(self, x: Tensor) -> Tensor:
        """vec(X), (..., S0 * C) -> vec of the result, (..., S * C)."""
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def effective_mlp(block: nn.Module) -> WideMlp:
    """What a block of a WideMixer adds to its skip, norm left out, as a wide and sparse MLP that shares its weights.

    `unvec(effective_mlp(block)(vec(block.norm(x))), S)` equals `block.mix(block.norm(x))`, without dropout.

    Raises:
        TypeError: not a block of a WideMixer.
    """
    if not isinstance(block, MixingLayer):
        raise TypeError(f"{type(block).__name__} is not a block of a WideMixer (a MixingLayer)")
    layers: list[WideLayer] = []
    tokens = block.in_tokens
    for part in block.mix:
        if isinstance(part, AxisMlp):
            layers += _axis_layers(part, tokens, block.channels)
        elif isinstance(part, FlatMlp):
            layers += _flat_layers(part, tokens)
        tokens = layers[-1].operator.shape[0] // block.channels
    return WideMlp(tuple(layers))


def _axis_layers(part: AxisMlp, tokens: int, channels: int) -> Iterator[WideLayer]:
    linears = _linears(part.mlp)
    for i, (module, activation) in enumerate(linears):
        linear = cast(nn.Linear, module)
        outputs, inputs = linear.weight.shape
        if part.tokens:
            copies, before, after = channels, None, None
            last_tokens = outputs
        else:
            copies, before, after = tokens, commutation(tokens, inputs), commutation(outputs, tokens)
            last_tokens = tokens
        places = torch.arange(outputs).repeat(copies)
        places = places if after is None else places[after]
        if i == 0 and isinstance(part.before, Shuffle):
            before = _then(_in_vec_order(part.before, tokens), before)
        if i == len(linears) - 1 and isinstance(part.after, Shuffle):
            shuffle = _in_vec_order(part.after, last_tokens)
            after, places = _then(after, shuffle), places[shuffle]
        yield WideLayer(KroneckerOperator(linear.weight, copies, before, after), linear, places, activation)


def _flat_layers(part: FlatMlp, tokens: int) -> Iterator[WideLayer]:
    # A FlatMlp reads and writes row after row of X; between its layers there is no X.
    linears = _linears(part.mlp)
    for i, (module, activation) in enumerate(linears):
        linear = cast(SparseLinear, module)
        before = commutation(tokens, part.channels) if i == 0 else None
        last = i == len(linears) - 1
        after = commutation(part.channels, linear.out_features // part.channels) if last else None
        places = torch.arange(linear.out_features) if after is None else after
        yield WideLayer(MaskedOperator(linear, before, after), linear, places, activation)


def _linears(mlp: nn.Sequential) -> list[tuple[nn.Module, bool]]:
    """The linear layers of an MLP, each with whether GELU follows."""
    modules = [module for module in mlp if not isinstance(module, nn.Dropout)]
    return [
        (module, isinstance(after, nn.GELU))
        for module, after in zip(modules, [*modules[1:], None], strict=True)
        if not isinstance(module, nn.GELU)
    ]


def _in_vec_order(shuffle: Shuffle, tokens: int) -> Tensor:
    """The gather on vec(X) that a Shuffle, which permutes X row after row, is."""
    channels = shuffle.channels
    order = shuffle.permute.order.cpu()
    return commutation(tokens, channels)[order[commutation(channels, tokens)]]


def _then(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One gather for two."""
    if first is None or second is None:
        return second if first is None else first
    return first[second]


@dataclass(frozen=True)
class Monarch:
    """M = P^T L P R: two block-diagonal matrices, the second one on dimensions that lie apart.

    `right`, (blocks, a, a), acts on runs of `a` dimensions; `left`, (stride, b, b), on the dimensions q, q + stride,
    q + 2 stride, ... for each of its blocks q. Both cover all n.
    """

    right: Tensor
    left: Tensor

    @property
    def n(self) -> int:
        """Dimensions."""
        return self.right.shape[0] * self.right.shape[1]

    def matvec(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        x = torch.einsum("pij,...pj->...pi", self.right, x.unflatten(-1, self.right.shape[:2])).flatten(-2)
        stride, block, _ = self.left.shape
        return torch.einsum("qij,...jq->...iq", self.left, x.unflatten(-1, (block, stride))).flatten(-2)

    def dense(self) -> Tensor:
        """(n, n)."""
        return self.matvec(torch.eye(self.n, dtype=self.right.dtype, device=self.right.device)).mT


def mixer_monarch(token_weight: Tensor, channel_weight: Tensor) -> Monarch:
    """The Monarch matrix V^T kron W of the linear mixer X -> W X V, for W (S, S) and V (C, C): equal blocks."""
    S, C = len(token_weight), len(channel_weight)
    return Monarch(token_weight.expand(C, S, S), channel_weight.mT.expand(S, C, C))


def to_monarch(layer: ButterflyLinear) -> Monarch:
    """The factors of a ButterflyLinear of two levels, without its bias.

    Raises:
        ValueError: it has another number of levels or changes the number of features.
    """
    if len(layer.schedule) != 2 or layer.in_features != layer.out_features:
        raise ValueError(f"a Monarch matrix is square and has two levels, not {layer.extra_repr()}")
    right, left = (cast(ButterflyFactor, factor).linear.weight.detach() for factor in layer.factors)
    return Monarch(right, left)


@torch.no_grad()
def from_monarch(monarch: Monarch) -> ButterflyLinear:
    """A ButterflyLinear with these factors, without bias.

    Raises:
        ValueError: the blocks of the two factors differ in size, as a mixer's do unless S = C, or two levels of such
            blocks do not reach everything.
    """
    radix = monarch.right.shape[-1]
    if radix != monarch.left.shape[-1]:
        raise ValueError(f"blocks of {radix} and {monarch.left.shape[-1]}: a ButterflyLinear has blocks of one size")
    layer = ButterflyLinear(
        monarch.n, monarch.n, radix, bias=False, dtype=monarch.right.dtype, device=monarch.right.device
    )
    if len(layer.schedule) != 2:
        raise ValueError(f"blocks of {radix} do not reach all of {monarch.n} dimensions in two levels")
    for factor, weight in zip(layer.factors, (monarch.right, monarch.left), strict=True):
        cast(ButterflyFactor, factor).linear.weight.copy_(weight)
    return layer


@torch.no_grad()
def project_to_monarch(weight: Tensor, radix: int | None = None) -> Monarch:
    """The Monarch matrix nearest to a square `weight` (n, n) in the Frobenius norm, with blocks of `radix`.

    The entries from run p of the inputs to the outputs of block q of the left factor pass through the dimensions that
    both share, r of them (one where radix**2 = n). These sub-matrices part the whole matrix, and each is free to be any
    of rank r, so its truncated SVD is the optimum.

    Raises:
        ValueError: `weight` is not square, or `radix` does not give two levels.
    """
    n = len(weight)
    if weight.shape != (n, n):
        raise ValueError(f"a Monarch matrix is square, not {tuple(weight.shape)}")
    radix = radix or square_radix(n)
    if not 2 <= radix < n or n % radix or radix**2 < n:
        raise ValueError(f"radix {radix} does not make two levels of n={n}: need a divisor from sqrt(n) up, below n")
    blocks = n // radix
    monarch = Monarch(weight.new_zeros(blocks, radix, radix), weight.new_zeros(blocks, radix, radix))
    for p in range(blocks):
        for q in range(blocks):
            shared = [d for d in range(p * radix, (p + 1) * radix) if d % blocks == q]
            if not shared:
                continue
            u, s, v = torch.linalg.svd(weight[q::blocks, p * radix : (p + 1) * radix], full_matrices=False)
            inside, root = torch.tensor(shared), s[: len(shared)].sqrt()
            monarch.left[q][:, inside // blocks] = u[:, : len(shared)] * root
            monarch.right[p][inside - p * radix] = root[:, None] * v[: len(shared)]
    return monarch
