"""Butterfly ViT: a Vision Transformer whose attention stays inside strided groups of tokens.

Paper: Dimension Mixer, section 4.2 (arXiv 2311.18735). Levels of the butterfly over the tokens alternate from block to
block, so two blocks reach every token at N * sqrt(N) cost each instead of N * N. The `paper` variants are the paper's
(post-norm, no positions, flattened head, linear patches). Ours (`fast`, `nano`, `tiny`, `small`) differ: pre-norm,
learned position embedding, convolution stem, average pooling. `mixing="dense"` is the same model with attention over
all tokens.
"""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath, resample_abs_pos_embed, to_2tuple, trunc_normal_
from torch import Tensor, nn

from .butterfly import ButterflySchedule, Level, square_radix
from .data_cfg import base_cfg
from .layers import ButterflyAttention, DenseMlp, Permute, TokenStem, random_order
from .layers.eager import is_idle, part
from .layers.native_branches import Blocks, Branch, by_kernel, in_a_row, norm_alone, residual
from .pretrained import build
from .pretrained import default_cfgs as make_default_cfgs
from .registry import register_variants, with_dense_twins
from .trunk import Trunk, drop_path_rates


class Block(nn.Module):
    """Attention on one level, then an MLP over channels, each with a residual; norms before (ours) or after (paper)."""

    def __init__(
        self,
        dim: int,
        level: Level,
        num_heads: int,
        mlp_ratio: float,
        pre_norm: bool,
        drop: float,
        drop_path: float,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = ButterflyAttention(dim, level, num_heads, proj_drop=drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = DenseMlp(dim, mlp_ratio, drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if not torch.jit.is_scripting():
            y = by_kernel(x, self.branches)
            if y is not None:
                return y
        if self.pre_norm:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop_path(self.attn(x)))
        return self.norm2(x + self.drop_path(self.mlp(x)))

    @torch.jit.unused
    def branches(self) -> list[Branch]:
        """The block for `native_branches`; none where a part has to be called."""
        if type(self) is not Block or not is_idle(part(self, "drop_path")):
            return []
        norm1, attn, norm2, mlp = part(self, "norm1"), part(self, "attn"), part(self, "norm2"), part(self, "mlp")
        if self.pre_norm:
            return in_a_row(residual(norm1, attn), residual(norm2, mlp))
        return in_a_row(residual(None, attn), norm_alone(norm1), residual(None, mlp), norm_alone(norm2))


class ButterflyVit(Trunk):
    """See the module's docstring.

    Args:
        img_size: (H, W) or one number.
        patch_size: side of a patch.
        embed_dim, depth, num_heads, mlp_ratio: as in timm; depth counts attention layers.
        mixing: "butterfly", or "dense" for attention over all tokens.
        radix: tokens in a group; None for the smallest divisor of their number that is at least its square root.
        token_order: "raster", or "random" for a fixed random order of the tokens under the butterfly.
        seed: of that order.
        pre_norm: norm before the mixers and one at the end; else after each residual, as in the paper.
        pos_embed: learn a position embedding.
        conv_stem: embed patches with 3x3 convolutions; else with one linear map.
        stem_full_res: one more of them ahead of the strided ones.
        num_classes, in_chans, global_pool, drop_rate, proj_drop_rate: as in timm.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: a patch that does not divide the image, a radix that does not divide the tokens, `num_heads` that do
            not divide `embed_dim`, unknown options.
    """

    if TYPE_CHECKING:  # only there: TorchScript cannot read these annotations
        stem: TokenStem
        order: Permute | None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        embed_dim: int = 128,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        mixing: str = "butterfly",
        radix: int | None = None,
        token_order: str = "raster",
        seed: int = 0,
        pre_norm: bool = True,
        pos_embed: bool = True,
        conv_stem: bool = True,
        stem_full_res: bool = False,
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
        if mixing not in ("butterfly", "dense"):
            raise ValueError(f"mixing={mixing!r} is not one of 'butterfly', 'dense'")
        if token_order not in ("raster", "random"):
            raise ValueError(f"token_order={token_order!r} is not one of 'raster', 'random'")
        self.mixing, self.radix, self.seed = mixing, radix, seed
        self.stem = TokenStem(in_chans, embed_dim, to_2tuple(img_size), patch_size, conv_stem, stem_full_res, **dd)
        tokens = self.stem.grid[0] * self.stem.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **dd)) if pos_embed else None
        order = random_order(tokens, seed)
        self.order = Permute(order, 1, persistent=True, device=device) if token_order == "random" else None
        schedule = self._schedule(tokens)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = Blocks(
            *[
                Block(embed_dim, schedule.level(i), num_heads, mlp_ratio, pre_norm, proj_drop_rate, rates[i], **dd)
                for i in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(embed_dim, **dd) if pre_norm else nn.Identity()
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
        self.init_weights()

    def _schedule(self, tokens: int) -> ButterflySchedule:
        if self.mixing == "dense":
            return ButterflySchedule(tokens, tokens)
        return ButterflySchedule(tokens, self.radix or square_radix(tokens))

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal of std 0.02 for positions and linear maps, zero biases: as in timm's ViT."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embedding, and what every family has."""
        return super().no_weight_decay() | {"pos_embed"}

    def embed(self, x: Tensor) -> Tensor:
        """Image -> tokens with their positions, in the butterfly's order."""
        x = self.stem(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return x if self.order is None else self.order(x)

    def leave(self, x: Tensor) -> Tensor:
        """Tokens back in raster order."""
        return x if self.order is None else self.order.undo(x)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size: resamples the positions and lays the schedule over the new number of tokens.

        Raises:
            ValueError: another `patch_size`, which would need another stem; a size that the patch, or a number of
                tokens that the radix, does not divide; a flattened head, whose weights belong to positions.
        """
        if patch_size is not None and to_2tuple(patch_size) != to_2tuple(self.stem.patch_size):
            raise ValueError(f"patch_size={patch_size}: this model is built for patches of {self.stem.patch_size}")
        if img_size is None or to_2tuple(img_size) == self.stem.img_size:
            return
        if self.global_pool == "flatten" and self.num_classes > 0:
            raise ValueError("a flattened head has a weight for every position: reset_classifier(0) before resizing")
        old, size = self.stem.grid, to_2tuple(img_size)
        grid = self.stem.grid_of(size)
        tokens = grid[0] * grid[1]
        schedule = self._schedule(tokens)  # the last that can refuse: nothing has changed yet
        self.stem.set_input_size(size)
        self.grid = grid
        attentions = [module for module in self.modules() if isinstance(module, ButterflyAttention)]
        for i, attention in enumerate(attentions):
            attention.set_level(schedule.level(i))
        if self.pos_embed is not None:
            resampled = resample_abs_pos_embed(self.pos_embed.data, list(self.grid), list(old), num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        if self.order is not None:
            device = next(self.parameters()).device
            self.order = Permute(random_order(tokens, self.seed), 1, persistent=True, device=device)
        if self.num_classes == 0:
            self.reset_classifier(0)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: ButterflyVit) -> dict[str, Tensor]:
    """Resamples the positions of a checkpoint with another number of tokens, which lay in a square.

    As many tokens keep their positions: a checkpoint does not say what rectangle they lay in.
    """
    changed: dict[str, Tensor] = {}
    positions = state_dict.get("pos_embed")
    if positions is not None and model.pos_embed is not None and positions.shape != model.pos_embed.shape:
        changed["pos_embed"] = resample_abs_pos_embed(positions, list(model.grid), num_prefix_tokens=0)
    order = state_dict.get("order.order")
    if order is not None and model.order is not None and order.shape != model.order.order.shape:
        changed |= {"order.order": model.order.order, "order.inverse": model.order.inverse}
    return state_dict | changed


_PAPER = {"pre_norm": False, "pos_embed": False, "conv_stem": False, "global_pool": "flatten", "num_heads": 8}
# 256 narrow tokens: attention over all of them would be half of the work, and over rows and columns of 16 it is little.
_FAST = {"embed_dim": 48, "depth": 8, "num_heads": 2, "stem_full_res": True}
_NANO = {"embed_dim": 96, "depth": 6, "num_heads": 3, "stem_full_res": True}
_TINY = {"embed_dim": 128, "depth": 8, "num_heads": 4, "stem_full_res": True}
_SMALL = {"embed_dim": 192, "depth": 12, "num_heads": 6}

VARIANTS: dict[str, dict[str, Any]] = with_dense_twins(
    {
        # CIFAR-10 accuracy in the paper: 83.33, 83.67, 78.95, 72.82 %.
        "vit_butterfly_paper_patch4_d4": _PAPER | {"patch_size": 4, "embed_dim": 128, "depth": 4},
        "vit_butterfly_paper_patch4_d8": _PAPER | {"patch_size": 4, "embed_dim": 128, "depth": 8},
        "vit_butterfly_paper_patch2_d4": _PAPER | {"patch_size": 2, "embed_dim": 64, "depth": 4},
        "vit_butterfly_paper_patch1_d4": _PAPER | {"patch_size": 1, "embed_dim": 64, "depth": 4},
        "vit_butterfly_fast_patch2_32": _FAST | {"patch_size": 2},
        "vit_butterfly_nano_patch4_32": _NANO | {"patch_size": 4},
        "vit_butterfly_nano_patch2_32": _NANO | {"patch_size": 2},
        "vit_butterfly_tiny_patch4_32": _TINY | {"patch_size": 4},
        "vit_butterfly_tiny_patch2_32": _TINY | {"patch_size": 2},
        "vit_butterfly_small_patch4_32": _SMALL | {"patch_size": 4},
        "vit_butterfly_small_patch2_32": _SMALL | {"patch_size": 2},
        "vit_butterfly_small_patch4_64": _SMALL | {"patch_size": 4, "img_size": 64},
        "vit_butterfly_small_patch16_224": _SMALL | {"patch_size": 16, "img_size": 224, "embed_dim": 384},
    }
)


def _cfg(args: dict[str, Any]) -> dict[str, Any]:
    first_conv = "stem.proj.0.conv" if args.get("conv_stem", True) else "stem.proj"
    return base_cfg(args.get("img_size", 32), first_conv=first_conv, fixed_input_size=True)


default_cfgs = make_default_cfgs({name: _cfg(args) for name, args in VARIANTS.items()})


def _create_vit_butterfly(variant: str, pretrained: bool = False, **kwargs: Any) -> ButterflyVit:
    return build(ButterflyVit, variant, pretrained, checkpoint_filter_fn, **kwargs)


register_variants(__name__, _create_vit_butterfly, VARIANTS)
