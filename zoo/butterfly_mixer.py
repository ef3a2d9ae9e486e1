"""Butterfly Mixer: an MLP-Mixer whose token MLP and channel MLP are butterflies of small MLPs.

Paper: Dimension Mixer, section 4.1 (arXiv 2311.18735), after MLP-Mixer (arXiv 2105.01601). `mixing`:

  * "butterfly": each MLP is a ButterflyMlp (`sparse_mlp` of the paper);
  * "monarch": each Linear of an MLP is two block-diagonal factors (`sparse_linear`);
  * "dense": the MLP-Mixer.

The `paper` variants are the paper's: linear patches, flattened head, no norm before it. Ours (`fast`, `nano`, `tiny`,
`small`) have a convolution stem, a last norm and average pooling.

Layout: blocks work on (N, B, C). Token mixing then sees tokens first and everything else as rows, which is what the
mixing layers want, without a copy; channel mixing sees channels last, as LayerNorm does.
"""

from typing import Any

import torch
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from .butterfly import square_radix
from .data_cfg import base_cfg
from .layers import ButterflyMlp, DenseMlp, FeatureMixer, MonarchMlp, TokenStem, native
from .layers.eager import is_idle, part
from .layers.native_branches import TOKENS, Blocks, Branch, by_kernel, in_a_row, residual
from .pretrained import build
from .pretrained import default_cfgs as make_default_cfgs
from .registry import register_variants, with_dense_twins
from .trunk import Trunk, drop_path_rates


def make_mlp(
    mixing: str, n: int, radix: int, ratio: int, drop: float, level_residual: bool = False, device=None, dtype=None
) -> FeatureMixer:
    """The MLP over `n` features that `mixing` names. Only "butterfly" knows the residual, and a dense one no radix."""
    if mixing == "dense":
        return DenseMlp(n, ratio, drop, device, dtype)
    if mixing == "monarch":
        return MonarchMlp(n, radix, ratio, drop, device, dtype)
    return ButterflyMlp(n, radix, ratio, drop, level_residual, device, dtype)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each after a LayerNorm over channels and with a residual.

    The token MLP is called by `mix`, features first: a hook on it is not run, one on what it is made of is.
    """

    def __init__(
        self, token_mlp: FeatureMixer, channel_mlp: FeatureMixer, dim: int, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.token_mlp = token_mlp
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.channel_mlp = channel_mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, B, C) -> (N, B, C)."""
        if not torch.jit.is_scripting():
            by_kernels = by_kernel(x, self.branches, tokens_first=True)
            if by_kernels is not None:
                return by_kernels
        y = self.token_mlp.mix(self.norm1(x).flatten(1)).reshape(x.shape)
        x = x + self._drop(y)
        return x + self._drop(self.channel_mlp(self.norm2(x)))

    @torch.jit.unused
    def branches(self) -> list[Branch]:
        """The block for `native_branches`; none where a part has to be called."""
        if type(self) is not MixerBlock or not is_idle(part(self, "drop_path")):
            return []
        tokens = residual(part(self, "norm1"), part(self, "token_mlp"), kind=TOKENS)
        return in_a_row(tokens, residual(part(self, "norm2"), part(self, "channel_mlp")))

    def _drop(self, y: Tensor) -> Tensor:
        # DropPath drops along axis 0, and images lie along axis 1 here.
        return self.drop_path(y.transpose(0, 1)).transpose(0, 1)


class MixerBlocks(Blocks):
    """Blocks that work on (N, B, C)."""

    tokens_first = True


