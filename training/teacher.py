"""The teacher of the distilled recipes: a small dense CNN for 32x32 images that trains fast, no part of the zoo.

The layout is that of cifar10-airbench (Jordan, arXiv 2404.00498, section 3): each block halves the map right after its
first, widening convolution, so that most multiplications happen in wide convolutions on small maps. Its whitening
first layer is an ordinary convolution here. The deep one has, as airbench96, three convolutions in each
block, the last two with a residual around them.
"""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn


class Residual(nn.Sequential):
    """Adds what it reads to what it makes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class TeacherCnn(nn.Sequential):
    """(B, in_chans, 32, 32) -> (B, num_classes).

    Args:
        widths: channels of the three blocks.
        stem: channels of the convolution ahead of them.
        deep: three convolutions a block in place of two, with a residual around the last two.
        num_classes, in_chans: as in timm.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (64, 256, 256),
        stem: int = 32,
        deep: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(in_chans, stem))
        for i, (chs, out_chs) in enumerate(zip((stem, *widths), widths, strict=False), start=1):
            last = _conv(out_chs, out_chs)
            if deep:
                last = [Residual(*last, *_conv(out_chs, out_chs))]
            self.add_module(f"block{i}", nn.Sequential(*_conv(chs, out_chs, nn.MaxPool2d(2)), *last))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _conv(in_chs: int, out_chs: int, *pool: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(out_chs), nn.GELU()]


@register_model
def teacher_cnn(pretrained: bool = False, **kwargs: Any) -> TeacherCnn:
    """Widths 64, 256, 256: 2.0 M parameters, 152 M multiply-accumulates."""
    known = ("widths", "stem", "deep", "num_classes", "in_chans")
    return TeacherCnn(**{key: value for key, value in kwargs.items() if key in known})


@register_model
def teacher_cnn_wide(pretrained: bool = False, **kwargs: Any) -> TeacherCnn:
    """Widths 128, 384, 512 and a stem of 64: 6.1 M parameters, 464 M multiply-accumulates."""
    return teacher_cnn(pretrained, **{"widths": (128, 384, 512), "stem": 64} | kwargs)


@register_model
def teacher_cnn_deep(pretrained: bool = False, **kwargs: Any) -> TeacherCnn:
    """Widths 128, 384, 384, a stem of 64 and three convolutions a block: 7.5 M parameters, 563 M MACs."""
    return teacher_cnn(pretrained, **{"widths": (128, 384, 384), "stem": 64, "deep": True} | kwargs)
