"""The same function in other weights, for inference: BatchNorm folded, small groups merged, patches of whole pixels.

Layout: the weights of convolutions are channels_last. Convolutions of such images want them so, and torch would copy
them in each call.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .butterfly import ButterflySchedule
from .layers import BlockMlp, ButterflyMlp, ConvButterflyMlp, ConvNorm, PatchFold
from .patch_only_mixer import PatchOnlyMixer, PatchStep


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose every ConvNorm is one convolution with a bias; the same function to 1e-5.

    It has other parameters than `model`: fuse after the weights are loaded, and do not train what comes back.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, ConvNorm) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.register_module("bn", nn.Identity())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


def merge_groups(model: nn.Module, least: int) -> nn.Module:
    """A copy of `model` whose grouped convolutions have groups of `least` channels or more, neighbours merged.

    The weights between the merged groups are zeros, so the function stays the same and the weights become more: for a
    runtime that is slow with small groups. A convolution whose groups do not make up `least` channels stays, and
    so does one of single channels, which runtimes have a fast way for.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            width = min(module.in_channels, module.out_channels) // module.groups
            merged, rest = divmod(least, width)
            if 1 < width < least and rest == 0 and module.groups % merged == 0:
                _merge(module, merged)
    return model


def convolve_levels(model: nn.Module, least: int) -> nn.Module:
    """A copy of `model` in which the levels of a ButterflyMlp are convolutions in groups, the rows being pixels.

    Where its blocks are, or merge to, multiples of `least` features. One block of all features stays a product.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, mlp in parent.named_children():
            if type(mlp) is not ButterflyMlp or any(type(level) is not BlockMlp for level in mlp.levels):
                continue
            if len(mlp.schedule) > 1 and _merges(mlp.schedule, least):
                setattr(parent, name, ConvButterflyMlp(mlp))
    return model


def pixels_last(model: nn.Module) -> nn.Module:
    """A copy of a Patch-Only Mixer whose steps work on images (B, H, W, C); no more than a copy of any other model.

    A patch holds its pixels one after the other then, and what norms and MLPs know of its values goes along.
    """
    model = copy.deepcopy(model)
    steps = [module for module in model.modules() if isinstance(module, PatchStep)]
    if isinstance(model, PatchOnlyMixer) and all(step.weights_say_all() for step in steps):
        for step in steps:
            _turn_values(step)
        model.stem = nn.Sequential(model.stem, _PixelsLast())
        model.head_fold = _HeadFold(model.head_fold)
    return model


@torch.no_grad()
def _turn_values(step: PatchStep) -> None:
    mlp, turned = step.mlp, step.fold.turned
    of_values = [(mlp.fc1.weight, 1), (mlp.fc2.weight, 0), (mlp.fc2.bias, 0)]
    for norm in (step.norm, step.across_norm):
        of_values += [(parameter, 0) for parameter in norm.parameters()]
    for parameter, dim in of_values:
        parameter.copy_(turned(parameter, dim))
    step.fold = _PixelFold(step.fold)


class _PixelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _PixelFold(PatchFold):
    """A PatchFold for images (B, H, W, C)."""

    def __init__(self, fold: PatchFold) -> None:
        span = fold.patch_size * fold.stride
        super().__init__(fold.channels, (fold.rows * span, fold.columns * span), fold.patch_size, fold.stride)

    def unfold(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, num_patches, p * p * C)."""
        return self.unfold_pixels(x)

    def fold(self, x: Tensor) -> Tensor:
        """(B, num_patches, p * p * C) -> (B, H, W, C)."""
        return self.fold_pixels(x)


class _HeadFold(_PixelFold):
    """Gives the values of a patch in the order that the head, and who asks for features, know."""

    def unfold(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, num_patches, C * p * p)."""
        x = self.unfold_pixels(x)
        return x.unflatten(2, [-1, self.channels]).transpose(2, 3).flatten(2) if self.patch_size > 1 else x


def _merges(schedule: ButterflySchedule, least: int) -> bool:
    blocks, radix = schedule.n // schedule.radix, schedule.radix
    return radix % least == 0 or (least % radix == 0 and blocks % (least // radix) == 0)


@torch.no_grad()
def _merge(conv: nn.Conv2d, merged: int) -> None:
    """Every `merged` groups become one with a block-diagonal weight."""
    groups, width = conv.groups, conv.weight.shape[1]
    blocks = conv.weight.reshape(groups // merged, merged, -1, width, *conv.kernel_size)
    weight = blocks.new_zeros(groups // merged, merged, blocks.shape[2], merged, width, *conv.kernel_size)
    for i in range(merged):
        weight[:, i, :, i] = blocks[:, i]
    conv.weight = nn.Parameter(weight.reshape(len(conv.weight), merged * width, *conv.kernel_size))
    conv.groups //= merged
