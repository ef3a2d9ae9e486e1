"""ButterflyLinear: a product of block-diagonal factors in place of a dense matrix. Two levels are a Monarch matrix."""

import torch
from torch import Tensor, nn

from ..butterfly import ButterflySchedule
from .block_linear import BlockLinear, FeatureMixer, LevelView
from .eager import is_hooked, parameter, part
from .native import Step, steps_of


class ButterflyFactor(nn.Module):
    """One factor of a ButterflyLinear: the block-diagonal weight of one level, between the views that bring it there.

    Args:
        view: the level's view.
        in_block, out_block: features a block takes and gives.
        bias: learn a bias.
    """

    def __init__(
        self, view: LevelView, in_block: int, out_block: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.view = view
        self.in_block, self.out_block = in_block, out_block
        self.linear = BlockLinear(view.blocks, in_block, out_block, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, features_last: bool = False) -> Tensor:
        """Features first -> features first, leading axes as `LevelView.merge` leaves them, or (rows, features)."""
        x = self.view.split(x, self.in_block)
        if features_last:
            return self.view.merge_last(self.linear(x, None, True))
        return self.view.merge(self.linear(x))

    @torch.jit.unused
    def step(self) -> Step | None:
        """The factor for `native.mix`, or None where something of it has to be called."""
        view, linear = part(self, "view"), part(self, "linear")
        if type(self) is not ButterflyFactor or view.permute is not None or is_hooked(self):
            return None
        if type(linear) is not BlockLinear or is_hooked(linear):
            return None
        weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
        return Step(view.groups, view.stride, self.in_block, self.out_block, weight, bias)


class ButterflyLinear(FeatureMixer):
    """A linear map (..., in_features) -> (..., out_features) in one block-diagonal factor per butterfly level.

    The schedule runs over `n = min(in_features, out_features)` dimensions. A wider output is made by the first factor
    (blocks a -> a * width), a wider input is taken in by the last one (blocks a * width -> a), which runs the levels
    backwards: the structure of a shrinking map is the transpose of that of the expanding one. Only the last factor has
    a bias. (Dimension Mixer, section 4.1, `sparse_linear`; with two levels a Monarch matrix.)

    Args:
        in_features, out_features: one must divide the other.
        radix: block size of the schedule.
        bias: learn a bias, that of the last factor: (blocks, features of a block).

    Raises:
        ValueError: `radix` does not divide n, or neither feature count divides the other.
    """

    def __init__(
        self, in_features: int, out_features: int, radix: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        n, larger = sorted((in_features, out_features))
        if larger % n:
            raise ValueError(f"in_features={in_features} and out_features={out_features}: neither divides the other")
        self.in_features, self.out_features = in_features, out_features
        self.schedule, self.block = ButterflySchedule(n, radix), radix
        width, shrinks = larger // n, in_features > out_features
        levels = self.schedule.levels[::-1] if shrinks else self.schedule.levels
        last = len(levels) - 1
        factors = []
        for i, level in enumerate(levels):
            resizes = i == (last if shrinks else 0)  # always the level of stride 1, where width sits inside the block
            view = LevelView(level, 1 if resizes else width, device=device)
            in_block = radix * width if resizes and shrinks else radix
            out_block = radix * width if resizes and not shrinks else radix
            factors.append(ButterflyFactor(view, in_block, out_block, bias and i == last, device=device, dtype=dtype))
        self.factors = nn.Sequential(*factors)

    @torch.jit.unused
    def steps(self) -> list[Step]:
        """One product for each factor."""
        return steps_of(self.factors) if type(self) is ButterflyLinear else []

    def mix_levels(self, x: Tensor, features_last: bool = False) -> Tensor:
        """Features first: (in_features, rows) -> out_features in natural order, leading axes split, rows last.

        With `features_last` the result is (rows, out_features).
        """
        for i, factor in enumerate(self.factors):
            x = factor(x, features_last and i == len(self.factors) - 1)
        return x

    @torch.jit.unused
    def mix_pixels(self, x: Tensor) -> Tensor:
        """(images, in_features, 4, 4) -> (images, out_features, 4, 4)."""
        for factor in self.factors:  # all in one frame, so that what one step made is free before the next but one
            assert isinstance(factor, ButterflyFactor)
            x = factor.view.split_pixels(x, factor.in_block)
            x = factor.linear.forward_pixels(x)
            x = factor.view.merge_pixels(x, factor.out_block)
        return x

    @torch.no_grad()
    def dense_equivalent(self) -> Tensor:
        """The same map without its bias as a dense matrix, (out_features, in_features)."""
        weight = next(self.parameters())
        x = torch.eye(self.in_features, device=weight.device, dtype=weight.dtype)
        for factor in self.factors:
            assert isinstance(factor, ButterflyFactor)
            x = factor.view.merge(torch.bmm(factor.linear.weight, factor.view.split(x, factor.in_block)))
        return x.reshape(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.schedule}"
