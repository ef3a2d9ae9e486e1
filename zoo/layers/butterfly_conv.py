"""The channel permutations of the two convolution mixings.

Layout: channels_last in and out. Grouped convolutions are ten times faster there on a CPU, and a permutation of
channels is then a transpose of the innermost, contiguous axis. Its copy is the only one: the convolution reads it.
"""

import torch
from torch import Tensor, nn

from ..butterfly import Level
from .eager import runs_eagerly
from .permute import Permute, inverse_of, transpose_last


class ChannelTranspose(nn.Module):
    """Permutes channels by viewing them as (outer, middle, inner) and swapping the last two axes.

    `ChannelTranspose(1, G, C // G)` is the channel shuffle between the two convolutions of conv-mix; the groups of a
    butterfly level, (groups, radix, stride), become contiguous under `ChannelTranspose(groups, radix, stride)`.
    """

    def __init__(self, outer: int, middle: int, inner: int) -> None:
        super().__init__()
        self.outer, self.middle, self.inner = outer, middle, inner

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not torch.jit.is_scripting():  # an `if` of its own, or TorchScript would read the next one  # noqa: SIM102
            if torch.compiler.is_exporting():  # other runtimes have a layout of their own
                return x.unflatten(1, [self.outer, self.middle, self.inner]).transpose(2, 3).flatten(1, 3)
        if self.outer == 1 and not torch.jit.is_scripting() and runs_eagerly(x):
            return torch.channel_shuffle(x, self.middle)  # what `transpose_last` comes to, without its views
        x = x.permute(0, 2, 3, 1)
        if self.outer == 1:
            x = transpose_last(x, self.middle, self.inner)
        else:
            x = transpose_last(x.unflatten(3, [self.outer, -1]), self.middle, self.inner).flatten(3)
        return x.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"({self.outer}, {self.middle}, {self.inner})"


def gather_groups(level: Level, device=None) -> nn.Module:
    """Channels in natural order -> each block of `level` contiguous: what block-mix does before its grouped convs."""
    if level.order is not None:
        return Permute(list(level.order), dim=1, device=device)
    if level.stride == 1:
        return nn.Identity()
    return ChannelTranspose(level.groups, level.radix, level.stride)


def scatter_groups(level: Level, device=None) -> nn.Module:
    """The inverse of `gather_groups`."""
    if level.order is not None:
        return Permute(inverse_of(level.order), dim=1, device=device)
    if level.stride == 1:
        return nn.Identity()
    return ChannelTranspose(level.groups, level.stride, level.radix)
