"""The same function in other weights, for inference: BatchNorm folded, small groups merged, patches left as they are.

Layout: the weights of convolutions are channels_last. Convolutions of such images want them so, and torch would copy
them in each call.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .butterfly import ButterflySchedule
from .layers import BlockMlp, ButterflyMlp, ConvButterflyMlp, ConvNorm, PatchFold, Permute
from .layers.eager import is_hooked
from .patch_only_mixer import PatchOnlyMixer, PatchStep


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose every ConvNorm is one convolution with a bias; the same function to 1e-5.

    But for those of which a part was exchanged, is watched, or makes its weights in its call. It has other parameters
    than `model`: fuse after the weights are loaded, and do not train what comes back.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, ConvNorm) and _folds(module.conv, module.bn):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.register_module("bn", nn.Identity())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the two are as they were built, so that their weights say all."""
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or is_hooked(conv) or is_hooked(norm):
        return False
    return "weight" in conv._parameters and norm.running_mean is not None


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


def merged_weight(weight: Tensor, groups: int, merged: int) -> Tensor:
    """The weight of a convolution in groups whose every `merged` neighbours are one, with zeros between them.

    (out, in / groups, ...) -> (out, in / groups * merged, ...). Gradients pass.
    """
    out, width, *kernel = weight.shape
    rest = [1] * len(kernel)
    same = torch.eye(merged, dtype=weight.dtype, device=weight.device).view(merged, 1, merged, 1, *rest)
    blocks = weight.reshape(groups // merged, merged, out // groups, 1, width, *kernel)
    return (blocks * same).reshape(out, merged * width, *kernel)


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


def in_patches(model: nn.Module) -> nn.Module:
    """A copy of a Patch-Only Mixer that stays in patches from step to step; no more than a copy of any other model.

    One gather brings the pixels of a step's patches to those of the next; pixels stay whole, with their channels one
    after the other, and what norms and MLPs know of a patch's values goes along. So do the patches that
    `forward_features` gives, if the head has some; pooled they have the order that the head knows. Butterflies in
    patches find their values by gathers too, after `convolve_levels`; before it such a model stays. onnxruntime gathers
    on all threads, where it turns tensors of many axes on one.
    """
    model = copy.deepcopy(model)
    if not isinstance(model, PatchOnlyMixer) or type(model.norm) not in (nn.LayerNorm, nn.Identity):
        return model
    rounds: Any = model.blocks
    steps = [(blocks, i, step) for blocks in rounds for i, step in enumerate(blocks)]
    if all(isinstance(step, PatchStep) and (step.weights_say_all() or _is_convolved(step)) for *_, step in steps):
        last = _places(PatchFold(1, _size(model.head_fold), 1))
        for blocks, i, step in steps:
            here = _places(step.fold)
            step = _DenseStep(step) if step.weights_say_all() else _ConvolvedStep(step)
            blocks[i], last = nn.Sequential(_gather(last, here), step), here
        model.stem = nn.Sequential(model.stem, _Pixels())
        head = model.head_fold
        _turn_head(model, nn.Sequential(_gather(last, _places(head)), _ToPatches(head)))
    return model


def _is_convolved(step: PatchStep) -> bool:
    norm: Any = step.norm
    plain = type(step) is PatchStep and type(step.fold) is PatchFold and step.across is None
    return plain and type(step.mlp) is ConvButterflyMlp and type(norm) is nn.LayerNorm and norm.bias is not None


def _size(fold: PatchFold) -> tuple[int, int]:
    span = fold.patch_size * fold.stride
    return fold.rows * span, fold.columns * span


def _places(fold: PatchFold) -> Tensor:
    """Which pixel of the image, row by row, stands at each place of the patches in a row."""
    size = _size(fold)
    pixels = torch.arange(size[0] * size[1])
    return PatchFold(1, size, fold.patch_size, fold.stride).unfold(pixels.view(1, 1, *size)).flatten()


def _gather(before: Tensor, after: Tensor) -> nn.Module:
    """Brings what axis 1 holds in the order `before` to the order `after`, both lists of what stands at each place."""
    order = before.argsort()[after].tolist()
    return nn.Identity() if order == sorted(order) else Permute(order, dim=1)


class _ToPatches(nn.Module):
    """Pixels in the order of patches, (B, H * W, C) -> (B, num_patches, p * p * C)."""

    def __init__(self, fold: PatchFold) -> None:
        super().__init__()
        self.shape = [-1, fold.num_patches, fold.values]

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape)


