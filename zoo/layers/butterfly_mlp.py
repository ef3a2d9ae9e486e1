"""MLPs over one axis: dense, with Monarch matrices for weights, and with a butterfly of small MLPs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..butterfly import ButterflySchedule
from .block_linear import BlockLinear, FeatureMixer, LevelView
from .butterfly_linear import ButterflyLinear
from .eager import is_hooked, is_idle, parameter, part
from .native import Step, steps_of
from .pointwise import Linear, is_as_built, step_of


def mlp_step(fc1: nn.Module, drop: nn.Module, fc2: nn.Module) -> Step | None:
    """Two Linears with a GELU and a dropout between them as one level, or None where one of them has to be called."""
    first, second = step_of(fc1), step_of(fc2)
    if first is None or second is None or not is_idle(drop):
        return None
    weights = (first.weight, first.bias, first.outer, second.weight, second.bias)
    return Step(1, 1, first.inner, second.outer, *weights) if first.outer == second.inner else None


class DenseMlp(FeatureMixer):
    """The ordinary MLP, n -> ratio * n -> n with GELU: what the butterflies stand in for."""

    def __init__(self, n: int, ratio: float = 2, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        hidden = int(ratio * n)
        self.fc1 = Linear(n, hidden, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, n, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop) if drop > 0 else nn.Identity()

    @torch.jit.unused
    def steps(self) -> list[Step]:
        """One block of all features; none where a subclass may compute something else, as in all `steps` here."""
        step = mlp_step(part(self, "fc1"), part(self, "drop"), part(self, "fc2"))
        return [] if step is None or type(self) is not DenseMlp else [step]

    def mix_levels(self, x: Tensor, features_last: bool = False) -> Tensor:
        """Features first: (n, rows) -> (n, rows), or with `features_last` (rows, n)."""
        plain = True
        if not torch.jit.is_scripting():
            plain = all(is_as_built(fc) and fc.bias is not None for fc in (self.fc1, self.fc2))
        if features_last or not plain:
            y = self.fc2(self.drop(F.gelu(self.fc1(x.t()))))
            return y if features_last else y.t()
        x = self.drop(F.gelu(torch.addmm(self.fc1.bias.unsqueeze(1), self.fc1.weight, x)))
        return torch.addmm(self.fc2.bias.unsqueeze(1), self.fc2.weight, x)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        if not torch.jit.is_scripting():
            y = self.mix_natively(x.flatten(0, -2).t(), True)
            if y is not None:
                return y.view(x.shape[:-1] + y.shape[-1:])
        return self.fc2(self.drop(F.gelu(self.fc1(x))))


class MonarchMlp(FeatureMixer):
    """The MLP with each Linear replaced by a ButterflyLinear, GELU between the two (`sparse_linear` of the paper).

    The hidden features never leave the block order: the levels of the second Linear run backwards, so its first level
    reads in place what the last level of the first Linear wrote.

    Args:
        n: features.
        radix: block size of both Linears.
        ratio: hidden features per input feature.
        drop: dropout after the activation.

    Raises:
        ValueError: `radix` does not divide `n`.
    """

    def __init__(self, n: int, radix: int, ratio: int = 2, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        self.fc1 = ButterflyLinear(n, ratio * n, radix, device=device, dtype=dtype)
        self.fc2 = ButterflyLinear(ratio * n, n, radix, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop) if drop > 0 else nn.Identity()
        self.block = radix

    @torch.jit.unused
    def steps(self) -> list[Step]:
        """Those of both Linears, the GELU between them in the last step of the first."""
        first, second = self.fc1.steps(), self.fc2.steps()
        if not (first and second and is_idle(self.drop)) or is_hooked(self.fc1) or is_hooked(self.fc2):
            return []
        if type(self) is not MonarchMlp:
            return []
        return [*first[:-1], first[-1]._replace(activate=True), *second]

    def mix_levels(self, x: Tensor, features_last: bool = False) -> Tensor:
        """Features first: (n, rows) -> n features in natural order, leading axes split, rows last.

        With `features_last` the result is (rows, n).
        """
        return self.fc2.mix(self.drop(F.gelu(self.fc1.mix(x))), features_last)

    @torch.jit.unused
    def mix_pixels(self, x: Tensor) -> Tensor:
        """(images, n, 4, 4) -> (images, n, 4, 4)."""
        return self.fc2.mix_pixels(self.drop(F.gelu(self.fc1.mix_pixels(x))))


class BlockMlp(nn.Module):
    """One level of a ButterflyMlp: an MLP of its own for every block, a -> ratio * a -> a with GELU and biases.

    With `residual` a block adds to what it reads, and has no output bias: the product adds in its place.
    """

    def __init__(
        self, view: LevelView, radix: int, ratio: int, drop: float, residual: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.view = view
        self.radix = radix
        self.residual = residual
        self.fc1 = BlockLinear(view.blocks, radix, ratio * radix, device=device, dtype=dtype)
        self.fc2 = BlockLinear(view.blocks, ratio * radix, radix, not residual, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor, features_last: bool = False) -> Tensor:
        """Features first -> features first, leading axes as `LevelView.merge` leaves them, or (rows, features)."""
        x = self.view.split(x, self.radix)
        y = self.drop(F.gelu(self.fc1(x)))
        if features_last:
            assert not self.residual, "the last level of a ButterflyMlp has no residual"
            return self.view.merge_last(self.fc2(y, None, True))
        return self.view.merge(self.fc2(y, x if self.residual else None))

    @torch.jit.unused
    def step(self) -> Step | None:
        """The level for `native.mix`, or None where something of it has to be called."""
        view, fc1, fc2, drop = part(self, "view"), part(self, "fc1"), part(self, "fc2"), part(self, "drop")
        if type(self) is not BlockMlp or view.permute is not None or is_hooked(self) or not is_idle(drop):
            return None
        if type(fc1) is not BlockLinear or is_hooked(fc1) or type(fc2) is not BlockLinear or is_hooked(fc2):
            return None
        radix, weight, weight2 = self.radix, parameter(fc1, "weight"), parameter(fc2, "weight")
        if weight is None or weight2 is None:
            return None
        first = (view.groups, view.stride, radix, radix, weight, parameter(fc1, "bias"), weight.shape[1])
        return Step(*first, weight2, parameter(fc2, "bias"), self.residual)

    @torch.jit.unused
    def forward_pixels(self, x: Tensor) -> Tensor:
        """(images, features, 4, 4) -> (images, features, 4, 4)."""
        x = self.view.split_pixels(x, self.radix)
        y = self.fc2.forward_pixels(self.drop(F.gelu(self.fc1.forward_pixels(x))))
        return self.view.merge_pixels(y.add_(x) if self.residual else y, self.radix)


class ButterflyMlp(FeatureMixer):
    """A butterfly whose mixer is an MLP. No activation between levels, and in the paper no residual.

    (Dimension Mixer, section 4.1, `sparse_mlp`.)

    Args:
        n: features.
        radix: block size.
        ratio: hidden features per input feature.
        drop: dropout after the activation.
        residual: every level but the last adds to what it reads. The last is left to the residual around the MLP.

    Raises:
        ValueError: `radix` does not divide `n`.
    """

    def __init__(
        self,
        n: int,
        radix: int,
        ratio: int = 2,
        drop: float = 0.0,
        residual: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.schedule, self.block = ButterflySchedule(n, radix), radix
        views = [LevelView(level, device=device) for level in self.schedule.levels]
        adds = [residual] * (len(views) - 1) + [False]
        self.levels = nn.Sequential(
            *[BlockMlp(view, radix, ratio, drop, add, device, dtype) for view, add in zip(views, adds, strict=True)]
        )

    @torch.jit.unused
    def steps(self) -> list[Step]:
        """One MLP of blocks for each level."""
        return steps_of(self.levels) if type(self) is ButterflyMlp else []

    def mix_levels(self, x: Tensor, features_last: bool = False) -> Tensor:
        """Features first: (n, rows) -> n features in natural order, leading axes split, rows last.

        With `features_last` the result is (rows, n).
        """
        for i, level in enumerate(self.levels):
            x = level(x, features_last and i == len(self.levels) - 1)
        return x

    @torch.jit.unused
    def mix_exported(self, x: Tensor) -> Tensor:
        """(rows, n) -> (rows, n); one block of all features is an ordinary MLP, and needs no turning."""
        level = self.levels[0]
        assert isinstance(level, BlockMlp)
        if level.view.blocks > 1:
            return super().mix_exported(x)
        # A third axis, or onnxruntime would take a Gemm and a GELU where it has a faster product and BiasGelu.
        hidden = level.drop(F.gelu(F.linear(x.unsqueeze(0), *(p[0] for p in level.fc1.parameters()))))
        return F.linear(hidden, *(p[0] for p in level.fc2.parameters())).squeeze(0)

    @torch.jit.unused
    def mix_pixels(self, x: Tensor) -> Tensor:
        """(images, n, 4, 4) -> (images, n, 4, 4)."""
        for level in self.levels:
            assert isinstance(level, BlockMlp)
            x = level.forward_pixels(x)
        return x

    def extra_repr(self) -> str:
        return repr(self.schedule)


class ConvButterflyMlp(FeatureMixer):
    """A ButterflyMlp for inference whose products are 1x1 convolutions in groups, the rows being pixels.

    For runtimes with fast convolutions in groups and slow batches of small products (`fuse.convolve_levels`).

    Args:
        mlp: whose weights are copied, a group for each block.
    """

    def __init__(self, mlp: ButterflyMlp) -> None:
        super().__init__()
        self.levels = nn.Sequential(*[_ConvLevel(level) for level in mlp.levels])  # type: ignore[arg-type]

    def mix_levels(self, x: Tensor, features_last: bool = False) -> Tensor:
        """Features first: (n, rows) -> n features in natural order, leading axes split, rows last.

        With `features_last` the result is (rows, n).
        """
        x = self.levels(x)
        return x.flatten(0, -2).t() if features_last else x

    @torch.jit.unused
    def mix_exported(self, x: Tensor) -> Tensor:
        """(rows, n) -> (rows, n)."""
        first = self.levels[0]
        assert isinstance(first, _ConvLevel)
        return self.levels[1:](first.from_rows(x)).flatten(0, -2).t()


class _ConvLevel(nn.Module):
    """A BlockMlp in convolutions."""

    def __init__(self, level: BlockMlp) -> None:
        super().__init__()
        self.view, self.radix, self.residual = level.view, level.radix, level.residual
        self.fc1, self.fc2 = level.fc1.as_convolution(), level.fc2.as_convolution()

    def forward(self, x: Tensor) -> Tensor:
        """Features first -> features first, leading axes as `LevelView.merge` leaves them."""
        x = self.view.split(x, self.radix)
        return self._mix(x.reshape(1, -1, 1, x.shape[2]))

    def from_rows(self, x: Tensor) -> Tensor:
        """The same of (rows, n), for a first level, of neighbours: pixels that onnxruntime turns fast."""
        return self._mix(x.view(1, 1, *x.shape).permute(0, 3, 1, 2))

    def convolve(self, pixels: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, n, H, W), the features of a block side by side."""
        y = self.fc2(F.gelu(self.fc1(pixels)))
        return y + pixels if self.residual else y

    def _mix(self, pixels: Tensor) -> Tensor:
        y = self.convolve(pixels)
        return self.view.merge(y.reshape(self.view.blocks, self.radix, y.shape[3]))
