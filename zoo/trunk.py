"""Trunk: what every family shares with timm. Stem -> blocks -> norm -> pool -> head, and timm's model interface on it.

timm is imported inside functions here, in registry.py and in pretrained.py: importing it imports the families, which
need these modules whole.

A family builds `stem`, `blocks` and `norm`, calls `finish`, and overrides the hooks `embed`, `leave` and `to_map` where
its blocks work in a layout of their own.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layers import native
from .layers.eager import is_hooked, runs_eagerly

POOLS = ("", "avg", "max", "flatten")


class Trunk(nn.Module):
    """Base class of the families; see the module's docstring for what a family adds.

    `num_features` is the width of a feature, C, and also of what the model returns without a classifier. The two differ
    under the papers' flattened heads: there it is C with a classifier and N * C, `head_hidden_size`, without.
    """

    images_per_tile: int = 0
    """On a CPU, without gradients, so many images at a time: what passes between layers then stays in the cache. Where
    our own kernels see to that, all at once."""

    if TYPE_CHECKING:  # only there: TorchScript cannot read these annotations
        stem: nn.Module
        blocks: nn.Sequential
        norm: nn.Module
        head: nn.Module

    def finish(
        self,
        *,
        num_classes: int,
        in_chans: int,
        features: int,
        grid: tuple[int, int],
        reduction: list[int],
        widths: list[int],
        global_pool: str,
        drop_rate: float,
        makes_maps: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        """Adds the head and timm's book-keeping; called last in a family's `__init__`.

        Args:
            num_classes: 0 for no classifier.
            in_chans: channels of the input image.
            features: channels C of the last block's output.
            grid: (rows, columns) of the last block's output; a flattened head depends on it.
            reduction, widths: input pixels per feature position, and channels, after each block.
            global_pool: "avg", "max", "flatten" (keeps every position, as the papers do) or "" for none.
            drop_rate: dropout before the classifier.
            makes_maps: features are maps (B, C, H, W) of any size, not tokens (B, N, C).

        Raises:
            ValueError: an unknown `global_pool`; for maps "flatten", or "" with classes.
        """
        self.num_classes, self.in_chans = num_classes, in_chans
        self.features, self.grid, self.makes_maps = features, grid, makes_maps
        self.global_pool = self._checked_pool(global_pool, num_classes)
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = [
            {"module": f"blocks.{i}", "num_chs": width, "reduction": pixels}
            for i, (width, pixels) in enumerate(zip(widths, reduction, strict=True))
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(device, dtype)

    def _checked_pool(self, global_pool: str, num_classes: int) -> str:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool={global_pool!r} is not one of {POOLS}")
        if self.makes_maps and (global_pool == "flatten" or (global_pool == "" and num_classes > 0)):
            raise ValueError(f"global_pool={global_pool!r}: a classifier of maps of any size needs 'avg' or 'max'")
        return global_pool

    def _classifier(self, device, dtype) -> nn.Module:
        flat = self.features * self.grid[0] * self.grid[1]
        self.head_hidden_size = flat if self.global_pool == "flatten" else self.features
        self.num_features = self.features if self.num_classes > 0 else self.head_hidden_size
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.head_hidden_size, self.num_classes, device=device, dtype=dtype)

    # Hooks -----------------------------------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> what the blocks take."""
        return self.stem(x)

    def leave(self, x: Tensor) -> Tensor:
        """What the blocks give -> features: tokens (B, N, C), or maps (B, C, H, W)."""
        return x

    def to_map(self, x: Tensor) -> Tensor:
        """Features -> (B, C, H, W)."""
        if self.makes_maps:
            return x
        return x.transpose(1, 2).unflatten(2, [self.grid[0], self.grid[1]])

    @torch.jit.unused
    def features_by_kernel(self, x: Tensor) -> Tensor | None:
        """What `forward_features` gives, by our own kernels as a whole, or None where they do not apply."""
        return None

    # timm's interface ------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions for layer-wise learning-rate decay."""
        return {"stem": r"^stem|^pos_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, beside those of one axis: biases, norms of several."""
        return {
            f"{name}.{key}".removeprefix(".")
            for name, module in self.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1 and (key == "bias" or isinstance(module, nn.LayerNorm))
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last Linear, or Identity where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none), and optionally another pooling."""
        if global_pool is not None:  # the pooling there is stays unchecked, as in timm, whose tests rely on it
            self.global_pool = self._checked_pool(global_pool, num_classes)
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.head = self._classifier(weight.device, weight.dtype)
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen blocks, as timm's `forward_intermediates`: see there for the arguments.

        Raises:
            ValueError: `output_fmt` is neither "NCHW" nor, for families of tokens, "NLC".
        """
        if output_fmt != "NCHW" and (output_fmt != "NLC" or self.makes_maps):
            raise ValueError(f"output_fmt={output_fmt!r} is not 'NCHW'" + " or 'NLC'" * (not self.makes_maps))
        take, last = _take_indices(len(self.blocks), indices)
        x = self.embed(x)
        intermediates = []
        blocks = self.blocks[: last + 1] if stop_early and not torch.jit.is_scripting() else self.blocks
        for i, block in enumerate(blocks):
            x = self._run(block, x)
            if i in take:
                tap = self.leave(x)
                tap = self.norm(tap) if norm else tap
                intermediates.append(self.to_map(tap) if output_fmt == "NCHW" else tap)
        if intermediates_only:
            return intermediates
        return self.norm(self.leave(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks after the last of `indices`, and the norm and the head where asked."""
        take, last = _take_indices(len(self.blocks), indices)
        cut = last < len(self.blocks) - 1
        self.blocks = self.blocks[: last + 1]
        width = self.feature_info[last]["num_chs"]
        if prune_norm or width != self.features:
            self.norm = nn.Identity()
        self.features = width
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    @torch.jit.unused
    def _wants_whole_batches(self) -> bool:
        """A BatchNorm may take its statistics of the batch, without gradients too, and a hook may keep what it sees."""
        if self.training:
            return True
        parts = (module for module in self.modules() if module is not self)
        return any(is_hooked(part) or (isinstance(part, nn.BatchNorm2d) and _uses_batch(part)) for part in parts)

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return _checkpointed(blocks if isinstance(blocks, nn.Sequential) else [blocks], x)
        return blocks(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> tokens (B, N, C) or maps (B, C, H, W), normalised, not pooled."""
        torch._assert(x.dim() == 4, "images come as (B, C, H, W), a batch of them")
        if not torch.jit.is_scripting():
            tile = self.images_per_tile
            tiles = bool(tile) and runs_eagerly(x) and not native.takes(x)
            if tiles and len(x) > tile and not self._wants_whole_batches():
                return torch.cat([self.forward_features(images) for images in x.split(tile)])
            y = self.features_by_kernel(x)
            if y is not None:
                return y
        x = self.embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = _checkpointed(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(self.leave(x))

    def pool(self, x: Tensor) -> Tensor:
        """Features -> (B, head_hidden_size); unchanged where `global_pool` is ""."""
        if self.global_pool == "":
            return x
        if self.global_pool == "flatten":
            return x.flatten(1)
        axes = [2, 3] if self.makes_maps else [1]
        return x.mean(axes) if self.global_pool == "avg" else x.amax(axes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits (B, num_classes), or with `pre_logits` what the classifier would take."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _take_indices(blocks: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    from timm.models._features import feature_take_indices

    return feature_take_indices(blocks, indices)


def _checkpointed(blocks: nn.Sequential | list[nn.Module], x: Tensor) -> Tensor:
    from timm.models import checkpoint_seq

    return checkpoint_seq(blocks, x)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block, growing linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]
