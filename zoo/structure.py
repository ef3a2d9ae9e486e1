"""The mixing structure of a model, level by level, and where its multiply-accumulates are."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import timm
from torch import nn

from .checkpoints.card import NOT_MODEL_ARGS
from .layers.block_linear import LevelView
from .layers.butterfly_attention import ButterflyAttention
from .layers.butterfly_conv import ChannelTranspose
from .layers.patch_fold import PatchFold
from .layers.permute import Permute
from .patch_only_mixer import PatchStep
from .profile import macs_by_module
from .registry import dense_twin


@dataclass(frozen=True)
class MixingLevel:
    """One layer that mixes groups of `radix` dimensions `stride` apart; of its n x n matrix `non_zero` is there.

    Of a factor that widens or narrows, n and `radix` are those of the narrower side. `stride` is None where a shuffle,
    and no stride, says what a group is (`butterfly.Level.order`).
    """

    module: str
    mixes: str
    n: int
    radix: int
    stride: int | None
    groups: int
    non_zero: float


def mixing_levels(model: nn.Module) -> list[MixingLevel]:
    """The layers that mix in groups, in order: block-diagonal products, strided attention, grouped convolutions and
    patches, whose stride is that of their pixels, along the rows and along the columns."""
    levels = []
    strides: dict[str, int | None] = {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, LevelView):
            shape = (module.groups, module.level[1], module.stride)
            levels.append(_level(parent, "features", shape, module.permute is not None))
        elif isinstance(module, ButterflyAttention):
            levels.append(_level(name, "tokens", module.level, module.permute is not None))
        elif isinstance(module, PatchStep):
            levels.append(_patches(name, module.fold))
        elif isinstance(module, ChannelTranspose | Permute) and leaf in ("gather", "shuffle"):
            stride = module.inner if isinstance(module, ChannelTranspose) else None
            strides[f"{parent}.block." if leaf == "gather" else f"{parent}.conv2."] = stride
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            stride = next((stride for prefix, stride in strides.items() if name.startswith(prefix)), 1)
            radix = module.in_channels // module.groups
            shape = (module.groups // (stride or 1), radix, stride or 1)
            levels.append(_level(name, "channels", shape, stride is None))
    return levels


def _level(name: str, mixes: str, level: tuple[int, int, int], shuffled: bool) -> MixingLevel:
    groups, radix, stride = level
    n, non_zero = groups * radix * stride, 1 / (groups * stride)
    return MixingLevel(name, mixes, n, radix, None if shuffled else stride, groups, non_zero)


def _patches(name: str, fold: PatchFold) -> MixingLevel:
    n, groups = fold.num_patches * fold.values, fold.rows * fold.columns
    return MixingLevel(name, "patches", n, fold.values, fold.stride, groups, 1 / fold.num_patches)


def macs_against_dense(
    model: Any, name: str, input_size: tuple[int, ...], model_args: Mapping[str, Any] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """MACs for one image of the whole model (`module` is "") and of each part, beside those of its dense twin.

    `dense` is None where the architecture `name` has no twin, or the twin no such part. `model_args` are the keyword
    arguments in which the model differs from the architecture; its twin has them too, but for `mixing`.
    """
    ours = macs_by_module(model, input_size)
    twin: dict[str, int] = {}
    if twin_name := dense_twin(name):
        shape = {key: value for key, value in model_args.items() if key not in NOT_MODEL_ARGS | {"mixing"}}
        shape |= {"num_classes": model.num_classes, "in_chans": input_size[0]}
        if model.pretrained_cfg.get("fixed_input_size"):
            shape["img_size"] = input_size[1:]
        twin = macs_by_module(timm.create_model(twin_name, **shape), input_size)
    parts = ["", *(part for part, module in model.named_children() if part != "blocks" and part in ours)]
    parts += [f"blocks.{i}" for i in range(len(model.blocks))] if hasattr(model, "blocks") else []
    return [
        {
            "module": part,
            "macs": ours[part],
            "dense": twin.get(part),
            "of_dense": ours[part] / twin[part] if twin.get(part) else None,
        }
        for part in parts
        if part in ours
    ]
