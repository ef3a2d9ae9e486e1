"""Patch-Only Mixer: an image mixed by MLPs on patches alone, of two sizes whose partitions overlap.

Paper: Dimension Mixer, section 4.3 (arXiv 2311.18735). There is no mixing across patches and none of channels as such:
a step cuts the image into patches, runs LayerNorm and one MLP on the values of each, puts them back and adds. Steps of
5x5 and 7x7 on a 35x35 image alternate; what one keeps apart the other brings together. Depth counts pairs of steps.

The `paper` variants are the paper's: the image resized to 35x35, its three channels kept, flattened head. Ours lift the
image to more channels with one convolution or two first, which halve its sides in all but `small`. In `strided` the
partitions overlap as the levels of a butterfly do: patches of one size whose pixels lie 1, 2, 4, 8 apart. In `fast` the
MLP of such a patch is a butterfly too, of small MLPs over its values. The dense twin has one MLP over them, and adds to
every step an MLP across the patches (the token mixing of an MLP-Mixer), so that each step reaches the whole image.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .butterfly import ButterflySchedule
from .data_cfg import base_cfg
from .layers import ButterflyMlp, ConvNorm, ConvStem, DenseMlp, PatchFold
from .layers.eager import is_hooked, is_idle, part
from .layers.native_branches import ACROSS, PATCHES, Blocks, Branch, by_kernel, in_a_row, residual
from .layers.pointwise import is_as_built, linear
from .pretrained import build
from .pretrained import default_cfgs as make_default_cfgs
from .registry import register_variants, with_dense_twins
from .trunk import Trunk, drop_path_rates


class ImageStem(nn.Module):
    """Brings the image to `channels` channels and to the grid that both patch sizes divide.

    With a `stride` a convolution of that stride with BatchNorm makes the channels, after one of stride 1 with `width`
    channels, BatchNorm and ReLU if there is a `width`; with None the image's own channels are kept, and a 1x1
    convolution adapts an image that has another number of them.
    """

    def __init__(
        self,
        in_chans: int,
        channels: int,
        grid: tuple[int, int],
        stride: int | None,
        width: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grid = [grid[0], grid[1]]
        keep = stride is None and in_chans != channels
        self.adapt = nn.Conv2d(in_chans, channels, 1, bias=False, **dd) if keep else None
        self.first = ConvStem(in_chans, width, 1, **dd) if width else None
        self.lift = ConvNorm(width or in_chans, channels, max(3, stride | 1), stride, **dd) if stride else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, channels, *grid)."""
        if self.adapt is not None:
            x = self.adapt(x)
        if self.first is not None:
            x = self.first(x)
        if self.lift is not None:
            x = self.lift(x)
        return F.interpolate(x, size=self.grid, mode="bilinear", align_corners=True)