class _ConvolvedStep(nn.Module):
    """A PatchStep with a ConvButterflyMlp for pixels in the order of its patches, (B, H * W, C)."""

    def __init__(self, step: PatchStep) -> None:
        super().__init__()
        fold, mlp = step.fold, step.mlp
        self.to_patches, self.norm = _ToPatches(fold), copy.deepcopy(step.norm)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.copy_(fold.turned(parameter))
        values = torch.arange(fold.values)
        blocks = [level.view.split(values.unsqueeze(1), level.radix).flatten() for level in mlp.levels]
        orders = [fold.turned(values), *blocks, fold.turned(values)]
        self.gathers = nn.ModuleList([_gather(*pair) for pair in pairwise(orders)])
        self.levels = mlp.levels

    def forward(self, x: Tensor) -> Tensor:
        """As it comes."""
        y = self.norm(self.to_patches(x)).transpose(1, 2).unsqueeze(2)
        for gather, level in zip(self.gathers, self.levels, strict=False):
            y = level.convolve(gather(y))
        return x + self.gathers[-1](y).squeeze(2).transpose(1, 2).reshape(x.shape)


class _DenseStep(nn.Module):
    """A PatchStep with one MLP a patch for pixels in the order of its patches, (B, H * W, C)."""

    def __init__(self, step: PatchStep) -> None:
        super().__init__()
        self.to_patches = _ToPatches(step.fold)
        step = copy.deepcopy(step)  # what steps share would be turned once for each
        self.norm, self.mlp, self.across_norm, self.across = step.norm, step.mlp, step.across_norm, step.across
        values = [(self.mlp.fc1.weight, 1), (self.mlp.fc2.weight, 0), (self.mlp.fc2.bias, 0)]
        values += [(parameter, 0) for norm in (self.norm, self.across_norm) for parameter in norm.parameters()]
        with torch.no_grad():
            for parameter, dim in values:
                parameter.copy_(step.fold.turned(parameter, dim))

    def forward(self, x: Tensor) -> Tensor:
        """As it comes."""
        y = self.to_patches(x)
        y = y + self.mlp(self.norm(y))
        if self.across is not None:
            y = y + self.across(self.across_norm(y).transpose(1, 2)).transpose(1, 2)
        return y.reshape(x.shape)


@torch.no_grad()
def _turn_head(model: PatchOnlyMixer, turns: nn.Sequential) -> None:
    """The norm goes along, and the order comes back behind the pool, where an image has few values left."""
    fold = model.head_fold
    for parameter in model.norm.parameters():
        parameter.copy_(fold.turned(parameter))
    model.register_module("head_fold", _Unfold(turns))
    if fold.patch_size > 1:
        turned = nn.Sequential(_ChannelsFirst(fold.channels, fold.patch_size**2), model.head_drop)
        model.register_module("head_drop", turned)


class _Unfold(nn.Sequential):
    """Called as a PatchFold is."""

    def unfold(self, x: Tensor) -> Tensor:
        """Patches of the last step -> the head's."""
        return self(x)


class _Pixels(nn.Module):
    """(B, C, H, W) -> (B, H * W, C): pixels are patches of 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class _ChannelsFirst(nn.Module):
    """The values of patches in the order that the head, and who asks for features, know."""

    def __init__(self, channels: int, pixels: int) -> None:
        super().__init__()
        self.sizes = [-1, pixels, channels]

    def forward(self, x: Tensor) -> Tensor:
        """(..., N * pixels * channels) -> (..., N * channels * pixels)."""
        return x.unflatten(-1, self.sizes).transpose(-1, -2).flatten(-3)


def _merges(schedule: ButterflySchedule, least: int) -> bool:
    blocks, radix = schedule.n // schedule.radix, schedule.radix
    return radix % least == 0 or (least % radix == 0 and blocks % (least // radix) == 0)


def _merge(conv: nn.Conv2d, merged: int) -> None:
    """Every `merged` groups become one."""
    conv.weight = nn.Parameter(merged_weight(conv.weight.detach(), conv.groups, merged))
    conv.groups //= merged