class ButterflyMixer(Trunk):
    """See the module's docstring.

    Args:
        img_size: (H, W) or one number; fixed for good, since token mixing has weights for every position.
        patch_size: side of a patch.
        embed_dim: channels.
        depth: mixer blocks.
        mixing: "butterfly", "monarch" or "dense".
        token_radix, channel_radix: block sizes; None for the smallest divisor that is at least the square root.
        token_ratio, channel_ratio: hidden features per feature of the two MLPs.
        level_residual: of the ButterflyMlps; the paper has none.
        conv_stem: embed patches with 3x3 convolutions; else with one linear map.
        stem_full_res: one more of them ahead of the strided ones.
        stem_width: their channels, widened to `embed_dim` by a 1x1 convolution; None for `embed_dim` itself.
        final_norm: LayerNorm before the head.
        num_classes, in_chans, global_pool, drop_rate, proj_drop_rate: as in timm.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: a patch that does not divide the image, a radix that does not divide its axis, unknown `mixing`.
    """

    images_per_tile: int = 16

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        embed_dim: int = 121,
        depth: int = 7,
        mixing: str = "butterfly",
        token_radix: int | None = None,
        channel_radix: int | None = None,
        token_ratio: int = 2,
        channel_ratio: int = 2,
        level_residual: bool = False,
        conv_stem: bool = True,
        stem_full_res: bool = False,
        stem_width: int | None = None,
        final_norm: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if mixing not in ("butterfly", "monarch", "dense"):
            raise ValueError(f"mixing={mixing!r} is not one of 'butterfly', 'monarch', 'dense'")
        size = to_2tuple(img_size)
        self.stem = TokenStem(in_chans, embed_dim, size, patch_size, conv_stem, stem_full_res, stem_width, **dd)
        tokens = self.stem.grid[0] * self.stem.grid[1]
        token_radix = token_radix or square_radix(tokens)
        channel_radix = channel_radix or square_radix(embed_dim)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = MixerBlocks(
            *[
                MixerBlock(
                    make_mlp(mixing, tokens, token_radix, token_ratio, proj_drop_rate, level_residual, **dd),
                    make_mlp(mixing, embed_dim, channel_radix, channel_ratio, proj_drop_rate, level_residual, **dd),
                    embed_dim,
                    rates[i],
                    **dd,
                )
                for i in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(embed_dim, **dd) if final_norm else nn.Identity()
        self.finish(
            num_classes=num_classes,
            in_chans=in_chans,
            features=embed_dim,
            grid=self.stem.grid,
            widths=[embed_dim] * depth,
            reduction=[patch_size] * depth,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    def embed(self, x: Tensor) -> Tensor:
        """Image -> tokens first, (N, B, C); a view of images first where our kernel will read them so."""
        x = self.stem(x).transpose(0, 1)
        as_it_lies = False
        if not torch.jit.is_scripting():
            as_it_lies = native.takes(x)
        return x if as_it_lies else x.contiguous()

    def leave(self, x: Tensor) -> Tensor:
        """(N, B, C) -> (B, N, C)."""
        return x.transpose(0, 1)


_PAPER = {
    "patch_size": 4,
    "embed_dim": 121,
    "depth": 7,
    "token_radix": 8,
    "channel_radix": 11,
    "conv_stem": False,
    "final_norm": False,
    "global_pool": "flatten",
}
_NANO = {"patch_size": 4, "embed_dim": 192, "depth": 6, "stem_full_res": True}
# Wide and shallow on a narrow stem: few products, each in blocks wide enough to be quick.
_FAST = {
    "patch_size": 4,
    "embed_dim": 400,
    "depth": 4,
    "channel_radix": 20,
    "level_residual": True,
    "stem_full_res": True,
    "stem_width": 128,
}
# 256 tokens: a dense MLP over all of them would be most of the work, and along rows and columns of 16 it is little. The
# channels are one block, since few of them are left.
_FAST_PATCH2 = {
    "patch_size": 2,
    "embed_dim": 96,
    "depth": 4,
    "token_radix": 16,
    "channel_radix": 96,
    "level_residual": True,
    "stem_full_res": True,
}
_TINY_PATCH2 = _FAST_PATCH2 | {"embed_dim": 128, "depth": 8, "channel_radix": 128, "stem_width": 64}
_TINY = {"patch_size": 4, "embed_dim": 256, "depth": 8, "stem_full_res": True}
_SMALL = {"patch_size": 4, "embed_dim": 400, "depth": 10}

VARIANTS: dict[str, dict[str, Any]] = with_dense_twins(
    {
        # CIFAR-10 accuracy in the paper: butterfly 83.70 %, dense 84.07 %, Monarch 83.49 %.
        "butterfly_mixer_paper_d7": _PAPER,
        "butterfly_mixer_fast_32": _FAST,
        "butterfly_mixer_fast_patch2_32": _FAST_PATCH2,
        "butterfly_mixer_nano_32": _NANO,
        "butterfly_mixer_tiny_32": _TINY,
        "butterfly_mixer_tiny_patch2_32": _TINY_PATCH2,
        "butterfly_mixer_small_32": _SMALL,
        "butterfly_mixer_small_64": _SMALL | {"img_size": 64},
        "butterfly_mixer_small_224": _SMALL | {"img_size": 224, "patch_size": 16},
    }
) | {"butterfly_mixer_paper_d7_monarch": _PAPER | {"mixing": "monarch"}}


def _cfg(args: dict[str, Any]) -> dict[str, Any]:
    first_conv = "stem.proj.0.conv" if args.get("conv_stem", True) else "stem.proj"
    return base_cfg(args.get("img_size", 32), first_conv=first_conv, fixed_input_size=True)


default_cfgs = make_default_cfgs({name: _cfg(args) for name, args in VARIANTS.items()})


def _create_butterfly_mixer(variant: str, pretrained: bool = False, **kwargs: Any) -> ButterflyMixer:
    return build(ButterflyMixer, variant, pretrained, **kwargs)


register_variants(__name__, _create_butterfly_mixer, VARIANTS)