class PatchStep(nn.Module):
    """Unfold into patches, LayerNorm, MLP, fold, residual; with `across`, then the same among the patches.

    With a `radix` the MLP is a butterfly of MLPs, over so many of a patch's values each.
    """

    def __init__(
        self,
        fold: PatchFold,
        radix: int | None,
        ratio: int,
        across: bool,
        drop: float,
        drop_path: float,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fold = fold
        self.norm = nn.LayerNorm(fold.values, **dd)
        if radix is None:
            self.mlp: Any = DenseMlp(fold.values, ratio, drop, **dd)
        else:
            self.mlp = ButterflyMlp(fold.values, radix, ratio, drop, residual=True, **dd)
        self.across_norm = nn.LayerNorm(fold.values, **dd) if across else nn.Identity()
        self.across = DenseMlp(fold.num_patches, ratio, drop, **dd) if across else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not torch.jit.is_scripting():
            y = by_kernel(x, self.branches)
            if y is not None:
                return y
            if self.weights_say_all():
                return self._on_pixels(x)
        x = x + self.fold.fold(self.drop_path(self.mlp(self.norm(self.fold.unfold(x)))))
        if self.across is not None:
            patches = self.across_norm(self.fold.unfold(x)).transpose(1, 2)
            x = x + self.fold.fold(self.drop_path(self.across(patches).transpose(1, 2)))
        return x

    @torch.jit.unused
    def weights_say_all(self) -> bool:
        """Whether the norms and the MLP in a patch are as they were built, so that none of them has to be called."""
        norms = [self.norm] if self.across is None else [self.norm, self.across_norm]
        if type(self) is not PatchStep or type(self.fold) is not PatchFold or type(self.mlp) is not DenseMlp:
            return False
        if any(type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None for norm in norms):
            return False
        if any(map(is_hooked, [self.fold, self.mlp, *norms])):
            return False
        return all(is_as_built(fc) and fc.bias is not None for fc in (self.mlp.fc1, self.mlp.fc2))

    @torch.jit.unused
    def _on_pixels(self, x: Tensor) -> Tensor:
        """`forward` in channels_last, where patches are cut of whole pixels and the weights turned to match."""
        fold, fc1, fc2 = self.fold, self.mlp.fc1, self.mlp.fc2
        x = x.permute(0, 2, 3, 1).contiguous()
        hidden = F.gelu(linear(self._normed(self.norm, x), fold.turned(fc1.weight, 1), fc1.bias))
        y = linear(self.mlp.drop(hidden), fold.turned(fc2.weight), fold.turned(fc2.bias))
        x = x + fold.fold_pixels(self.drop_path(y))
        if self.across is not None:
            patches = self._normed(self.across_norm, x).transpose(1, 2)
            x = x + fold.fold_pixels(self.drop_path(self.across(patches).transpose(1, 2)))
        return x.permute(0, 3, 1, 2)

    @torch.jit.unused
    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        """The patches of x, (B, H, W, C), after a norm."""
        weight, bias = (self.fold.turned(parameter) for parameter in (norm.weight, norm.bias))
        return F.layer_norm(self.fold.unfold_pixels(x), norm.normalized_shape, weight, bias, norm.eps)

    @torch.jit.unused
    def branches(self) -> list[Branch]:
        """The step for `native_branches`; none where a part has to be called."""
        fold, across = part(self, "fold"), self.across
        if type(self) is not PatchStep or type(fold) is not PatchFold or is_hooked(fold):
            return []
        if not is_idle(part(self, "drop_path")):
            return []
        size = (fold.patch_size, fold.stride, fold.num_patches)
        inside = residual(part(self, "norm"), part(self, "mlp"), kind=PATCHES, numbers=size)
        if across is None:
            return in_a_row(inside)
        return in_a_row(inside, residual(part(self, "across_norm"), across, kind=ACROSS, numbers=size))


def _steps(patch_sizes: tuple[int, ...], grid_size: int, strided: bool) -> list[tuple[int, int]]:
    """(patch size, stride) of each step of a round."""
    if not strided:
        return [(size, 1) for size in patch_sizes]
    levels = [(size, level) for size in patch_sizes for level in ButterflySchedule(grid_size, size).levels]
    if any(level.order for _, level in levels):
        raise ValueError(f"strided patches of {patch_sizes} have no chain of strides over grid_size={grid_size}")
    return [(size, level.stride) for size, level in levels]


class PatchOnlyMixer(Trunk):
    """See the module's docstring.

    Args:
        img_size: (H, W) or one number: the input it is made for; one of another size is resized to the same grid.
        grid_size: side of the square image that is mixed, after resizing; every patch size divides it.
        patch_sizes: the alternating patch sizes; the depth counts rounds of all of them.
        strided: patches of a size are the levels of a butterfly over rows and columns: of neighbouring pixels, then of
            pixels ever farther apart, so that a round of all levels reaches the whole image. Not in the paper.
        depth: rounds.
        step_blocks: each step is a block of the model, with features of its own, and not each round.
        channels: of the mixed image.
        patch_radix: values in a block of the butterfly that mixes a patch's, every level but the last with a residual
            of its own; None for one MLP over all of them, as in the paper. The dense twin has that.
        mlp_ratio: hidden features per patch value.
        mixing: "butterfly" for patches alone, "dense" for the twin that also mixes across patches.
        stem_stride: make the channels with a convolution of this stride; None to keep the image's own.
        stem_width: channels of one more convolution ahead of that one; None for none.
        head_patch: side of the patches whose values, after a LayerNorm, are the head's features, so that it can pool
            them; None for pixels as features.
        num_classes, in_chans, global_pool, drop_rate, proj_drop_rate: as in timm.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: a patch size that does not divide the grid, or with `strided` has no chain of strides over it
            (see ButterflySchedule); a `patch_radix` that does not divide the values of a patch; a `head_patch` that
            does not divide the grid; unknown `mixing`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        grid_size: int = 35,
        patch_sizes: tuple[int, ...] = (5, 7),
        strided: bool = False,
        depth: int = 7,
        step_blocks: bool = False,
        channels: int = 3,
        patch_radix: int | None = None,
        mlp_ratio: int = 2,
        mixing: str = "butterfly",
        stem_stride: int | None = 1,
        stem_width: int | None = None,
        head_patch: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "flatten",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if mixing not in ("butterfly", "dense"):
            raise ValueError(f"mixing={mixing!r} is not one of 'butterfly', 'dense'")
        grid = (grid_size, grid_size)
        height, width = to_2tuple(img_size)
        self.img_size = [height, width]
        self.stem = ImageStem(in_chans, channels, grid, stem_stride, stem_width, **dd)
        across = mixing == "dense"
        steps = _steps(patch_sizes, grid_size, strided)
        blocks = [[step] for step in steps * depth] if step_blocks else [steps] * depth
        rates = drop_path_rates(drop_path_rate, len(blocks))
        self.blocks = Blocks(
            *[
                Blocks(
                    *[
                        PatchStep(
                            PatchFold(channels, grid, size, stride),
                            None if across else patch_radix,
                            mlp_ratio,
                            across,
                            proj_drop_rate,
                            rate,
                            **dd,
                        )
                        for size, stride in block
                    ]
                )
                for block, rate in zip(blocks, rates, strict=True)
            ]
        )
        self.head_fold = PatchFold(channels, grid, head_patch or 1)
        features, side = self.head_fold.values, self.head_fold.rows
        self.norm = nn.LayerNorm(features, **dd) if head_patch else nn.Identity()
        self.finish(
            num_classes=num_classes,
            in_chans=in_chans,
            features=features,
            grid=(side, side),
            widths=[features] * len(blocks),
            reduction=[max(1, height // side)] * len(blocks),
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    def leave(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> pixels, or the patches of the head, as tokens (B, N, features)."""
        return self.head_fold.unfold(x)

    def to_map(self, x: Tensor) -> Tensor:
        """Tokens -> (B, features, H, W), resized to the input's grid where the mixed image is the finer one."""
        x = x.transpose(1, 2).unflatten(2, [self.grid[0], self.grid[1]])
        if self.grid[0] > self.img_size[0] or self.grid[1] > self.img_size[1]:
            x = F.interpolate(x, size=self.img_size, mode="bilinear", align_corners=True)
        return x


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: PatchOnlyMixer) -> dict[str, Tensor]:
    """Adds the 1x1 convolution that sums or repeats channels, for images with another number of them than it keeps."""
    adapt = model.stem.adapt
    if not isinstance(adapt, nn.Conv2d) or "stem.adapt.weight" in state_dict:
        return state_dict
    same = torch.eye(adapt.out_channels)[:, :, None, None]
    return state_dict | {"stem.adapt.weight": adapt_input_conv(adapt.in_channels, same, base_chans=adapt.out_channels)}


