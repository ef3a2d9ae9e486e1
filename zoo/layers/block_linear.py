"""Block-diagonal linear maps, and the view that brings the groups of a butterfly level onto the diagonal.

Layout: features first, rows last. The axis that is mixed leads and everything else (batch, tokens or channels) is
folded into `rows`, which stays innermost. A level is then one `baddbmm` over blocks, reading a strided level in place:
(n, rows) -> (groups, radix, stride, rows) -> (blocks, radix, rows) is a view whenever groups or stride is 1, which
covers both levels of every two-level butterfly. Levels between those copy once.

Callers have features last. The first product reads them so, and the last one writes (blocks, rows, radix): what is left
is to bring the rows to the front, in runs of `radix`, and a transpose of `radix` by `stride` in each row. That is five
times as fast as to transpose (n, rows). Where no gradient is wanted, a CPU does all of it tile by tile, so that
what passes between the levels stays in its cache; and what is small comes back as a transposed view.

Large blocks and many rows need no features-first layout there: a level is a convolution in groups over pixels whose
channels are the features (`pointwise`), between two transposes of the channels, or on its own where its stride is 1.
Rows stay whole then: a convolution of few is slow.

All of that is for bfloat16, and for machines without our own kernels: where those are, and for float32, they take every
level at once (`native`).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..butterfly import Level
from . import native, native_branches
from .eager import is_hooked, runs_eagerly
from .permute import Permute, transpose_last
from .pointwise import folds_into_pixels, to_pixels, to_rows

TILE = 2**18
"""Numbers in a tile of rows; four tiles and fewer stay whole. The fastest of 2**15 to 2**20, on cores of 1 MiB L2."""

GROUP_MACS = 2**19
"""Multiply-accumulates in a group from which a convolution is faster than a batched product and its transposes."""

SMALL = 2**16
"""So many numbers and fewer stay in the cache, where to read them across costs less than to bring them in order."""


class BlockLinear(nn.Module):
    """`blocks` independent linear maps, the blocks of a block-diagonal matrix.

    Args:
        blocks: number of blocks.
        in_features, out_features: of each block.
        bias: learn a bias, shape (blocks, out_features).
    """

    def __init__(
        self, blocks: int, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, out_features, in_features, **dd))
        self.register_parameter("bias", None)  # so that it is among the parameters, whatever it is set to
        self.bias = nn.Parameter(torch.empty(blocks, out_features, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each block as `nn.Linear` would initialise it: uniform in +-1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, plus: Tensor | None = None, features_last: bool = False) -> Tensor:
        """(blocks, in_features, rows) -> (blocks, out_features, rows), to which `plus` is added if there is no bias.

        With `features_last` the result is (blocks, rows, out_features), and nothing is added.
        """
        if features_last:
            x, weight = x.transpose(1, 2), self.weight.transpose(1, 2)
            return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), x, weight)
        if self.bias is None:
            return torch.bmm(self.weight, x) if plus is None else torch.baddbmm(plus, self.weight, x)
        return torch.baddbmm(self.bias.unsqueeze(-1), self.weight, x)

    def forward_pixels(self, x: Tensor) -> Tensor:
        """(images, blocks * in_features, 4, 4) -> (images, blocks * out_features, 4, 4), a convolution in groups.

        Hooks do not run: they may be what makes the weight, as in pruning, so `FeatureMixer` asks for them first.
        """
        blocks, _, in_features = self.weight.shape
        bias = None if self.bias is None else self.bias.view(-1)
        return F.conv2d(x, self.weight.view(-1, in_features, 1, 1), bias, groups=blocks)

    def as_convolution(self) -> nn.Conv2d:
        """A 1x1 convolution of the same weights, copied, a group for each block: (1, features, H, W) in and out."""
        blocks, out_features, in_features = self.weight.shape
        device, dtype = self.weight.device, self.weight.dtype
        features = (blocks * in_features, blocks * out_features)
        conv = nn.Conv2d(*features, 1, groups=blocks, bias=self.bias is not None, device=device, dtype=dtype)
        with torch.no_grad():
            conv.weight.copy_(self.weight.view(conv.weight.shape))
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias.flatten())
        return conv

    def dense_equivalent(self) -> Tensor:
        """The block-diagonal matrix itself, (blocks * out_features, blocks * in_features)."""
        return torch.block_diag(*self.weight)

    def extra_repr(self) -> str:
        blocks, out_features, in_features = self.weight.shape
        return f"{blocks} blocks, {in_features} -> {out_features}, bias={self.bias is not None}"


class FeatureMixer(nn.Module):
    """Base of the layers that mix one axis: they define `mix_levels`, features first, and get `mix` and `forward`.

    Those made of blocks of `block` features define `steps` too, and `mix_pixels`, which has features last throughout.
    """

    block = 0

    def mix(self, x: Tensor, features_last: bool = False) -> Tensor:
        """(in_features, rows) -> out_features in natural order, in one axis or several, then rows.

        With `features_last` the result is (rows, out_features).
        """
        if not torch.jit.is_scripting():
            y = self.mix_natively(x, features_last)
            if y is not None:
                return y
        return self.mix_levels(x, features_last)

    def mix_levels(self, x: Tensor, features_last: bool = False) -> Tensor:
        """`mix` by torch's operators."""
        raise NotImplementedError

    @torch.jit.unused
    def mix_natively(self, x: Tensor, features_last: bool) -> Tensor | None:
        """`mix` by our kernels, or None where they do not apply. Leading axes of x may be split, as by `merge`."""
        if not native.takes(x):
            return None
        steps = self.steps()
        if not steps:
            return None
        return native.mix(x if x.ndim == 2 else x.flatten(0, -2), steps, features_last)

    @torch.jit.unused
    def branch(self, norm: native.Norm | None) -> native_branches.Branch | None:
        """x + self(norm(x)) for `native_branches`, or None where a part has to be called."""
        steps = self.steps()
        return native_branches.Branch(native_branches.CHANNELS, norm, steps) if steps else None

    @torch.jit.unused
    def steps(self) -> list[native.Step]:
        """The levels for `native.mix`; none where a part is not as it was built, and has to be called."""
        return []

    @torch.jit.unused
    def mix_pixels(self, x: Tensor) -> Tensor:
        """(images, in_features, 4, 4) -> (images, out_features, 4, 4): rows that `to_pixels` took for pixels."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), at least two axes."""
        rows = x.flatten(0, -2)
        y = self.mix(rows.t(), True) if torch.jit.is_scripting() else self._mix_tiles(rows)
        return y.reshape(x.shape[:-1] + y.shape[1:])

    @torch.jit.unused
    def mix_exported(self, x: Tensor) -> Tensor:
        """(rows, in_features) -> (rows, out_features); onnxruntime turns a matrix fast, and more axes slowly."""
        return self.mix_levels(x.t()).flatten(0, -2).t()

    @torch.jit.unused
    def _is_as_built(self) -> bool:
        """Whether nothing watches a part, and none is of a class from elsewhere, which may compute something else."""
        homes = (__package__.partition(".")[0], "torch")
        return not any(is_hooked(m) or type(m).__module__.partition(".")[0] not in homes for m in self.modules())

    @torch.jit.unused
    def _draws(self) -> bool:
        """Whether dropout is at work: a pass without gradients may be the one that another with them recomputes."""
        return self.training and any(isinstance(module, nn.Dropout) for module in self.modules())

    @torch.jit.unused
    def _mix_tiles(self, x: Tensor) -> Tensor:
        y = self.mix_natively(x.t(), True)
        if y is not None:
            return y
        if not runs_eagerly(x) or self._draws():
            if torch.compiler.is_exporting():
                return self.mix_exported(x)
            return self.mix_levels(x.t(), True)
        if self.block**2 * len(x) >= GROUP_MACS and folds_into_pixels(x) and self._is_as_built():
            return to_rows(self.mix_pixels(to_pixels(x)))
        if x.numel() <= SMALL:
            return self.mix_levels(x.t()).flatten(0, -2).t()
        return _in_tiles(lambda tile: self.mix_levels(tile.t(), True), x, max(TILE // x.shape[1], 1))


def _in_tiles(mix: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """`mix` of x, (rows, features), so many rows at a time if they are many."""
    if x.numel() <= 4 * TILE:
        return mix(x)
    tiles = x.split(rows)
    first = mix(tiles[0])
    y = first.new_empty(len(x), first.shape[1])
    y[:rows] = first
    for tile, out in zip(tiles[1:], y.split(rows)[1:], strict=True):
        out.copy_(mix(tile))
    return y


class LevelView(nn.Module):
    """Brings the blocks of one butterfly level to the front and back again.

    Args:
        level: a level over n dimensions.
        width: features that each dimension carries (an expanding ButterflyLinear has more than one); they are mixed
            separately, so the level has `blocks * width` blocks.
    """

    def __init__(self, level: Level, width: int = 1, device=None) -> None:
        super().__init__()
        self.level = (level.groups, level.radix, level.stride)
        self.n = level.groups * level.radix * level.stride
        self.groups, self.stride = level.groups, level.stride * width
        self.blocks = self.groups * self.stride
        self.permute = None if level.order is None else Permute(list(level.order), dim=0, device=device)

    def split(self, x: Tensor, block: int) -> Tensor:
        """n * width features first -> (blocks, block, rows); `block` features a block, `radix` unless shrinking.

        `x` may come with its leading axes split in any way, as `merge` leaves them: only their product counts.
        """
        rows = x.shape[-1]
        if self.permute is not None:
            x = self.permute(x.reshape(self.n, -1))
        # The two levels of a butterfly of two: on one image, each view less is time saved.
        if self.stride == 1:
            return x.reshape(self.groups, block, rows)
        if self.groups == 1:
            return x.reshape(block, self.stride, rows).transpose(0, 1)
        x = x.reshape(self.groups, block, self.stride, rows).transpose(1, 2)
        return x.reshape(self.blocks, block, rows)

    def merge(self, x: Tensor) -> Tensor:
        """(blocks, block, rows) -> (groups, block, stride, rows), features in natural order, not copied.

        Left in four axes, or three where groups or stride is 1, because only a copy could flatten them: the next
        `split`, or a sum, reads it where it lies.
        """
        block, rows = x.shape[1:]
        if self.groups == 1:
            x = x.transpose(0, 1)
        elif self.stride > 1:
            x = x.unflatten(0, [self.groups, self.stride]).transpose(1, 2)
        if self.permute is not None:
            x = self.permute.undo(x.reshape(self.n, -1)).reshape(self.groups, block, self.stride, rows)
        return x

    def merge_last(self, x: Tensor) -> Tensor:
        """(blocks, rows, block) -> (rows, n * width), features in natural order."""
        block = x.shape[2]
        x = x.transpose(0, 1).reshape(-1, self.groups, self.stride * block)
        x = transpose_last(x, self.stride, block).flatten(1)
        if self.permute is not None:
            x = x.unflatten(1, [self.n, -1]).index_select(1, self.permute.inverse).flatten(1)
        return x

    def split_pixels(self, x: Tensor, block: int) -> Tensor:
        """(images, n * width, 4, 4) -> (images, blocks * block, 4, 4), the features of a block side by side."""
        if self.permute is not None:
            rows = to_rows(x).unflatten(1, [self.n, -1])
            x = to_pixels(rows.index_select(1, self.permute.order).flatten(1))
        return x if self.stride == 1 else self._transpose_channels(x, block)

    def merge_pixels(self, x: Tensor, block: int) -> Tensor:
        """(images, blocks * block, 4, 4) -> (images, n * width, 4, 4), features in natural order."""
        if self.stride > 1:
            x = self._transpose_channels(x, self.stride)
        if self.permute is not None:
            rows = to_rows(x).unflatten(1, [self.n, -1])
            x = to_pixels(rows.index_select(1, self.permute.inverse).flatten(1))
        return x

    def _transpose_channels(self, x: Tensor, rows: int) -> Tensor:
        """Within each group, channel (i, j) of `rows` by any number becomes channel (j, i)."""
        if self.groups == 1:
            return torch.channel_shuffle(x, rows)
        channels = x.shape[1]
        x = x.permute(0, 2, 3, 1).reshape(1, 1, -1, channels // self.groups).permute(0, 3, 1, 2)
        return to_pixels(torch.channel_shuffle(x, rows).permute(0, 2, 3, 1).reshape(-1, channels))

    def extra_repr(self) -> str:
        return "groups={}, radix={}, stride={}".format(*self.level)
