"""Butterfly ResNet: CIFAR ResNets whose grouped 3x3 convolutions mix channels in a butterfly.

Paper: Dimension Mixer, section 4.4 (arXiv 2311.18735). Layout of the CIFAR ResNet-20 (arXiv 1512.03385, section 4.2):
three stages of widths w, 2w, 4w, two 3x3 convolutions a block.

  * `mixing="conv"`, conv-mix: the two convolutions of a block are the two levels; channels are shuffled in between.
  * `mixing="block"`, block-mix: block j of a stage works on level j: channels are gathered, every convolution of the
    block (and the shortcut) is grouped, channels are scattered back.
  * `mixing="dense"`: the dense ResNet of the same widths.

Differs from the paper: the model works in channels_last, which grouped convolutions want on a CPU. In block-mix a stage
keeps the number of groups that its input has, as the paper's parameter counts show, so a stage that doubles its
channels has groups of 2a from its second block on; here the levels step by the groups the convolutions have, 2a, in the
paper's code by a. The variants without a depth in their name are ours: conv-mix but for `fast_blockmix`, most groups of
16 channels and more, and a stem that downsamples in `fast` and for larger inputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .butterfly import ButterflySchedule, Level
from .data_cfg import base_cfg
from .layers import ChannelTranspose, ConvNorm, ConvStem, gather_groups, native_stage, scatter_groups
from .layers.eager import is_hooked, is_idle, part
from .pretrained import build
from .pretrained import default_cfgs as make_default_cfgs
from .registry import register_variants, with_dense_twins
from .trunk import Trunk, drop_path_rates


class BasicBlock(nn.Module):
    """3x3, ReLU, 3x3, shortcut, ReLU, with optional groups and a permutation of channels between the convolutions.

    Args:
        in_chs, out_chs: channels.
        stride: of the first convolution; the shortcut is a 1x1 convolution where the shape changes.
        groups: of the first convolution, the second and the shortcut.
        shuffle: permutes the channels between the two convolutions.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        groups: tuple[int, int, int] = (1, 1, 1),
        shuffle: nn.Module | None = None,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = ConvNorm(in_chs, out_chs, 3, stride, groups[0], **dd)
        self.shuffle = shuffle or nn.Identity()
        self.conv2 = ConvNorm(out_chs, out_chs, 3, 1, groups[1], **dd)
        same = stride == 1 and in_chs == out_chs
        self.shortcut = nn.Identity() if same else ConvNorm(in_chs, out_chs, 1, stride, groups[2], **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        y = self.conv2(self.shuffle(F.relu(self.conv1(x), inplace=True)))
        return F.relu(self.drop_path(y) + self.shortcut(x), inplace=True)

    @torch.jit.unused
    def native_block(self, turn: native_stage.Turn = (1, 1, 1)) -> native_stage.Block | None:
        """The block for `native_stage`, or None where something of it has to be called."""
        if self.stride not in (1, 2):
            return None
        shortcut, drop = part(self, "shortcut"), part(self, "drop_path")
        first = native_stage.convolution_of(part(self, "conv1"), 3, self.stride)
        second = native_stage.convolution_of(part(self, "conv2"), 3, 1)
        third: native_stage.Convolution | None = native_stage.NOTHING
        if type(shortcut) is not nn.Identity:
            third = native_stage.convolution_of(shortcut, 1, self.stride)
        turn_middle = native_stage.turn_of(part(self, "shuffle"))
        if first is None or second is None or third is None or turn_middle is None:
            return None
        if is_hooked(self) or is_hooked(shortcut) or not is_idle(drop):
            return None
        return native_stage.Block(self.stride, turn, turn_middle, first, second, third)


class BlockMix(nn.Sequential):
    """Gathers the groups of a level, runs a BasicBlock with as many groups, scatters the channels back."""

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, groups: int, level: Level, drop_path: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.gather = gather_groups(level, device=dd.get("device"))
        self.block = BasicBlock(in_chs, out_chs, stride, (groups, groups, groups), None, drop_path, **dd)
        self.scatter = scatter_groups(level, device=dd.get("device"))

    @torch.jit.unused
    def native_block(self) -> native_stage.Block | None:
        """The block for `native_stage`, or None where something of it has to be called."""
        turn, back = native_stage.turn_of(self.gather), native_stage.turn_of(self.scatter)
        if turn is None or back is None or is_hooked(self) or type(self.block) is not BasicBlock:
            return None
        if len(self) != 3 or back != (turn[0], turn[2], turn[1]):
            return None
        return self.block.native_block(turn)


class Stage(nn.Sequential):
    """Blocks in a row, which our own kernels run as one where they can."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not torch.jit.is_scripting():
            blocks = native_stage.blocks_for(x, self)
            if blocks:
                return native_stage.stage(x, blocks)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def kernel_blocks(self) -> list[native_stage.Block]:
        """All blocks for `native_stage.stage`, none where a part has to be called."""
        if len(self) > native_stage.MOST_BLOCKS:
            return []
        blocks = []
        for block in self:
            plain = type(block) is BasicBlock or type(block) is BlockMix
            native_block = block.native_block() if plain else None  # type: ignore[operator]
            if native_block is None:
                return []
            blocks.append(native_block)
        return blocks


def _conv_mix(
    in_chs: int, out_chs: int, stride: int, radix: int, first: int | None, drop_path: float, **dd: Any
) -> BasicBlock:
    """A block of conv-mix: the second convolution mixes groups of `radix`, the first groups of `first` channels.

    The two reach every channel if radix * first is at least the channels; the paper takes it equal, which is the
    default. A block that widens leaves the group count of its first convolution as it is.
    """
    ButterflySchedule(out_chs, radix)  # refuses a radix that does not divide
    if first and (out_chs % first or in_chs % (out_chs // first)):
        raise ValueError(f"first_radix {first} does not divide the {in_chs} and {out_chs} channels of a block evenly")
    groups = (out_chs // (first or out_chs // radix), out_chs // radix, 1)
    shuffle = ChannelTranspose(1, radix, out_chs // radix) if radix < out_chs else None
    return BasicBlock(in_chs, out_chs, stride, groups, shuffle, drop_path, **dd)


class ButterflyResNet(Trunk):
    """See the module's docstring.

    Args:
        depths: blocks per stage.
        width: channels of the first stage; doubles from stage to stage.
        mixing: "conv", "block" or "dense".
        radix: per stage, channels in a group of the second convolution (conv), or in a group of the stage's input
            (block).
        first_radix: per stage, channels in a group of the first convolution of conv-mix; None as the paper has it.
        stem_stride: 1 for images of 32 pixels, 2 for 64, 8 for 224.
        stem_full_res: one more convolution in the stem, ahead of its strides.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: unknown `mixing`, a radix that does not divide its stage's channels, or one for other stages, a
            `stem_stride` that is no power of two.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 3),
        width: int = 32,
        mixing: str = "conv",
        radix: tuple[int, ...] = (8, 8, 16),
        first_radix: tuple[int, ...] | None = None,
        stem_stride: int = 1,
        stem_full_res: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if mixing not in ("conv", "block", "dense"):
            raise ValueError(f"mixing={mixing!r} is not one of 'conv', 'block', 'dense'")
        self.stem = ConvStem(in_chans, width, stem_stride, stem_full_res, **dd)
        self.norm = nn.Identity()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, chs = [], width
        for name, radixes in (("radix", radix), ("first_radix", first_radix)):
            if mixing != "dense" and radixes is not None and len(radixes) != len(depths):
                raise ValueError(
                    f"{name}={radixes} has {len(radixes)} numbers for the {len(depths)} stages of {depths}"
                )
        for i, depth in enumerate(depths):
            out_chs, groups = width * 2**i, 1 if mixing == "dense" else max(1, chs // radix[i])
            blocks: list[nn.Module] = []
            if mixing == "block":
                ButterflySchedule(chs, radix[i])  # refuses a radix that does not divide
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                drop = next(rates)
                if mixing == "dense":
                    blocks.append(BasicBlock(chs, out_chs, stride, drop_path=drop, **dd))
                elif mixing == "conv":
                    first = first_radix[i] if first_radix else None
                    blocks.append(_conv_mix(chs, out_chs, stride, radix[i], first, drop, **dd))
                else:
                    level = ButterflySchedule(chs, chs // groups).level(j)
                    blocks.append(BlockMix(chs, out_chs, stride, groups, level, drop, **dd))
                chs = out_chs
            stages.append(Stage(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.finish(
            num_classes=num_classes,
            in_chans=in_chans,
            features=chs,
            grid=(1, 1),
            widths=[width * 2**i for i in range(len(depths))],
            reduction=[stem_stride * 2**i for i in range(len(depths))],
            global_pool=global_pool,
            drop_rate=drop_rate,
            makes_maps=True,
            **dd,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x: Tensor) -> Tensor:
        """Image -> stem features, channels_last from here on."""
        return self.stem(_channels_last(x))

    @torch.jit.unused
    def features_by_kernel(self, x: Tensor) -> Tensor | None:
        """What follows each other in the kernel is one call of it: nothing in between leaves its layout."""
        parts = [self.stem, *self.blocks]
        if not native_stage.takes(x) or self.grad_checkpointing or any(map(is_hooked, (self.blocks, *parts))):
            return None
        if type(self).embed is not ButterflyResNet.embed or type(self).leave is not Trunk.leave:
            return None
        if not {"embed", "leave"}.isdisjoint(self.__dict__):
            return None
        blocks_of = [module.kernel_blocks() if type(module) in (ConvStem, Stage) else [] for module in parts]
        if not all(blocks_of) or len(self.stem._modules) != 2 * len(blocks_of[0]):
            return None
        together: list[native_stage.Block] = []
        for module, blocks in zip(parts, blocks_of, strict=True):
            if native_stage.may_follow(x, together, blocks):
                together += blocks
                continue
            x = native_stage.stage(x, together) if together else x
            together = blocks if native_stage.may_follow(x, [], blocks) else []
            x = x if together else module(_channels_last(x))
        return self.norm(native_stage.stage(x, together) if together else x)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions for layer-wise learning-rate decay."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"}


def _channels_last(x: Tensor) -> Tensor:
    """In that memory format, by operators that `torch.func.vmap` knows."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


# Ours: both convolutions of a block in groups of the same size, 16 to 32 channels where there are enough.
_NANO = {"width": 32, "radix": (8, 16, 16), "first_radix": (8, 16, 16)}
_TINY = {"width": 64, "radix": (16, 16, 16), "first_radix": (16, 16, 16)}
# Half the resolution from the stem on and twice the width: most work in wide groups on small maps, which is where a CPU
# is quickest and a ResNet learns most a second.
_FAST = {
    "depths": (2, 3, 2),
    "width": 64,
    "radix": (32, 32, 32),
    "first_radix": (32, 32, 32),
    "stem_stride": 2,
    "stem_full_res": True,
}
# Full resolution in the first stage, and as many weights as 1.2 million allow in wide groups.
_TINY_R64 = {"depths": (3, 3, 2), "width": 64, "radix": (32, 64, 64), "first_radix": (32, 64, 64)}
_SMALL = {"width": 96, "radix": (24, 24, 24), "first_radix": (24, 24, 24)}

VARIANTS: dict[str, dict[str, Any]] = with_dense_twins(
    {
        # The paper's. CIFAR-10 accuracy there: conv-mix w32 91.68 %; dense w16 90.14 %.
        "butterfly_resnet20_convmix_w32": {"width": 32, "radix": (8, 8, 16)},
        "butterfly_resnet20_convmix_w64": {"width": 64, "radix": (8, 16, 16)},
        "butterfly_resnet20_blockmix_w32": {"width": 32, "radix": (4, 4, 8), "mixing": "block"},
        "butterfly_resnet20_blockmix_w64": {"width": 64, "radix": (4, 8, 8), "mixing": "block"},
        # Four blocks a stage, the paper's "ResNet-23".
        "butterfly_resnet26_blockmix_w64": {"depths": (4, 4, 4), "width": 64, "radix": (8, 16, 16), "mixing": "block"},
        "butterfly_resnet_fast_32": _FAST,
        "butterfly_resnet_fast_r64_32": _FAST | {"radix": (32, 64, 64), "first_radix": (32, 64, 64)},
        # Groups widen as maps shrink: narrow ones where there are few channels, wide ones where most weights are.
        "butterfly_resnet_fast_r128_32": _FAST | {"radix": (16, 64, 128), "first_radix": (16, 64, 128)},
        "butterfly_resnet_fast_r256_32": _FAST | {"radix": (16, 32, 256), "first_radix": (16, 32, 256)},
        "butterfly_resnet_fast_blockmix_32": _FAST | {"mixing": "block", "radix": (32, 16, 16), "first_radix": None},
        "butterfly_resnet_nano_32": _NANO,
        "butterfly_resnet_tiny_32": _TINY,
        "butterfly_resnet_tiny_r64_32": _TINY_R64,
        "butterfly_resnet_small_32": _SMALL,
        "butterfly_resnet_small_64": _SMALL | {"stem_stride": 2},
        "butterfly_resnet_small_224": _SMALL | {"stem_stride": 8},
    },
    structure=("radix", "first_radix"),
)
# The dense ResNet-20 that the sparse ones replace: the paper's baseline, and wider.
VARIANTS |= {f"resnet20_w{width}": {"width": width, "mixing": "dense"} for width in (16, 20)}


def _cfg(name: str, args: dict[str, Any]) -> dict[str, Any]:
    named = name.removesuffix("_dense").rpartition("_")[2]
    size = int(named) if named.isdecimal() else 32
    side = size // (4 * args.get("stem_stride", 1))
    return base_cfg(size, pool_size=(side, side), first_conv="stem.0.conv")


default_cfgs = make_default_cfgs({name: _cfg(name, args) for name, args in VARIANTS.items()})


def _create_butterfly_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> ButterflyResNet:
    feature_cfg = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
    return build(ButterflyResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


register_variants(__name__, _create_butterfly_resnet, VARIANTS)