_PAPER = {"grid_size": 35, "patch_sizes": (5, 7), "channels": 3, "stem_stride": None}
_TINY = {"grid_size": 15, "patch_sizes": (3, 5), "channels": 8, "depth": 5, "stem_stride": 2, "stem_width": 32}
# Patches of 2x2 pixels at strides 1, 2, 4 and 8: so many small ones that an MLP across them would be most of the work.
_STRIDED = {
    "grid_size": 16,
    "patch_sizes": (2,),
    "strided": True,
    "channels": 12,
    "depth": 4,
    "stem_stride": 2,
    "stem_width": 48,
}
# The same, wider, on a head that pools patches: a flattened one would have nearly half of all weights for 100 classes.
_STRIDED_TINY = _STRIDED | {"channels": 32, "stem_width": 64, "head_patch": 2, "global_pool": "avg"}
# Patches of 4x4 at strides 1 and 4, whose 400 values two levels of 5 small MLPs mix.
_FAST = _STRIDED | {
    "patch_sizes": (4,),
    "patch_radix": 80,
    "channels": 25,
    "depth": 2,
    "step_blocks": True,
    "head_patch": 4,
    "global_pool": "avg",
}
_SMALL = {"grid_size": 30, "patch_sizes": (5, 6), "channels": 6, "depth": 4}

VARIANTS: dict[str, dict[str, Any]] = with_dense_twins(
    {
        # CIFAR-10 accuracy in the paper: 84.23 and 84.91 %.
        "patch_only_mixer_paper_d7": _PAPER | {"depth": 7},
        "patch_only_mixer_paper_d10": _PAPER | {"depth": 10},
        "patch_only_mixer_fast_32": _FAST,
        "patch_only_mixer_strided_32": _STRIDED,
        "patch_only_mixer_strided_tiny_32": _STRIDED_TINY,
        "patch_only_mixer_tiny_32": _TINY,
        "patch_only_mixer_small_32": _SMALL,
        "patch_only_mixer_small_64": _SMALL | {"img_size": 64, "stem_stride": 2},
        "patch_only_mixer_small_224": _SMALL | {"img_size": 224, "stem_stride": 8, "channels": 12},
    }
)


def _cfg(args: dict[str, Any]) -> dict[str, Any]:
    lift = "stem.first.0.conv" if args.get("stem_width") else "stem.lift.conv"
    first_conv = lift if args.get("stem_stride", 1) else ()
    return base_cfg(args.get("img_size", 32), first_conv=first_conv, fixed_input_size=True)


default_cfgs = make_default_cfgs({name: _cfg(args) for name, args in VARIANTS.items()})


def _create_patch_only_mixer(variant: str, pretrained: bool = False, **kwargs: Any) -> PatchOnlyMixer:
    return build(PatchOnlyMixer, variant, pretrained, checkpoint_filter_fn, **kwargs)


register_variants(__name__, _create_patch_only_mixer, VARIANTS)
