"""Stages of residual blocks by our own kernels: all convolutions of an image in the cache, none of its channels moved.

Torch's grouped convolutions are slow with groups of a few channels, and a block on one image is mostly the start of its
ten operators. The kernel (zoo/native/convolve.h) is as fast with groups of four as with dense ones. What `native` says
of the other kernels goes for this one too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import native
from .butterfly_conv import ChannelTranspose
from .conv_norm import ConvNorm
from .eager import is_hooked, part

Turn = tuple[int, int, int]
MOST_BLOCKS = 16
LARGEST = 2**17
"""Numbers of an image up to which a stage keeps to the cache."""

FEW, WIDEST = 8, 64
"""All is faster here but as many images a thread in groups of more channels (docs/performance.md)."""


class Convolution(NamedTuple):
    """A convolution and its BatchNorm: (out, width of a group, groups, taps_first), six tensors or None, epsilon."""

    shape: tuple[int, int, int, int]
    tensors: tuple[Tensor | None, ...]
    epsilon: float


NOTHING = Convolution((0, 0, 1, 0), (None,) * 6, 0.0)


class Block(NamedTuple):
    """A residual block: 3x3, ReLU, 3x3, shortcut (1x1 or NOTHING), ReLU. Without a second 3x3 the first two alone.

    `turn` is the ChannelTranspose ahead of it, undone behind it, and `turn_middle` the one between the convolutions.
    """

    stride: int
    turn: Turn
    turn_middle: Turn
    first: Convolution
    second: Convolution
    shortcut: Convolution


def turn_of(module: nn.Module) -> Turn | None:
    """A permutation of channels as the kernel reads it, or None where it is another one or something watches it."""
    if is_hooked(module):
        return None
    if type(module) is nn.Identity:
        return (1, 1, 1)
    return (module.outer, module.middle, module.inner) if type(module) is ChannelTranspose else None


def convolution_of(module: nn.Module, kernel: int, stride: int) -> Convolution | None:
    """A ConvNorm as the kernel reads it; None where a part is not as it was built or fused, and has to be called."""
    if type(module) is not ConvNorm or is_hooked(module) or len(module) != 2:
        return None
    conv, norm = part(module, "conv"), part(module, "bn")
    if type(conv) is not nn.Conv2d or is_hooked(conv) or is_hooked(norm):
        return None
    built = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    if built != ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), "zeros"):
        return None
    weight = conv.weight
    taps_first = not weight.is_contiguous()
    if taps_first and not weight.is_contiguous(memory_format=torch.channels_last):
        return None
    tensors: tuple[Tensor | None, ...] = (weight, conv.bias, None, None, None, None)
    epsilon = 0.0
    if type(norm) is nn.BatchNorm2d and not norm.training and norm.affine and norm.track_running_stats:
        gamma, beta, mean, variance = norm.weight, norm.bias, norm.running_mean, norm.running_var
        if gamma is None or beta is None or mean is None or variance is None:
            return None
        tensors, epsilon = (weight, conv.bias, gamma, beta, mean, variance), norm.eps
    elif type(norm) is not nn.Identity:
        return None
    out, width, *sides = weight.shape
    if sides != [kernel, kernel] or out % conv.groups or not native.is_plain(weight, strided=True):
        return None
    for tensor in tensors[1:]:
        if tensor is not None and not (native.is_plain(tensor) and tensor.numel() == out):
            return None
    return Convolution((out, width, conv.groups, int(taps_first)), tensors, epsilon)


def plain_block(layer: nn.Module, relu: nn.Module) -> Block | None:
    """A 3x3 ConvNorm with its ReLU, no more, or None where one of them has to be called."""
    if type(layer) is not ConvNorm or type(relu) is not nn.ReLU or is_hooked(relu):
        return None
    stride = getattr(part(layer, "conv"), "stride", (0,))[0]
    convolution = convolution_of(layer, 3, stride)
    if convolution is None or stride not in (1, 2):
        return None
    return Block(stride, (1, 1, 1), (1, 1, 1), convolution, NOTHING, NOTHING)


def takes(x: Tensor) -> bool:
    """Whether the kernel may take x, (B, C, H, W), and keeps it in the cache."""
    return native.takes(x) and x.shape[1:].numel() <= LARGEST


def pays(images: int, blocks: Sequence[Block]) -> bool:
    """Whether the kernel is the faster way: always but for many images in wide groups."""
    if images < FEW * _threads():
        return True
    return max(conv.shape[1] for block in blocks for conv in (block.first, block.second)) <= WIDEST


def blocks_for(x: Tensor, module: Any) -> list[Block]:
    """The `kernel_blocks()` of a stem or a stage, or none where the kernel does not take x or is not the faster way."""
    blocks = module.kernel_blocks() if takes(x) else []
    return blocks if blocks and pays(len(x), blocks) else []


def may_follow(x: Tensor, before: Sequence[Block], blocks: Sequence[Block]) -> bool:
    """Whether blocks may go with those before them, (B, C, H, W) in, in one call that keeps to the cache and pays."""
    if len(before) + len(blocks) > MOST_BLOCKS:
        return False
    channels, size = channels_after(before) if before else x.shape[1], size_after(x.shape[2:], before)
    return channels * size[0] * size[1] <= LARGEST and pays(len(x), blocks)


def size_after(size: Sequence[int], blocks: Sequence[Block]) -> tuple[int, int]:
    """(H, W) of what blocks make of maps of a size."""
    height, width = size
    for block in blocks:
        height, width = _strided(height, block.stride), _strided(width, block.stride)
    return height, width


def channels_after(blocks: Sequence[Block]) -> int:
    """Channels that the last block gives."""
    last = blocks[-1]
    return last.second.shape[0] or last.first.shape[0]


def _strided(side: int, stride: int) -> int:
    return (side + stride - 1) // stride


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def stage(x: Tensor, blocks: Sequence[Block]) -> Tensor:
    """(B, C, H, W) -> (B, C', H', W'), channels_last.

    Raises:
        ValueError: `x` has another number of channels than the first block takes.
    """
    _, width, groups, _ = blocks[0].first.shape
    if x.shape[1] != width * groups:
        raise ValueError(f"{width * groups} channels expected, the input has {x.shape[1]}")
    shapes: list[int] = []
    tensors: list[Tensor | None] = []
    epsilons: list[float] = []
    for stride, turn, turn_middle, *convolutions in blocks:
        shapes += (stride, *turn, *turn_middle)
        for shape, parts, epsilon in convolutions:
            shapes += shape
            tensors += parts
            epsilons.append(epsilon)
    return _stage_operator(x, tensors, shapes, epsilons)


_NUMBERS = 19  # of a block
native.LIBRARY.define("stage(Tensor x, Tensor?[] tensors, int[] shapes, float[] epsilons) -> Tensor")
_stage_operator = torch.ops.dimmix.stage.default


def _empty(x: Tensor, shapes: Sequence[int]) -> Tensor:
    height, width = x.shape[2:]
    for stride in shapes[::_NUMBERS]:
        height, width = _strided(height, stride), _strided(width, stride)
    last = shapes[len(shapes) - _NUMBERS :]
    channels = last[11] or last[7]  # of the last block's second convolution, or of its only one
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _stage(x: Tensor, tensors: Sequence[Tensor | None], shapes: list[int], epsilons: list[float]) -> Tensor:
    native.refuse_tangent(x)
    y = _empty(x, shapes)
    threads, addresses = torch.get_num_threads(), native.addresses(tensors)
    native._native.stage(x.data_ptr(), *x.stride(), y.data_ptr(), *x.shape, threads, shapes, addresses, epsilons)
    return y


native.LIBRARY.impl("stage", _stage, "CPU")


@torch.library.register_fake("dimmix::stage", lib=native.LIBRARY)
def _fake_stage(x: Tensor, tensors: Sequence[Tensor | None], shapes: list[int], epsilons: list[float]) -> Tensor:
    return _empty(x, shapes)


@register_flop_formula(torch.ops.dimmix.stage)
def _stage_flops(x_shape, tensors_shape, shapes, epsilons, out_shape=None, **kwargs) -> int:
    """Each weight is multiplied and added once a position of the block's result."""
    images, _, height, width = x_shape
    flops = 0
    for block, stride in enumerate(shapes[::_NUMBERS]):
        height, width = _strided(height, stride), _strided(width, stride)
        weights = [shape for shape in tensors_shape[18 * block : 18 * (block + 1) : 6] if shape is not None]
        flops += 2 * images * height * width * sum(shape.numel() for shape in weights)
    return flops
